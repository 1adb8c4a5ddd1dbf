"""How every figure looks, and how it is saved: same bytes for the same records.

Colours are those of Okabe and Ito (distinguishable with every common colour blindness); markers and
line styles carry the same distinction, so that a grey print loses nothing.
"""

import io
import math
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from costmodel.errors import ConfigError, MissingExtraError
from costmodel.files import write_atomic
from costmodel.units import format_si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe-Ito without its yellow, which is too light for lines on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
#: Coprime in number with the colours: 56 series before a combination repeats.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
LINE_OF_LEVEL = {"ideal": "-", "reference": (0, (4, 2))}
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "++", "oo")
GREY, LIGHT_GREY = "#555555", "#BBBBBB"
#: Width and height in inches of the page form and of the column form of a paper.
WIDE, NARROW = (9.0, 5.6), (5.2, 6.4)

#: Steps within a power, coarse to fine.
_STEPS = {
    10.0: ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)),
    2.0: ((1.0,), (1.0, 1.5)),
}
_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "lines.markersize": 6.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": 100.0,
    "svg.hashsalt": "lccost",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    # Names come from files: a dollar sign must not start a formula.
    "text.parse_math": False,
    "text.usetex": False,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Settings of all figures, whatever the user's matplotlibrc says."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def new_figure(size: tuple[float, float] = WIDE, **subplots: Any) -> "tuple[Figure, Any]":
    """A figure without pyplot (no global state, no window) and its axes."""
    _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**subplots)


def save_figure(figure: "Figure", path: str | Path, dpi: float = 160.0) -> Path:
    """Write PNG, SVG or PDF by the ending; the same figure gives the same bytes.

    A date is written only where ``SOURCE_DATE_EPOCH`` gives one.
    """
    path = Path(path)
    form = path.suffix.lower().lstrip(".")
    metadata = _metadata(form)
    if metadata is None:
        raise ConfigError(f"{path}: expected an ending of .png, .svg or .pdf, got {path.suffix!r}")
    with house_style():
        out = io.BytesIO()
        figure.savefig(out, format=form, dpi=dpi, metadata=metadata)
    return write_atomic(path, out.getvalue())


def _metadata(form: str) -> dict[str, Any] | None:
    if form == "png":
        return {"Software": None}
    if form == "svg":
        return {"Date": None, "Creator": "lccost"}
    if form == "pdf":
        return {"CreationDate": source_date(), "Creator": "lccost", "Producer": None}
    return None


def source_date() -> datetime | None:
    """The date that a reproducible build gives, or None."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(epoch), UTC) if epoch.isdigit() else None


class SeriesStyle:
    """Gives every series name its colour, and every (name, level) its marker, in order."""

    def __init__(self) -> None:
        self._colours: dict[str, str] = {}
        self._markers: dict[tuple[str, str], str] = {}

    def __call__(self, name: str, level: str = "") -> dict[str, Any]:
        """Keyword arguments ``color``, ``marker`` and ``linestyle``."""
        colour = self._colours.setdefault(name, COLOURS[len(self._colours) % len(COLOURS)])
        key = (name, level)
        marker = self._markers.setdefault(key, MARKERS[len(self._markers) % len(MARKERS)])
        return {"color": colour, "marker": marker, "linestyle": LINE_OF_LEVEL.get(level, "-")}


def title_of(axes: "Axes", text: str, share: float = 1.0) -> None:
    """Set a title that wraps within ``share`` of the figure's width."""
    figure: Any = axes.get_figure()
    axes.set_title(wrapped(text, figure.get_figwidth() * share))


def wrapped(text: str, inches: float) -> str:
    """Text in lines of bold title size that fit a width; a word longer than a line is cut."""
    return "\n".join(textwrap.wrap(text, max(12, int(inches * 10.5) - 10))) or text


def si_axis(axis: Any, unit: str = "") -> None:
    """Ticks such as ``10 T``: no reader should count zeros."""
    format_axis(axis, lambda value: format_si(value, unit).strip())


def log_ticks(axis: Any, limits: tuple[float, float], most: int, base: float = 10.0) -> None:
    """As many round ticks as ``most`` allows; matplotlib's own leave a short log axis bare.

    Base 2 (bytes) has powers of two, base 10 also steps between its powers.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = limits
    powers = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    ticks: list[float] = []
    for steps in _STEPS[base]:
        finer = [step * base**n for n in powers for step in steps if low <= step * base**n <= high]
        if ticks and len(finer) > most:
            break
        ticks = finer
    axis.set_major_locator(FixedLocator(ticks[:: max(1, math.ceil(len(ticks) / most))]))
    axis.set_minor_locator(NullLocator())


def format_axis(axis: Any, text_of: Callable[[float], str]) -> None:
    """Ticks as ``text_of`` writes them."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: text_of(value) if value else "0"))
    axis.set_minor_formatter(NullFormatter())


def say_empty(axes: "Axes", text: str) -> None:
    """An empty figure says why it is empty."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=GREY)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError(
            "figures need matplotlib, which is not installed: pip install 'lccost[report]'"
        ) from None
    return matplotlib

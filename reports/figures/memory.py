"""Where the memory goes: stacked bars a method, predicted and observed, against the capacity."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from costmodel.hardware import HardwareProfile
from costmodel.units import GIB, format_bytes
from reports.comparison import Pair, Points, as_pairs
from reports.figures.legend import legend_below
from reports.figures.style import GREY, WIDE, house_style, new_figure, say_empty, title_of, wrapped
from reports.labels import point, safe_text
from reports.points import Namer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Parts of the peak, from the bottom, with a colour and a hatch that a grey print keeps apart.
PARTS = (
    ("weights", "#0072B2", ""),
    ("state (KV cache, recurrent)", "#E69F00", "///"),
    ("transients and overhead", "#CCCCCC", "..."),
    ("state in host memory", "#FFFFFF", "xx"),
)
_MOST_BARS = 20
#: A bar longer than this many times the usable memory is cut (and says so).
_MOST_TIMES_USABLE = 2.5
#: Beyond this many times the axis the capacity is said, not drawn.
_FAR_CAPACITY = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBar:
    """Bytes of one side ("predicted" or "observed") of one method at its worst phase.

    ``rest_bytes`` is the peak less weights and state: transients, allocator and context. None
    where the peak is unknown.
    """

    name: str
    side: str
    weights_bytes: float
    state_bytes: float
    rest_bytes: float | None
    host_bytes: float
    phase: str

    @property
    def total_bytes(self) -> float:
        """Bytes on the GPU."""
        return self.weights_bytes + self.state_bytes + (self.rest_bytes or 0.0)


def memory_bars(pairs: Sequence[Pair]) -> tuple[MemoryBar, ...]:
    """Bars in order of the pairs; points without state or weights are left out."""
    namer = Namer(pairs)
    bars: dict[tuple[str, str], MemoryBar] = {}
    for pair in pairs:
        level = pair.key.text("level")
        name = f"{namer(pair)} ({level})" if level else namer(pair)
        for side in ("predicted", "observed"):
            made = _bar(pair, name, side)
            if made is not None:
                bars.setdefault((name, side), made)
    order = {name: n for n, (name, _) in reversed(list(enumerate(bars)))}
    return tuple(sorted(bars.values(), key=lambda b: (order[b.name], b.side != "predicted")))


def shared_point(pairs: Sequence[Pair]) -> tuple[float | None, float | None, str]:
    """(context, batch, model) at which most methods can be set side by side; the largest wins.

    Where all pairs are of one method its models are set side by side, and the place names none.
    """
    methods: dict[tuple[float | None, float | None, str], set[tuple[str, ...]]] = defaultdict(set)
    at = _place_of(pairs)
    for p in pairs:
        methods[at(p)].add((p.key.method_spec, p.key.text("level"), p.key.text("model")))
    counts = {place: len(found) for place, found in methods.items()}
    return max(counts, key=lambda place: (counts[place], place[0] or 0, place[1] or 0, place[2]))


def memory(
    points: Points,
    hardware: HardwareProfile | None = None,
    *,
    memory_fraction: float = 0.9,
    size: tuple[float, float] = WIDE,
) -> "Figure":
    """Stacked bars of weights, state, the rest of the peak, and host state, per GPU.

    All bars are of the one (context, batch, model) that most methods share, the largest if several
    do. The line is the memory that may be used: ``memory_fraction`` of what the driver reports.
    Bars far beyond it are cut and marked.
    """
    pairs = as_pairs(points)
    with house_style():
        figure, axes = new_figure(size)
        place = shared_point(pairs) if pairs else (None, None, "")
        at = _place_of(pairs)
        here = [p for p in pairs if at(p) == place]
        every = memory_bars(here)
        bars, n_left = every[:_MOST_BARS], len(every[_MOST_BARS:])
        if not bars:
            say_empty(axes, "no point has weights and state: nothing to draw")
            return figure
        usable = None if hardware is None else hardware.memory_bytes * memory_fraction
        _draw_bars(axes, bars, usable)
        if hardware is not None:
            _draw_capacity(axes, hardware, memory_fraction)
        one_model = len({p.key.text("model") for p in here}) == 1
        fields = ("context_tokens", "batch", *(("model",) if one_model else ()))
        title_of(axes, f"Memory per device: {point(here[0].key, fields)}")
        on_host = " (left of zero: host)" if any(b.host_bytes for b in bars) else ""
        rest = f"; {n_left} more bars are not drawn" if n_left else ""
        axes.set_xlabel(
            wrapped(
                f"memory (GiB) in the worse of prefill and decode{on_host}{rest}", size[0] * 0.9
            )
        )
        axes.grid(axis="y", visible=False)
        _legend(figure, bars)
        return figure


def _place_of(
    pairs: Sequence[Pair],
) -> Callable[[Pair], tuple[float | None, float | None, str]]:
    one_method = len({p.key.method_spec for p in pairs}) == 1

    def at(pair: Pair) -> tuple[float | None, float | None, str]:
        model = "" if one_method else pair.key.text("model")
        return pair.key.number("context_tokens"), pair.key.number("batch"), model

    return at


def _bar(pair: Pair, name: str, side: str) -> MemoryBar | None:
    weights, state = pair.value("weights_bytes", side), pair.value("state_bytes", side)
    if weights is None or state is None:
        return None
    allocated = pair.value("state_allocated_bytes", side) or state
    peak = pair.value("peak_bytes", side)
    return MemoryBar(
        name=name,
        side=side,
        weights_bytes=weights,
        state_bytes=state if peak is None else min(allocated, max(peak - weights, 0.0)),
        rest_bytes=None if peak is None else max(peak - weights - allocated, 0.0),
        host_bytes=pair.value("state_host_bytes", side) or 0.0,
        phase=pair.worst_phase(side),
    )


def _draw_bars(axes: "Axes", bars: Sequence[MemoryBar], usable: float | None) -> None:
    names = list(dict.fromkeys(b.name for b in bars))
    both = len({b.side for b in bars}) > 1
    reach = _reach([b.total_bytes for b in bars], usable)
    for b in bars:
        shift = (-0.21 if b.side == "predicted" else 0.21) if both else 0.0
        _draw_bar(axes, b, names.index(b.name) + shift, 0.38 if both else 0.62, reach)
    axes.set_yticks(range(len(names)), [safe_text(n, 36) for n in names])
    axes.invert_yaxis()
    low = axes.get_xlim()[0] if any(b.host_bytes for b in bars) else 0.0
    axes.set_xlim(low, reach / GIB * 1.22)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")


def _reach(totals: Sequence[float], usable: float | None) -> float:
    """Where the axis ends: at the longest bar, unless that would press all others together."""
    longest = max(totals)
    if usable is None or longest < _MOST_TIMES_USABLE * usable:
        return longest
    ordinary = [t for t in totals if t < _MOST_TIMES_USABLE * usable]
    return max([*ordinary, usable]) * 1.15


def _draw_bar(axes: "Axes", b: MemoryBar, y: float, thickness: float, reach: float) -> None:
    # Host memory is another memory: it grows to the left, away from the GPU's capacity.
    amounts = (b.weights_bytes, b.state_bytes, b.rest_bytes or 0.0, -b.host_bytes)
    left = 0.0
    for (part, colour, hatch), amount in zip(PARTS, amounts, strict=True):
        width = amount if amount < 0 else min(amount, reach - left)
        if width == 0:
            continue
        axes.barh(
            y,
            width / GIB,
            left=left / GIB if amount > 0 else 0.0,
            height=thickness,
            color=colour,
            hatch=hatch,
            edgecolor="black" if b.side == "observed" else GREY,
            linewidth=1.2 if b.side == "observed" else 0.6,
            gid=f"{b.side}:{part}",
        )
        left += max(width, 0.0)
    is_cut = b.total_bytes > reach
    notes = [f"{'» ' if is_cut else ''}{format_bytes(b.total_bytes)}"]
    notes += [f"({b.phase})"] if b.phase else ["(without the peak, which is unknown)"]
    notes += ["observed"] if b.side == "observed" else []
    axes.annotate(
        " ".join(notes),
        (left / GIB, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=GREY,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
    )


def _draw_capacity(axes: "Axes", hardware: HardwareProfile, memory_fraction: float) -> None:
    usable = hardware.memory_bytes * memory_fraction / GIB
    label = f"usable: {memory_fraction:.0%} of {hardware.memory_bytes / GIB:.1f} GiB"
    right = axes.get_xlim()[1]
    if usable > _FAR_CAPACITY * right:
        # A line far away would press the bars together: the words are enough.
        axes.annotate(
            f"{label}, far to the right",
            (1.0, 1.0),
            xycoords="axes fraction",
            xytext=(-4, -9),
            textcoords="offset points",
            ha="right",
            color="#D55E00",
            fontsize=7.5,
        )
        return
    axes.axvline(usable, color="#D55E00", linewidth=1.4, linestyle="--", gid="capacity")
    axes.annotate(
        label,
        (usable, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4, -9),
        textcoords="offset points",
        ha="right",
        color="#D55E00",
        fontsize=7.5,
    )
    axes.set_xlim(right=max(axes.get_xlim()[1], usable * 1.25))


def _legend(figure: "Figure", bars: Sequence[MemoryBar]) -> None:
    from matplotlib.patches import Patch

    used: list[Any] = [
        any(b.weights_bytes for b in bars),
        any(b.state_bytes for b in bars),
        any(b.rest_bytes for b in bars),
        any(b.host_bytes for b in bars),
    ]
    handles: list[Any] = [
        Patch(facecolor=colour, hatch=hatch, edgecolor=GREY, label=part)
        for (part, colour, hatch), is_used in zip(PARTS, used, strict=True)
        if is_used
    ]
    if len({b.side for b in bars}) > 1:
        handles.append(Patch(facecolor="none", edgecolor=GREY, linewidth=0.6, label="predicted"))
        handles.append(
            Patch(facecolor="none", edgecolor="black", linewidth=1.4, label="observed (black edge)")
        )
    legend_below(figure, handles)

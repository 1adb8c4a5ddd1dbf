"""Legends that say method, level, and what rings, dots, bands and crosses mean."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from reports.figures.style import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE_FROM_INCHES = 7.0
#: Names longer than this make a legend wider than its figure with four columns.
_LONG_NAME = 30


def handles_of(axes: "Iterable[Axes]") -> dict[str, Any]:
    """The first line of every label, in drawing order."""
    handles: dict[str, Any] = {}
    for ax in axes:
        for line in ax.get_lines():
            label = str(line.get_label())
            if not label.startswith("_"):
                handles.setdefault(label, line)
    return handles


def ring(label: str = "ring: predicted") -> Any:
    """Legend entry of predicted points."""
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], linestyle="none", color=GREY, marker="o", markerfacecolor="none", label=label
    )


def dot(label: str = "dot: observed") -> Any:
    """Legend entry of observed points."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", color=GREY, marker="o", markersize=3.5, label=label)


def bar(label: str) -> Any:
    """Legend entry of a short bar."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=GREY, linewidth=2.0, label=label)


def cross(label: str) -> Any:
    """Legend entry of a cross."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", color=GREY, marker="x", label=label)


def band(label: str) -> Any:
    """Legend entry of a shaded band."""
    from matplotlib.patches import Patch

    return Patch(facecolor=GREY, alpha=0.15, label=label)


def legend_below(figure: "Figure", handles: Iterable[Any]) -> None:
    """One legend under all axes, in as many columns as the names allow."""
    handles = list(handles)
    if not handles:
        return
    longest = max(len(str(h.get_label())) for h in handles)
    columns = 4 if figure.get_figwidth() >= WIDE_FROM_INCHES else 2
    if longest > _LONG_NAME:
        columns = max(1, columns // 2)
    figure.legend(handles=handles, loc="outside lower left", ncols=columns)

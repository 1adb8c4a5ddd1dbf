"""Puts labels beside points so that none covers another label or a point."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

#: Where a label may stand, in points from its anchor, with its alignment; best first.
AROUND = (
    *((7, 4, "left"), (7, -10, "left"), (-7, 4, "right"), (-7, -10, "right")),
    *((0, 8, "center"), (0, -15, "center"), (9, 14, "left"), (9, -20, "left")),
    *((-9, 14, "right"), (-9, -20, "right"), (0, 20, "center"), (0, -27, "center")),
)
ABOVE = ((4, 3, "left"),)
BELOW = ((4, -10, "left"),)


class Placer:
    """Knows which parts of some axes are taken.

    Make it last, when limits, points and other texts stand: it lays the figure out once. A label
    that finds no room is left out: a figure that says less is better than one nobody can read.
    """

    def __init__(self, axes: "Axes", points: Iterable[tuple[float, float]] = ()) -> None:
        from matplotlib.transforms import Bbox

        figure: Any = axes.get_figure()
        figure.draw_without_rendering()
        self._axes = axes
        self._renderer = figure.canvas.get_renderer()
        self._inside = axes.get_window_extent(self._renderer)
        self._taken: list[Bbox] = [
            t.get_window_extent(self._renderer) for t in axes.texts if t.get_text()
        ]
        half = 3.5 * figure.dpi / 72.0
        for x, y in axes.transData.transform(list(points) or [(1.0, 1.0)]):
            self._taken.append(Bbox.from_extents(x - half, y - half, x + half, y + half))

    def place(
        self,
        anchors: Sequence[tuple[float, float]],
        text: str,
        offsets: Sequence[tuple[float, float, str]] = AROUND,
        **style: Any,
    ) -> Any | None:
        """Write ``text`` beside the first anchor that has room; returns it, or None."""
        for anchor in anchors:
            for dx, dy, align in offsets:
                note = self._axes.annotate(
                    text,
                    anchor,
                    xytext=(dx, dy),
                    textcoords="offset points",
                    ha=align,
                    # Legible across the lines it may cross.
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.4},
                    zorder=6,
                    **style,
                )
                # Room found here must not change the layout it was found in.
                note.set_in_layout(False)
                box = note.get_window_extent(self._renderer)
                if self._is_free(box):
                    self._taken.append(box)
                    return note
                note.remove()
        return None

    def _is_free(self, box: "Bbox") -> bool:
        outer = self._inside
        fits_x = outer.x0 <= box.x0 and box.x1 <= outer.x1
        fits_y = outer.y0 <= box.y0 and box.y1 <= outer.y1
        return fits_x and fits_y and not any(box.overlaps(other) for other in self._taken)

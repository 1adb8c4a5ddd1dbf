"""Figures as small PNGs for a page."""

import io
from typing import TYPE_CHECKING, Any

from reports.figures.style import house_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Line art has few colours: a palette of this many is a quarter of the bytes and looks the same.
_COLOURS = 64


def small_png(figure: "Figure", dpi: float = 115.0) -> tuple[bytes, int, int]:
    """A palette PNG with its width and height in pixels; the same figure gives the same bytes."""
    from PIL import Image

    raw = io.BytesIO()
    with house_style():
        figure.savefig(raw, format="png", dpi=dpi, metadata={"Software": None})
    image: Any = Image.open(raw).convert("RGB")
    palette = image.quantize(colors=_COLOURS, dither=Image.Dither.NONE)
    out = io.BytesIO()
    palette.save(out, format="PNG", optimize=True)
    return out.getvalue(), int(image.width), int(image.height)

"""Words for a point: short, safe to print, the same in tables, figures and the page."""

import math
import unicodedata
from collections.abc import Iterable, Sequence

from costmodel.units import format_bytes, format_seconds, format_si
from reports.records import Row

#: What people read for a metric, with the axis unit of its base.
METRIC_TITLES = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "state_bytes": "state",
    "state_host_bytes": "host state",
    "weights_bytes": "weights",
    "peak_prefill_bytes": "peak of prefill",
    "peak_decode_bytes": "peak of decode",
    "executed_prefill_flops": "executed prefill FLOPs",
    "executed_decode_flops": "executed decode FLOPs",
    "energy_j_per_token": "energy per token",
}

#: Fields that name a point to a reader, in the order they are said.
POINT_FIELDS = (
    *("method_spec", "level", "context_tokens", "batch", "output_tokens", "tp", "layers"),
    *("model", "gpu", "engine", "dtype", "weight_dtype"),
)
_SPOKEN = {"batch": "batch", "output_tokens": "output", "tp": "TP", "layers": "layers"}


def safe_text(text: str, width: int | None = None) -> str:
    """Text without control or direction characters, cut in the middle to ``width``.

    Names come from files: an escape sequence must not reach a terminal, and a name of a thousand
    characters must not push a figure off its page.
    """
    shown = text
    if not text.isprintable():
        shown = "".join("\N{REPLACEMENT CHARACTER}" if _is_control(c) else c for c in text)
    if width is not None and len(shown) > width:
        head = (width - 1) // 2
        shown = shown[:head] + "\N{HORIZONTAL ELLIPSIS}" + shown[len(shown) - (width - 1 - head) :]
    return shown


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def tokens(value: float | None) -> str:
    """A token count as people say it: 32k, 1M, otherwise exact."""
    if value is None or not math.isfinite(value):
        return "-"
    for suffix, size in (("M", 1024**2), ("k", 1024)):
        if value >= size and value % size == 0:
            return f"{value / size:.0f}{suffix}"
    return f"{value:,.0f}"


def varying_fields(rows: Iterable[Row]) -> tuple[str, ...]:
    """Fields of a point that are not the same in all rows, and the context always."""
    rows = list(rows)
    return tuple(
        f
        for f in POINT_FIELDS
        if f == "context_tokens" or len({str(r.values.get(f)) for r in rows}) > 1
    )


def point(row: Row, fields: Sequence[str] = POINT_FIELDS, width: int = 32) -> str:
    """Name one point in a line by the given fields."""
    parts = []
    for name in fields:
        text = row.device if name == "gpu" else row.text(name)
        if not text:
            continue
        if name == "context_tokens":
            text = f"context {tokens(row.number(name))}"
        elif name in _SPOKEN:
            text = f"{_SPOKEN[name]} {tokens(row.number(name))}"
        parts.append(safe_text(text, width))
    return ", ".join(parts)


def metric_value(metric: str, value: float | None) -> str:
    """A value in the unit that reads best."""
    if value is None:
        return "-"
    if metric.endswith("_bytes"):
        return format_bytes(value)
    if metric.endswith("_s"):
        return format_seconds(value)
    if metric.endswith("_flops"):
        return format_si(value, "FLOP")
    return format_si(value, "J") if "_j_" in metric else f"{value:.4g}"


def percent(value: float | None, signed: bool = False) -> str:
    """A percentage with the digits that matter; exact zero is said as such."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0 %"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 0.95 else 2
    sign = "+" if signed else ""
    return f"{value:{sign}.{digits}f} %"

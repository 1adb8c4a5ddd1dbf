"""Unit constants and the only conversions to text.

Inside lccost everything is bytes, FLOPs, seconds, tokens, joules and US dollars as float64.
Nothing is converted except here, when it is shown or read from a person.
"""

import math
import re

KIB, MIB, GIB = 1024.0, 1024.0**2, 1024.0**3
KB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12

# Element sizes of storage types, in bytes. Scales and zero points are counted by their users.
DTYPE_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5,
    "fp4": 0.5,
}

_COUNT = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(k|ki|m|mi|g|gi)?\s*$", re.IGNORECASE)
_MOST = 2**50
_FACTOR = {"": 1, "k": 1024, "ki": 1024, "m": 1024**2, "mi": 1024**2, "g": 1024**3, "gi": 1024**3}


def parse_count(text: str) -> int:
    """Read a token or batch count: ``8k`` is 8,192, ``1m`` is 1,048,576, plain integers are exact.

    Raises ``ValueError`` for anything that is not a whole positive number.
    """
    match = _COUNT.match(text.replace("_", ""))
    if match is None:
        raise ValueError(f"expected a whole number such as 4096, 8k or 1m, got {text[:60]!r}")
    value = float(match[1]) * _FACTOR[(match[2] or "").lower()]
    if value > _MOST:
        raise ValueError(f"expected at most {_MOST:,}, got {text[:60]!r}")
    if value < 1 or value != int(value):
        raise ValueError(f"expected a whole number of at least 1, got {text[:60]!r}")
    return int(value)


def format_bytes(value: float | None) -> str:
    """Memory in use, in binary units (``16.00 GiB``)."""
    if value is None or not math.isfinite(value):
        return "-"
    for unit, size in (("TiB", 1024.0**4), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def format_traffic(value: float | None) -> str:
    """Bytes moved, in decimal units (``32.19 GB``), as bandwidth figures are."""
    return format_si(value, "B")


def format_si(value: float | None, unit: str) -> str:
    """A number with an SI prefix, three or four significant digits."""
    if value is None or not math.isfinite(value):
        return "-"
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def format_seconds(value: float | None) -> str:
    """A time in the unit that reads best."""
    if value is None or not math.isfinite(value):
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 else f"{value:.0f} s"
    return f"{value * 1e9:.3g} ns"

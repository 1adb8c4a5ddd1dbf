"""Whether a point is predicted to fit the memory at hand, and by which limit that was decided."""

from collections.abc import Mapping
from typing import Any

from measure.available_memory import Available, available_memory

#: A point that needs more than this share of the free memory is not started.
MEMORY_FRACTION = 0.9
SKIPPED = "skipped_oom_predicted"


def needed_bytes(predicted: Mapping[str, Any] | None, device: str) -> float | None:
    """The larger of both predicted peaks of one device, on a CPU with what a method keeps on the
    host; None where neither peak is known.
    """
    row = predicted or {}
    known = [row[k] for k in ("peak_prefill_bytes", "peak_decode_bytes") if row.get(k)]
    if not known:
        return None
    return float(max(known) + ((device == "cpu" and row.get("state_host_bytes")) or 0))


def checked(needed: float | None, available: Available | None) -> dict[str, Any]:
    """Keys of a record: ``memory_check`` says what was compared (null where either is unknown);
    status and message besides where the point must not start.
    """
    if needed is None or available is None:
        return {"memory_check": None}
    check = {
        "needed_bytes": needed,
        "available_bytes": available.bytes,
        "limit": available.limit,
        "fraction": MEMORY_FRACTION,
    }
    if needed <= MEMORY_FRACTION * available.bytes:
        return {"memory_check": check}
    return {
        "memory_check": check,
        "status": SKIPPED,
        "message": f"predicted to need {_gib(needed)}; {available.limit} leaves "
        f"{_gib(available.bytes)}, of which {MEMORY_FRACTION:.0%} may be used; --force runs it "
        "anyway",
    }


def host_check(needed: float | None, *, ranks: int) -> dict[str, Any]:
    """``checked`` for processes that share this machine's memory."""
    return checked(None if needed is None else ranks * needed, available_memory())


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.3g} GiB"

"""What other work does to the machine while something is measured. Linux; elsewhere unknown."""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
#: Columns of /proc/stat's cpu line that are use: user, nice, system, irq, softirq, steal.
_BUSY = (0, 1, 2, 5, 6, 7)


@dataclass(frozen=True, slots=True)
class _Reading:
    wall_s: float
    busy_s: float
    own_s: float
    involuntary_switches: int


class ForeignLoad:
    """CPU use that is not this process's, between ``start`` and now, in cores.

    The kernel counts in ticks (10 ms); over a short span two ticks of doubt are subtracted.
    """

    def __init__(self) -> None:
        self._start = _read()

    def start(self) -> None:
        """Begin a new span."""
        self._start = _read()

    def foreign_cores(self) -> float:
        """Cores others used since ``start``; 0 where the system does not say."""
        now, then = _read(), self._start
        wall = max(now.wall_s - then.wall_s, 1e-9)
        doubt = 2.0 / os.sysconf("SC_CLK_TCK")
        busy = now.busy_s - then.busy_s
        return max(0.0, busy - (now.own_s - then.own_s) - doubt) / wall

    def involuntary_switches(self) -> int:
        """Count how often the kernel took the processor away since ``start``."""
        return _read().involuntary_switches - self._start.involuntary_switches


def _read() -> _Reading:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return _Reading(
        wall_s=time.perf_counter(),
        busy_s=_busy_seconds(),
        own_s=usage.ru_utime + usage.ru_stime,
        involuntary_switches=usage.ru_nivcsw,
    )


def _busy_seconds() -> float:
    try:
        first = _STAT.read_text("ascii").split("\n", 1)[0].split()
    except OSError:
        return 0.0
    ticks = [int(x) for x in first[1:]]
    return sum(ticks[i] for i in _BUSY if i < len(ticks)) / os.sysconf("SC_CLK_TCK")


def idle_ticks() -> dict[int, int]:
    """Idle ticks of every processor since the machine started; nothing where it does not say."""
    try:
        lines = _STAT.read_text("ascii").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith("cpu") and line[3:4].isdigit())
    return {int(f[0][3:]): int(f[4]) for f in fields}

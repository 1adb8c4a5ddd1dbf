"""A CPU: the thread's own clock (or the gated wall clock), resident memory, RAPL."""

import os
import time
from pathlib import Path
from typing import Any

import torch

from measure.available_memory import available_memory_bytes
from measure.canary import canary_s
from measure.devices.base import AbstractDevice, Call, Captured, Peaks
from measure.devices.energy import EnergySource, Unavailable
from measure.devices.rapl import open_rapl
from measure.load import ForeignLoad, idle_ticks
from measure.timing import Sampler

#: Other work on the machine, in cores, above which a record warns.
FOREIGN_CORES = 0.10
#: How long processors are watched before the idlest are chosen: a few of the kernel's ticks.
IDLE_SPAN_S = 0.05
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class CpuDevice(AbstractDevice):
    """``threads`` compute threads, kept on as many processors where the system lets us.

    Not ``pinned`` is one of several processes of a point: what the others do is no foreign load,
    and cannot be told from it.
    """

    name = "cpu"
    device = torch.device("cpu")

    def __init__(self, threads: int, *, pinned: bool = True) -> None:
        self.threads, self._alone = threads, pinned
        self.processors = pin(threads) if pinned else None
        torch.set_num_threads(threads)
        self._load = ForeignLoad()
        self._peaks_reset = False

    def sampler(self) -> Sampler:
        """The thread's CPU time with one thread, the gated wall clock with more."""
        return Sampler.for_cpu(self.threads)

    def synchronize(self) -> None:
        """A CPU is done when a call returns."""

    def canary_s(self) -> float:
        """Median of a small product and a sum."""
        return canary_s()

    def start_peaks(self) -> None:
        """Reset the kernel's high-water mark, where it lets us."""
        try:
            _CLEAR.write_text("5", "ascii")
            self._peaks_reset = True
        except OSError:
            self._peaks_reset = False

    def peaks(self) -> Peaks:
        """Resident memory, libraries included; what tensors need is counted apart."""
        peak = resident_peak_bytes() if self._peaks_reset else None
        return Peaks(allocated=None, reserved=None, in_use=peak)

    def available_bytes(self) -> int | None:
        """What can be had without swapping."""
        return available_memory_bytes()

    def flush(self, working_set_bytes: int) -> Call | None:
        """None: models are larger than the caches, or are meant to be in them."""

    def capture(self, call: Call, before: Call) -> Captured:
        """There are no graphs."""
        return Captured(replay=None, reason="a CPU has no launches to capture")

    def energy_source(self) -> EnergySource | Unavailable:
        """RAPL, where readable."""
        return open_rapl()

    def start_watching(self) -> None:
        """Begin counting what others use."""
        self._load.start()

    def watched(self) -> tuple[dict[str, Any], list[str]]:
        """Cores that others used (None: unknown), and how often the processor was taken away."""
        foreign = self._load.foreign_cores() if self._alone else None
        warnings = []
        if foreign is not None and foreign > FOREIGN_CORES:
            warnings.append(f"other work used {foreign:.2f} cores meanwhile")
        return {
            "foreign_cores": foreign,
            "involuntary_switches": self._load.involuntary_switches(),
            "processors": self.processors,
        }, warnings


def pin(threads: int) -> list[int] | None:
    """Keep this process on the ``threads`` processors that are idlest now; None where that cannot
    be done.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    before = idle_ticks()
    time.sleep(IDLE_SPAN_S)
    after = idle_ticks()
    idle = {c: after.get(c, 0) - before.get(c, 0) for c in allowed}
    chosen = sorted(sorted(allowed, key=lambda c: (-idle[c], -c))[:threads])
    try:
        os.sched_setaffinity(0, chosen)
    except OSError:
        return None
    return chosen


def resident_peak_bytes() -> int | None:
    """Most memory this process had resident since the mark was reset."""
    try:
        lines = _STATUS.read_text("ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None

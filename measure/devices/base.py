"""What observing a point needs of a device."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from measure.devices.energy import EnergySource, Unavailable
from measure.timing import Sampler

Call = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """Most memory since ``start_peaks``, bytes; None where it cannot be known.

    allocated  tensors, as the framework's allocator hands them out
    reserved   what that allocator took from the driver (fragmentation and caching included)
    in_use     what the driver or the kernel says is taken: contexts, libraries, other processes
    overhead   of it, what this process takes beside ``reserved``: context, libraries' workspaces
    """

    allocated: int | None
    reserved: int | None
    in_use: int | None
    overhead: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A captured graph to replay, or why there is none.

    failed  an error was the reason, which may have left something behind in the process
    """

    replay: Call | None
    reason: str
    failed: bool = False


class AbstractDevice(ABC):
    """One device, opened in the process that runs the point.

    name     as the user wrote it
    device   as torch calls it
    """

    name: str
    device: torch.device
    #: whether calls can be captured and replayed
    has_graphs = False

    @abstractmethod
    def sampler(self) -> Sampler:
        """How calls are timed here."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything asked for is done."""

    @abstractmethod
    def canary_s(self) -> float:
        """Seconds of a fixed piece of work: has the device changed speed?"""

    @abstractmethod
    def start_peaks(self) -> None:
        """Forget earlier peaks."""

    @abstractmethod
    def peaks(self) -> Peaks:
        """Peaks since ``start_peaks``."""

    @abstractmethod
    def available_bytes(self) -> int | None:
        """Memory that could be allocated now."""

    @abstractmethod
    def flush(self, working_set_bytes: int) -> Call | None:
        """Return what empties the caches between samples, or None where the call's own working
        set does.
        """

    @abstractmethod
    def capture(self, call: Call, before: Call) -> Captured:
        """Capture ``call`` as a graph; ``before`` puts things back, outside of it."""

    @abstractmethod
    def energy_source(self) -> EnergySource | Unavailable:
        """Return an energy counter of this device, or why there is none."""

    @abstractmethod
    def start_watching(self) -> None:
        """Begin to watch clocks, throttling and other users."""

    @abstractmethod
    def watched(self) -> tuple[dict[str, Any], list[str]]:
        """(figures for a record's ``quality``, warnings) since ``start_watching``."""

"""An NVIDIA GPU: events for time, graphs for decode, the allocator's and the driver's memory.

``torch.cuda`` is only ever called once it says that it is available: without a driver some of its
calls answer 0, and a 0 must not become a result.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from costmodel.errors import MissingExtraError
from measure.devices.base import AbstractDevice, Call, Captured, Peaks
from measure.devices.energy import EnergySource, Unavailable
from measure.devices.names import cuda_index
from measure.devices.nvml import CHANGING, SLOWING, Nvml, open_nvml
from measure.timing import Sampler

#: Driver's memory in use before this process had a context, by device.
_USED_BEFORE: dict[str, int | None] = {}
#: A working set of so many L2 caches leaves nothing of the last call in the cache.
SELF_FLUSHING = 4
_CANARY_REPEATS = 5
_WARM_CALLS = 3  # before a capture: libraries make their workspaces on the first calls


class EventStopwatch:
    """Time on the GPU between two events around a call; and the host's until the call returned."""

    def __init__(self, cuda: Any, host: Callable[[], float] = time.perf_counter) -> None:
        self._cuda, self._host = cuda, host
        self._first, self._last = (cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> tuple[float, float]:
        """Start with an idle GPU, so that host time that nothing hides is part of the figure."""
        self._cuda.synchronize()
        start = self._host()
        self._first.record()
        call()
        self._last.record()
        host_s = self._host() - start
        self._last.synchronize()
        return self._first.elapsed_time(self._last) / 1e3, host_s


class CudaDevice(AbstractDevice):
    """One GPU; ``cuda`` and ``nvml`` stand in for ``torch.cuda`` and the driver."""

    has_graphs = True

    def __init__(self, name: str, cuda: Any = None, nvml: Nvml | Unavailable | None = None) -> None:
        self._cuda = torch.cuda if cuda is None else cuda
        index = cuda_index(name)
        assert index is not None
        if not self._cuda.is_available():
            raise MissingExtraError(f"{name}: PyTorch finds no CUDA device here; lccost doctor")
        if index >= self._cuda.device_count():
            raise MissingExtraError(
                f"{name}: there are {self._cuda.device_count()} CUDA devices here"
            )
        self.name = f"cuda:{index}"
        self.device = torch.device(self.name)
        self.properties = self._cuda.get_device_properties(index)
        self.nvml = _nvml_of(self.properties) if nvml is None else nvml
        if self.name not in _USED_BEFORE:
            _USED_BEFORE[self.name] = self._used()
        self._cuda.set_device(index)
        self._flushed: torch.Tensor | None = None
        self._before: dict[str, Any] = {}
        self._others: list[dict[str, Any]] = []

    def sampler(self) -> Sampler:
        """Events; the clock (for what is not a GPU call) waits for the GPU before it is read."""
        return Sampler(
            name="cuda_events", clock=self._settled, stopwatch=EventStopwatch(self._cuda)
        )

    def _settled(self) -> float:
        self._cuda.synchronize()
        return time.perf_counter()

    def synchronize(self) -> None:
        """Wait for the GPU."""
        self._cuda.synchronize()

    def canary_s(self) -> float:
        """Median of a 2048-cubed bf16 product and a sum over 64 MiB: small, because it runs beside
        whatever a point holds.
        """
        matrix = torch.ones(2048, 2048, dtype=torch.bfloat16, device=self.device)
        memory = torch.ones(2**24, device=self.device)
        stopwatch = EventStopwatch(self._cuda)

        def work() -> None:
            torch.mm(matrix, matrix)
            memory.sum()

        samples = [stopwatch(work)[0] for _ in range(_CANARY_REPEATS + 2)]
        return sorted(samples[2:])[_CANARY_REPEATS // 2]

    def start_peaks(self) -> None:
        """Start both of the allocator's peaks over."""
        self._cuda.synchronize()
        self._cuda.reset_peak_memory_stats()

    def peaks(self) -> Peaks:
        """Tensors, the allocator's segments, and what the driver says is in use on the GPU."""
        self._cuda.synchronize()
        reserved, in_use = self._cuda.max_memory_reserved(), self._used()
        # the buffer that flushes the cache belongs to the measuring, not to the point
        own = 0 if self._flushed is None else self._flushed.nbytes
        before = _USED_BEFORE[self.name]
        overhead = None
        if in_use is not None and before is not None:
            overhead = max(0, in_use - before - self._cuda.memory_reserved())
        return Peaks(
            allocated=self._cuda.max_memory_allocated() - own,
            reserved=reserved - own,
            in_use=in_use,
            overhead=overhead,
        )

    def _used(self) -> int | None:
        memory = self.nvml.read("memory") if isinstance(self.nvml, Nvml) else None
        return None if memory is None else memory["used"]

    def available_bytes(self) -> int | None:
        """Free for the driver, and free inside the allocator's segments."""
        free, _ = self._cuda.mem_get_info()
        return int(free + self._cuda.memory_reserved() - self._cuda.memory_allocated())

    def flush(self, working_set_bytes: int) -> Call | None:
        """Overwrite as much as the L2 cache holds, unless the call itself does that many times."""
        l2 = int(self.properties.L2_cache_size)
        if working_set_bytes >= SELF_FLUSHING * l2:
            return None
        if self._flushed is None:
            self._flushed = torch.empty(2 * l2, dtype=torch.int8, device=self.device)
        return self._flushed.zero_

    def capture(self, call: Call, before: Call) -> Captured:
        """Capture on a side stream, after some calls there; whatever cannot be captured says why
        (a wait for the GPU, an allocation outside of the allocator, a changing shape).

        Memory the call makes comes from a pool of the graph's own, so that replays find it where
        it was; it is given back with the graph.
        """
        usual, stream = self._cuda.current_stream(), self._cuda.Stream()
        stream.wait_stream(usual)
        with self._cuda.stream(stream):
            for _ in range(_WARM_CALLS):
                before()
                call()
            before()
        usual.wait_stream(stream)
        graph = self._cuda.CUDAGraph()
        try:
            # the context waits for the GPU before it begins
            with self._cuda.graph(graph, stream=stream):
                call()
            before()
            graph.replay()
            self._cuda.synchronize()
        except RuntimeError as error:
            # a capture that fails leaves its stream current (torch.cuda.graph.__exit__)
            self._cuda.set_stream(usual)
            return Captured(replay=None, reason=_first_line(error), failed=True)
        return Captured(replay=graph.replay, reason="")

    def energy_source(self) -> EnergySource | Unavailable:
        """The driver's counter."""
        return self.nvml.energy_source() if isinstance(self.nvml, Nvml) else self.nvml

    def start_watching(self) -> None:
        """Remember clocks, power, temperature and users of the GPU before the work."""
        self._before = self._state()

    def watched(self) -> tuple[dict[str, Any], list[str]]:
        """The state before and after, why the driver slowed the GPU, and who else used it."""
        if isinstance(self.nvml, Unavailable):
            return {"gpu": None, "gpu_reason": self.nvml.reason}, []
        after = self._state()
        slowed = sorted(
            {r for x in (self._before, after) for r in x.get("event_reasons") or ()} & SLOWING
        )
        warnings = [f"the driver slowed the GPU: {', '.join(slowed)}"] if slowed else []
        others = _others(after.get("processes"))
        if others:
            warnings.append(f"{others} other processes had the GPU open")
        return {
            "gpu": {"before": self._before, "after": after},
            "slowed_by": slowed,
            "other_gpu_processes": others,
            "nvml_missing": dict(self.nvml.reasons),
        }, warnings

    def _state(self) -> dict[str, Any]:
        return self.nvml.facts(CHANGING) if isinstance(self.nvml, Nvml) else {}


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _others(processes: list[dict[str, Any]] | None) -> int | None:
    """Processes on the GPU besides this one (whose id NVML may give as the host sees it)."""
    return None if processes is None else max(0, len(processes) - 1)


def _nvml_of(properties: Any) -> Nvml | Unavailable:
    """Match by UUID: CUDA and NVML number GPUs differently."""
    bus = [getattr(properties, f"pci_{x}_id", None) for x in ("domain", "bus", "device")]
    bus_id = None if None in bus else f"{bus[0]:08x}:{bus[1]:02x}:{bus[2]:02x}.0"
    uuid = getattr(properties, "uuid", None)
    if uuid is None and bus_id is None:
        return Unavailable("this PyTorch does not give the GPU's UUID")
    return open_nvml(str(uuid), bus_id=bus_id)

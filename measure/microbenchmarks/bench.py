"""The one way anything is timed in a calibration, its rotating memory, and its results."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from measure.devices.base import AbstractDevice
from measure.engine import TORCH_DTYPES
from measure.microbenchmarks.plan import Plan
from measure.timing import Budget

#: One sample of a hot call lasts at least this long: the call is repeated inside it.
_SAMPLE_S = 3e-3
#: Read before every sample of a cold call: about what a layer's matrices are, which in a pass have
#: driven what is timed out of the core's own cache.
_EVICTED_BYTES = 2**24
#: The same for a recurrent state or a small cache, which a pass meets again only after all weights:
#: beyond the part of a shared last-level cache that one core gets.
_FAR_BYTES = 2**27
#: Elements of the random block that the pool repeats.
_BLOCK = 2**18

#: (x, seconds per unit of work, relative spread)
CurvePoint = tuple[float, float, float]


@dataclass(slots=True)
class Results:
    """Curves by name, and the best rates seen, which stand for the device's peaks."""

    points: dict[str, dict[float, tuple[float, float]]] = field(default_factory=dict)
    flops_per_s: dict[str, float] = field(default_factory=dict)
    cold_bytes_per_s: float = 0.0
    host_link_bytes_per_s: float | None = None

    @property
    def curves(self) -> dict[str, dict[str, Any]]:
        """By name, as a profile has them: x rises."""
        return {
            name: {
                "x": sorted(points),
                "y": [float(f"{points[x][0]:.6g}") for x in sorted(points)],
                "spread": round(max(spread for _, spread in points.values()), 4),
            }
            for name, points in self.points.items()
        }

    def add(self, name: str, points: Sequence[CurvePoint]) -> None:
        """Add points to a curve."""
        for point in points:
            self.add_point(name, point)

    def add_point(self, name: str, point: CurvePoint) -> None:
        """Add one; a size that was measured before is replaced."""
        self.points.setdefault(name, {})[float(point[0])] = (point[1], point[2])

    def saw_flops(self, dtype: str, flops_per_s: float) -> None:
        """Remember the best compute rate of a type."""
        self.flops_per_s[dtype] = max(self.flops_per_s.get(dtype, 0.0), flops_per_s)

    def saw_cold_bytes(self, bytes_per_s: float) -> None:
        """Remember the best rate at which cold memory was read."""
        self.cold_bytes_per_s = max(self.cold_bytes_per_s, bytes_per_s)


class Bench:
    """A plan with a clock and a pool."""

    def __init__(self, plan: Plan, device: AbstractDevice) -> None:
        self.plan = plan
        self.results = Results()
        self.sampler = device.sampler()
        self.budget = Budget(
            seconds=plan.seconds,
            min_samples=5,
            least_samples=3,
            max_samples=50,
            min_warmups=1,
            max_warmups=2,
            warmup_seconds=plan.seconds,
        )
        far = torch.ones(_FAR_BYTES // 4)
        # a GPU has one cache, and says how to empty it
        self._leave = device.flush(0) or far[: _EVICTED_BYTES // 4].sum
        self._leave_far = device.flush(0) or far.sum
        self._pool_dtype = ""
        self._pool = torch.empty(0)

    def cold(self, call: Callable[[], object]) -> tuple[float, float]:
        """Median seconds of one call after other memory was read, and half its relative IQR."""
        timing = self.sampler.time(call, before=self._leave, budget=self.budget)
        return timing.statistics.median_s, timing.statistics.iqr_fraction / 2

    def streaming(self, call: Callable[[], object]) -> tuple[float, float]:
        """Return the same for a call on rotating weights, one right after the other.

        As in a pass, where weights follow weights: reading anything else between the samples made
        a GEMV 10 to 30 % slower than inside decoders of 0.15 to 1.2 GB, which all took the same.
        """
        timing = self.sampler.time(call, budget=self.budget)
        return timing.statistics.median_s, timing.statistics.iqr_fraction / 2

    def far(self, call: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
        """Return the same for data that a pass meets again only after all its weights.

        ``other`` is the same call on other data, made in between: what runs once in every layer has
        its code and tables at hand, but not its state.
        """

        def before() -> None:
            self._leave_far()
            other()

        timing = self.sampler.time(call, before=before, budget=self.budget)
        return timing.statistics.median_s, timing.statistics.iqr_fraction / 2

    def hot(self, call: Callable[[], object]) -> tuple[float, float]:
        """Return the same for a call that is repeated at once."""
        start = self.sampler.clock()
        call()
        inner = max(1, int(_SAMPLE_S / max(self.sampler.clock() - start, 1e-7)))

        def repeated() -> None:
            for _ in range(inner):
                call()

        found = self.sampler.time(repeated, budget=self.budget).statistics
        return found.median_s / inner, found.iqr_fraction / 2

    def rotating(self, dtype: str, *shape: int) -> Iterator[Tensor]:
        """Tensors of a shape, endlessly, each elsewhere in the pool than the last.

        Their places differ by cache lines within a page too, as those of separate tensors do.
        """
        pool = self._filled_pool(dtype)
        size = torch.Size(shape).numel()
        line = 64 // pool.itemsize
        starts = range(0, pool.numel() - size - 64 * line + 1, size)
        for index, start in enumerate(itertools.cycle(starts)):
            place = start + line * (index * 7 % 64)
            yield pool[place : place + size].view(shape)

    def fits(self, dtype: str, elements: int) -> bool:
        """Whether the pool holds at least two such buffers."""
        return 2 * elements * TORCH_DTYPES[dtype].itemsize < self.plan.pool_bytes - 2**16

    def _filled_pool(self, dtype: str) -> Tensor:
        """Random numbers of order 0.1, made once per type; the type before is let go."""
        if self._pool_dtype != dtype:
            self._pool = torch.empty(0)
            kind = TORCH_DTYPES[dtype]
            block = torch.randn(_BLOCK, generator=_generator()).mul_(0.1)
            self._pool = block.to(kind).repeat(self.plan.pool_bytes // (_BLOCK * kind.itemsize))
            self._pool_dtype = dtype
        return self._pool


def _generator() -> torch.Generator:
    return torch.Generator(device=torch.get_default_device()).manual_seed(0)

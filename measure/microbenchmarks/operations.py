"""From what was timed to points of curves, through the cost model's own operations.

A microbenchmark builds the operation that the cost model would price for the shape it runs, so that
a curve is measured at the size and per the unit of work that it will be read at.
"""

from costmodel.architecture import MixerGroup
from costmodel.engines import load_engine
from costmodel.hardware import Curve, HardwareProfile
from costmodel.kernels.curve_sizes import measured
from costmodel.kernels.curves import curve_name, curve_time_s
from costmodel.mixers import AbstractMixer
from costmodel.operation import Operation, Operations
from costmodel.workload import Point
from measure.microbenchmarks.bench import Results


def point(dtype: str, batch: int, tokens: int) -> Point:
    """A prompt of ``tokens``, or a step after so many, on the torch engine."""
    return Point(
        batch=float(batch),
        prompt_tokens=float(tokens),
        cached_tokens=float(tokens),
        reserved_tokens=float(tokens + 1),
        dtype=dtype,
        kv_dtype=dtype,
        level="ideal",
        engine=load_engine("torch"),
    )


def group_of(mixer: AbstractMixer) -> MixerGroup:
    """One layer of ``mixer``: not among the first, which some methods leave alone."""
    return MixerGroup(mixer=mixer, n_layers=1, indices=(2,), n_kv_layers=3)


def named(operations: Operations, name: str) -> Operation:
    """The operation of that name."""
    return next(op for op in operations if op.name == name)


def add(
    results: Results, operation: Operation, seconds: float, spread: float, *, dtype: str | None
) -> None:
    """Add a point to the curve of the operation's own name; ``dtype`` None: it does not matter."""
    where = next(measured(operation))
    parameters = {k: float(v) for k, v in where.parameters.items()}
    name = curve_name(where.kind, dtype or "", **parameters)
    results.add_point(name, (float(where.size), seconds / float(where.work), spread))


def predicted_s(results: Results, operation: Operation) -> float:
    """Seconds by the curves measured so far; 0 where there are none."""
    time = curve_time_s(operation, _profile(results))
    return 0.0 if time is None else float(time.seconds)


def _profile(results: Results) -> HardwareProfile:
    """A profile of nothing but the curves: prices only what they cover."""
    return HardwareProfile(
        name="being-calibrated",
        title="being calibrated",
        vendor="",
        generation="",
        n_units=1,
        peak_flops_per_s={},
        hbm_bytes_per_s=1.0,
        memory_bytes=1.0,
        memory_marketing_bytes=1.0,
        l2_bytes=None,
        tdp_w=None,
        link_bytes_per_s=None,
        host_link_bytes_per_s=None,
        is_cpu=True,
        curves={
            name: Curve(x=tuple(c["x"]), y=tuple(c["y"]), spread=c["spread"])
            for name, c in results.curves.items()
        },
    )

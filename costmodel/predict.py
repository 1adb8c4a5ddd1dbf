"""The main entry: architecture, method, workload and hardware in, a Prediction out.

    predict(load_architecture("llama-3.1-8b"), "kivi:bits=2", Workload.of(1, [8192, 131072]),
            load_hardware("h100-sxm"))

Everything broadcasts: one call prices a whole sweep. Large workloads are evaluated in chunks that
stay in cache, so a million points need no more memory than their results.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from costmodel.architecture import Architecture
from costmodel.engines import Engine, load_engine
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.hardware import HardwareProfile
from costmodel.layout import (
    Execution,
    decode_operations,
    mixing_operations,
    prefill_operations,
    step_operations,
    total,
)
from costmodel.memory import largest_transient, memory_of, solve_max_batch, solve_max_context
from costmodel.methods.parse import parse_method
from costmodel.methods.stack import MethodStack
from costmodel.operation import Array, Operation, Operations
from costmodel.phase import (
    BOUNDS,
    Busy,
    PhaseTime,
    busy_of,
    collective_bytes,
    hbm_bytes,
    link_bytes,
    pass_time,
    peak_s,
)
from costmodel.power import decode_power_w
from costmodel.results import METRICS, Prediction
from costmodel.workload import Level, Point, Workload

#: Points evaluated at once: about 20 live arrays of this many float64 stay in a 2 MB L2 cache.
CHUNK_POINTS = 16384
PARALLEL_CHUNKS = 8
#: Up to here distinct batches are found by listing, not by sorting.
MOST_LISTED = 2**20
TP_CANDIDATES = (1, 2, 4, 8, 16, 32, 64)


_LAUNCH = BOUNDS.index("launch")

#: Metrics, bounds and shares of the bases of one chunk.
Evaluated = tuple[dict[str, Array], dict[str, NDArray[np.intp]], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a prediction is made; see ``lccost predict --help``."""

    dtype: str | None = None
    weight_dtype: str = "checkpoint"
    level: Level = "ideal"
    tp: int = 1
    engine: str | None = None
    memory_fraction: float = 0.9

    def __post_init__(self) -> None:
        if self.level not in ("ideal", "reference"):
            raise ConfigError(f"level: expected ideal or reference, got {self.level!r}")
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigError(f"memory fraction: expected (0, 1], got {self.memory_fraction}")
        if not isinstance(self.tp, int) or self.tp < 1:
            raise ConfigError(f"tp: expected a whole number of at least 1, got {self.tp!r}")


def predict(
    architecture: Architecture,
    method: str | MethodStack,
    workload: Workload,
    hardware: HardwareProfile,
    *,
    dtype: str | None = None,
    weight_dtype: str = "checkpoint",
    level: Level = "ideal",
    tp: int = 1,
    engine: str | None = None,
    memory_fraction: float = 0.9,
    solve: bool = True,
) -> Prediction:
    """Price one model, method and device over a workload.

    ``engine`` defaults to vllm for ``ideal`` and transformers for ``reference`` (torch on a CPU);
    naming one also uses the kernel families fitted for it, instead of the prior;
    ``dtype`` to the checkpoint's 16-bit type. ``solve=False`` skips ``max_batch``,
    ``max_context_tokens`` and ``min_gpus`` (NaN).

    Raises ``NotApplicableError`` where method, model and device do not go together,
    ``ConfigError`` for impossible options. Arrays in the result have ``workload.shape``.
    """
    options = Options(
        dtype=dtype,
        weight_dtype=weight_dtype,
        level=level,
        tp=tp,
        engine=engine,
        memory_fraction=memory_fraction,
    )
    model = Model.of(architecture, method, hardware, options)
    shape = workload.shape
    batch, context, output = (
        np.broadcast_to(a, shape).ravel()
        for a in (workload.batch, workload.context_tokens, workload.output_tokens)
    )
    size = batch.size
    out = {name: np.empty(size) for name in METRICS}
    bounds = {name: np.zeros(size, dtype=np.intp) for name in ("prefill_bound", "decode_bound")}
    bases: dict[str, float] = {}
    # What depends on the batch alone is priced once for every distinct batch.
    batches, where = _distinct(batch)
    step = model.step(batches)

    def evaluate(part: slice) -> Evaluated:
        return model.evaluate(batch[part], context[part], output[part], step.take(where[part]))

    parts = [slice(i, i + CHUNK_POINTS) for i in range(0, size, CHUNK_POINTS)]
    for part, (values, bound, basis) in zip(parts, _in_threads(evaluate, parts), strict=True):
        for name, value in values.items():
            out[name][part] = value
        for name, index in bound.items():
            bounds[name][part] = index
        for name, share in basis.items():
            bases[name] = bases.get(name, 0.0) + share
    if solve and size:
        model.solve(batch, context, output, out)
    else:
        for name in ("max_batch", "max_context_tokens", "min_gpus"):
            out[name][:] = np.nan
    names = np.array(BOUNDS)
    return Prediction(
        architecture=architecture,
        method=model.run.stack,
        workload=workload,
        hardware=hardware,
        level=level,
        engine=model.engine.name,
        dtype=model.dtype,
        weight_dtype=weight_dtype,
        tp=tp,
        memory_fraction=memory_fraction,
        metrics={k: v.reshape(shape) for k, v in out.items()},
        prefill_bound=names[bounds["prefill_bound"]].reshape(shape),
        decode_bound=names[bounds["decode_bound"]].reshape(shape),
        basis=_weakest(bases),
    )


#: From the strongest to the weakest source of a time; a sum is as good as its weakest part.
_BASES = ("measured", "calibrated", "anchored", "transferred", "published", "prior", "datasheet")


#: A basis counts once operations of it hold this share of the time.
BASIS_SHARE = 0.1


def _distinct(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Distinct values, and which of them each value is; small whole numbers without sorting."""
    if not values.size or values.max() > MOST_LISTED:
        return np.unique(values, return_inverse=True)
    whole = values.astype(np.intp)
    seen = np.zeros(int(whole.max()) + 1, dtype=bool)
    seen[whole] = True
    found = np.flatnonzero(seen)
    place = np.zeros(seen.size, dtype=np.intp)
    place[found] = np.arange(found.size)
    return found.astype(np.float64), place[whole]


def _in_threads(function: Callable[[slice], Evaluated], parts: list[slice]) -> Iterator[Evaluated]:
    """Results in order. numpy lets go of the interpreter, so several chunks run at once; few chunks
    are not worth the threads.
    """
    if len(parts) < PARALLEL_CHUNKS:
        yield from map(function, parts)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, parts)


def _shares(*phases: Mapping[str, float]) -> dict[str, float]:
    """Share of the time by basis, every phase counted alike."""
    out: dict[str, float] = {}
    for seconds in phases:
        whole = sum(seconds.values()) or 1.0
        for basis, value in seconds.items():
            out[basis] = out.get(basis, 0.0) + value / whole
    return out


def _weakest(bases: Mapping[str, float]) -> str:
    """The weakest basis that holds at least a tenth of the time."""
    whole = sum(bases.values())
    counted = [b for b, seconds in bases.items() if seconds >= BASIS_SHARE * whole]
    return max(counted, key=_BASES.index) if counted else "prior"


def default_dtype(architecture: Architecture) -> str:
    """The checkpoint's 16-bit type; checkpoints in fp32 are served in bf16."""
    return architecture.dtype if architecture.dtype in ("bf16", "fp16") else "bf16"


def default_engine(hardware: HardwareProfile, level: Level) -> str:
    """Who executes when nobody is named."""
    if hardware.is_cpu:
        return "torch"
    return "vllm" if level == "ideal" else "transformers"


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One (architecture, method, hardware, options), checked and ready to be evaluated."""

    architecture: Architecture  # whole
    run: Execution  # one GPU's share
    engine: Engine
    options: Options
    dtype: str

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        method: str | MethodStack,
        hardware: HardwareProfile,
        options: Options,
    ) -> "Model":
        """Check that the parts go together."""
        stack = parse_method(method) if isinstance(method, str) else method
        dtype = options.dtype or default_dtype(architecture)
        if dtype not in ("bf16", "fp16", "fp32"):
            raise ConfigError(f"dtype: expected bf16, fp16 or fp32, got {dtype!r}")
        try:
            hardware.peak(dtype)
        except ConfigError as error:
            raise NotApplicableError(str(error)) from None
        refusal = stack.refusal(architecture)
        if refusal:
            raise NotApplicableError(refusal)
        # Fitted kernels are those of an engine: they count where one was named. Kernel tables are
        # of single kernels, and whole passes on the same GPUs were up to a fifth slower; the
        # prior, made from whole passes, stands where nobody asked for an engine.
        named = options.engine is not None
        engine = load_engine(
            options.engine
            if options.engine is not None
            else default_engine(hardware, options.level)
        )
        if named:
            engine = replace(engine, kernels=engine.name)
        return cls(
            architecture=architecture,
            run=Execution.of(
                architecture,
                stack,
                hardware,
                weight_dtype=options.weight_dtype,
                dtype=dtype,
                tp=options.tp,
            ),
            engine=engine,
            options=options,
            dtype=dtype,
        )

    def sharded(self, tp: int) -> "Model":
        """The same over another number of GPUs; raises ``NotApplicableError``."""
        if tp == self.run.tp:
            return self
        run = Execution.of(
            self.architecture,
            self.run.stack,
            self.run.hardware,
            weight_dtype=self.options.weight_dtype,
            dtype=self.dtype,
            tp=tp,
        )
        return replace(self, run=run, options=replace(self.options, tp=tp))

    def point(self, batch: Array, context: Array, output: Array) -> Point:
        """The workload as the layers see it, right after the prompt."""
        prompt = self.run.stack.prompt_tokens(context)
        return Point(
            batch=batch,
            prompt_tokens=prompt,
            cached_tokens=prompt,
            reserved_tokens=prompt + output,
            dtype=self.dtype,
            kv_dtype=self.dtype,
            level=self.options.level,
            engine=self.engine,
        )

    def prefill(self, batch: Array, context: Array, output: Array) -> Operations:
        """Prompt compression, if any, and the prefill pass of one GPU."""
        point = self.point(batch, context, output)
        original = replace(point, prompt_tokens=context, cached_tokens=context)
        return (
            *self.run.stack.prompt_operations(original),
            *prefill_operations(self.run, point),
        )

    def operations(self, batch: Array, context: Array, output: Array) -> dict[str, Operations]:
        """The operations of both phases of one GPU, for explanations and figures."""
        b, c, n = (np.asarray(x, dtype=np.float64) for x in (batch, context, output))
        return {
            "prefill": self.prefill(b, c, n),
            "decode": decode_operations(self.run, self.point(b, c, n)),
        }

    def times(self, operations: Operations, *, decode: bool) -> PhaseTime:
        """Time of a pass of one GPU made of ``operations``."""
        busy = busy_of(operations, self.run.hardware, self.engine)
        return self._pass_time(busy, decode=decode)

    def _pass_time(self, busy: Busy, *, decode: bool) -> PhaseTime:
        return pass_time(
            busy,
            self.run.hardware,
            self.engine,
            level=self.options.level,
            graph=decode and self.engine.decode_graph,
        )

    def step(self, batch: Array) -> "Step":
        """The part of a decode step that depends on the batch alone."""
        zero = np.zeros(np.shape(batch))
        point = self.point(batch, zero, zero)
        operations = step_operations(self.run, point)
        whole = operations
        if self.options.tp > 1:
            whole = step_operations(self.sharded(1).run, point)
        return Step(
            busy=busy_of(operations, self.run.hardware, self.engine),
            flops=total(whole, _flops),
            counted_flops=total(whole, _counted),
            peak_s=peak_s(whole, self.run.hardware),
            hbm_bytes=hbm_bytes(operations),
            collective_bytes=collective_bytes(operations),
            transient_bytes=largest_transient(operations),
        )

    def evaluate(self, batch: Array, context: Array, output: Array, step: "Step") -> Evaluated:
        """Every metric but the solved ones, for one chunk of points; ``step`` is ``batch``'s."""
        hardware, tp = self.run.hardware, self.options.tp
        point = self.point(batch, context, output)
        prefill = self.prefill(batch, context, output)
        decode = mixing_operations(self.run, point, decode=True)
        last = mixing_operations(self.run, point.at(point.prompt_tokens + output), decode=True)
        whole_prefill, whole_decode = prefill, decode
        if tp > 1:
            whole = self.sharded(1)
            whole_prefill = whole.prefill(batch, context, output)
            whole_decode = mixing_operations(whole.run, point, decode=True)
        memory = memory_of(self.run, point, output, prefill, last, step.transient_bytes)
        ttft = self.times(prefill, decode=False)
        tpot = self._pass_time(busy_of(decode, hardware, self.engine) + step.busy, decode=True)
        tpot_last = self._pass_time(busy_of(last, hardware, self.engine) + step.busy, decode=True)
        prefill_bytes, decode_bytes = hbm_bytes(prefill), hbm_bytes(decode) + step.hbm_bytes
        mean_tpot = (tpot.mid_s + tpot_last.mid_s) / 2
        tokens_per_s = batch * output / (ttft.mid_s + (output - 1) * mean_tpot)
        capacity = hardware.memory_bytes * self.options.memory_fraction
        room = np.maximum(capacity - memory.weights_bytes, 1.0)
        power = decode_power_w(hardware, memory.state_allocated_bytes / room)
        bandwidth = hardware.hbm_bytes_per_s
        peak_decode_s = peak_s(whole_decode, hardware) + step.peak_s
        values: dict[str, Array] = {
            "weights_bytes": memory.weights_bytes,
            "state_bytes": memory.state_bytes,
            "state_host_bytes": memory.state_host_bytes,
            "state_allocated_bytes": memory.state_allocated_bytes,
            "peak_prefill_bytes": memory.peak_prefill_bytes,
            "peak_decode_bytes": memory.peak_decode_bytes,
            "prefill_flops": total(whole_prefill, _flops),
            "decode_flops": total(whole_decode, _flops) + step.flops,
            "executed_prefill_flops": total(whole_prefill, _counted),
            "executed_decode_flops": total(whole_decode, _counted) + step.counted_flops,
            "prefill_hbm_bytes": prefill_bytes,
            "decode_hbm_bytes": decode_bytes,
            "prefill_link_bytes": link_bytes(prefill),
            "decode_link_bytes": link_bytes(decode),
            "prefill_collective_bytes": collective_bytes(prefill),
            "decode_collective_bytes": collective_bytes(decode) + step.collective_bytes,
            "ttft_s": ttft.mid_s,
            "ttft_low_s": ttft.low_s,
            "ttft_high_s": ttft.high_s,
            "tpot_s": tpot.mid_s,
            "tpot_low_s": tpot.low_s,
            "tpot_high_s": tpot.high_s,
            "roofline_ttft_s": np.maximum(
                peak_s(whole_prefill, hardware) / tp, prefill_bytes / bandwidth
            ),
            "roofline_tpot_s": np.maximum(peak_decode_s / tp, decode_bytes / bandwidth),
            "prefill_launch_s": ttft.parts[_LAUNCH],
            "decode_launch_s": tpot.parts[_LAUNCH],
            "fits": np.where(memory.peak_bytes <= capacity, 1.0, 0.0),
            "tokens_per_s": tokens_per_s,
            "energy_j_per_token": np.nan if power is None else power * tp * tpot.mid_s / batch,
            "usd_per_million_output_tokens": self._usd_per_million(tokens_per_s),
            "extrapolated": np.maximum(ttft.extrapolated, tpot.extrapolated),
        }
        bound = {"prefill_bound": ttft.bound(), "decode_bound": tpot.bound()}
        return values, bound, _shares(ttft.bases, tpot.bases)

    def _usd_per_million(self, tokens_per_s: Array) -> Array:
        price = self.run.hardware.price_usd_per_hour
        if price is None:
            return np.float64(np.nan)
        return price[1] * self.options.tp / 3600.0 / tokens_per_s * 1e6

    def peak(self, batch: Array, context: Array, output: Array) -> NDArray[np.float64]:
        """Peak bytes of one GPU."""
        point = self.point(batch, context, output)
        prefill = self.prefill(batch, context, output)
        shape = np.broadcast_shapes(np.shape(batch), np.shape(context), np.shape(output))
        memory = memory_of(self.run, point, output, prefill)
        return np.broadcast_to(np.asarray(memory.peak_bytes), shape)

    def solve(
        self,
        batch: NDArray[np.float64],
        context: NDArray[np.float64],
        output: NDArray[np.float64],
        out: dict[str, NDArray[np.float64]],
    ) -> None:
        """Fill the solved metrics in place. Each distinct input is solved once."""
        capacity = self.run.hardware.memory_bytes * self.options.memory_fraction
        pairs, where = np.unique(np.stack([context, output]), axis=1, return_inverse=True)
        solved = solve_max_batch(
            lambda b, c: self.peak(b, c, pairs[1][:, None]), capacity, pairs[0]
        )
        out["max_batch"][:] = solved[where.ravel()]
        pairs, where = np.unique(np.stack([batch, output]), axis=1, return_inverse=True)
        solved = solve_max_context(
            lambda b, c: self.peak(b, c, pairs[1][:, None]), capacity, pairs[0]
        )
        out["max_context_tokens"][:] = solved[where.ravel()]
        out["min_gpus"][:] = self._min_gpus(batch, context, output, out["fits"])

    def _min_gpus(
        self, batch: Array, context: Array, output: Array, fits: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Smallest tensor-parallel degree that holds the point; NaN where none of them does."""
        capacity = self.run.hardware.memory_bytes * self.options.memory_fraction
        found = np.full(np.shape(fits), np.nan)
        for tp in TP_CANDIDATES:
            try:
                model = self.sharded(tp)
            except NotApplicableError:
                continue
            ok = model.peak(batch, context, output) <= capacity
            found = np.where(np.isnan(found) & ok, float(tp), found)
            if not np.any(np.isnan(found)):
                break
        return found


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Step:
    """What a decode step does whatever is cached, by batch: projections, MLPs, head,
    collectives.
    """

    busy: Busy
    flops: Array
    counted_flops: Array
    peak_s: Array
    hbm_bytes: Array
    collective_bytes: Array
    transient_bytes: Array

    def take(self, index: NDArray[np.intp]) -> "Step":
        """The batches of ``index``."""
        share = index.size / max(1, np.size(self.busy.mid_s))
        return Step(
            busy=self.busy.take(index, share),
            **{
                name: np.broadcast_to(getattr(self, name), np.shape(self.busy.mid_s))[index]
                for name in _STEP_AMOUNTS
            },
        )


_STEP_AMOUNTS = (
    *("flops", "counted_flops", "peak_s", "hbm_bytes", "collective_bytes", "transient_bytes"),
)


def _flops(op: Operation) -> Array:
    return op.flops


def _counted(op: Operation) -> Array:
    return op.counted_flops

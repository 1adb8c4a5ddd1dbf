"""One model, method and device put together: operations, times and metrics of its points."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from costmodel import basis
from costmodel.architecture import Architecture
from costmodel.engines import Engine, at_best, engine_of, in_passes
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.hardware import HardwareProfile
from costmodel.kernels.families import own_engines
from costmodel.layout import (
    Execution,
    decode_operations,
    mixing_operations,
    prefill_operations,
    step_operations,
    total,
)
from costmodel.memory import largest_transient, memory_of
from costmodel.methods.parse import parse_method
from costmodel.methods.stack import MethodStack
from costmodel.operation import Array, Operation, Operations
from costmodel.options import Options, default_dtype, default_engine
from costmodel.phase import (
    BOUNDS,
    Busy,
    PhaseTime,
    busy_of,
    collective_bytes,
    hbm_bytes,
    link_bytes,
    middle_of,
    pass_time,
    peak_s,
)
from costmodel.power import step_power_w
from costmodel.workload import Point

_LAUNCH = BOUNDS.index("launch")


@dataclass(frozen=True, slots=True, eq=False)
class Evaluated:
    """Metrics of some points, what binds their passes (index into ``BOUNDS``), shares of bases, and
    why some of it rests on a prior (``PhaseTime.unfitted``).
    """

    values: dict[str, Array]
    bounds: dict[str, NDArray[np.intp]]
    bases: dict[str, float]
    unfitted: frozenset[str]


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
        named = options.engine
        name = default_engine(hardware, options.level) if named is None else named
        engine = engine_of(name, own_engines(hardware))
        if options.level == "ideal":
            engine = at_best(engine)
        if not hardware.is_cpu:  # a CPU has the prior, or curves of its own
            engine = in_passes(engine)
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
        time = pass_time(
            busy,
            self.run.hardware,
            self.engine,
            level=self.options.level,
            graph=decode and self.engine.decode_graph,
            n_layers=self.architecture.n_layers,
            first_token=not decode,
        )
        factor = self.run.hardware.anchors.get("decode" if decode else "prefill")
        return time if factor is None else time.anchored(factor)

    def step(self, batch: Array) -> "Step":
        """The part of a decode step that depends on the batch alone."""
        zero = np.zeros(np.shape(batch))
        point = self.point(batch, zero, zero)
        operations = step_operations(self.run, point)
        whole = operations
        if self.options.tp > 1:
            whole = step_operations(self.sharded(1).run, point)
        head = busy_of(operations[-1:], self.run.hardware, self.engine)
        return Step(
            busy=busy_of(operations[:-1], self.run.hardware, self.engine) + head,
            head=head,
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
        # The head sees one token of every sequence, in a prompt as in a step: it is priced already.
        body = busy_of(prefill[:-1], hardware, self.engine) + step.head
        ttft = self._pass_time(body, decode=False)
        tpot = self._pass_time(busy_of(decode, hardware, self.engine) + step.busy, decode=True)
        # Of the last step only the middle counts: its interval is that of the first, moved on.
        tpot_last = self._pass_time(middle_of(last, hardware, self.engine) + step.busy, decode=True)
        prefill_flops = total(whole_prefill, _flops)
        prefill_bytes, decode_bytes = hbm_bytes(prefill), hbm_bytes(decode) + step.hbm_bytes
        mean_tpot = (tpot.mid_s + tpot_last.mid_s) / 2
        tokens_per_s = batch * output / (ttft.mid_s + (output - 1) * mean_tpot)
        capacity = self.capacity_bytes
        room = np.maximum(capacity - memory.weights_bytes, 1.0)
        bandwidth = hardware.hbm_bytes_per_s
        peak_decode_s = peak_s(whole_decode, hardware) + step.peak_s
        power = step_power_w(
            hardware,
            tensor_share=peak_decode_s / tp / tpot.mid_s,
            weight_share=step.hbm_bytes / bandwidth / tpot.mid_s,
            kv_share=hbm_bytes(decode) / bandwidth / tpot.mid_s,
            pool_share=memory.state_allocated_bytes / room,
        )
        values: dict[str, Array] = {
            "weights_bytes": memory.weights_bytes,
            "state_bytes": memory.state_bytes,
            "state_host_bytes": memory.state_host_bytes,
            "state_allocated_bytes": memory.state_allocated_bytes,
            "peak_prefill_bytes": memory.peak_prefill_bytes,
            "peak_decode_bytes": memory.peak_decode_bytes,
            "prefill_flops": prefill_flops,
            "decode_flops": total(whole_decode, _flops) + step.flops,
            "executed_prefill_flops": _executed(whole_prefill, prefill_flops),
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
        return Evaluated(
            values,
            {"prefill_bound": ttft.bound(), "decode_bound": tpot.bound()},
            basis.shares(ttft.bases, tpot.bases),
            ttft.unfitted | tpot.unfitted,
        )

    @property
    def capacity_bytes(self) -> float:
        """What may be used of one GPU's memory."""
        return self.run.hardware.memory_bytes * self.options.memory_fraction

    def _usd_per_million(self, tokens_per_s: Array) -> Array:
        price = self.run.hardware.price_usd_per_hour
        if price is None:
            return np.float64(np.nan)
        return price[1] * self.options.tp / 3600.0 / tokens_per_s * 1e6


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Step:
    """What a decode step does whatever is cached, by batch: projections, MLPs, head,
    collectives.
    """

    busy: Busy
    head: Busy  # of the busy time, that of the LM head
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
            head=self.head.take(index, share),
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


def _executed(operations: Operations, flops: Array) -> Array:
    """FLOPs that really run; ``flops``, the useful ones, where they are the same throughout."""
    if all(op.counted_flops is op.flops for op in operations):
        return flops
    return total(operations, _counted)

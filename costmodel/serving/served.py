"""One model on one deployment, and what its decode steps and prefills are made of.

The attention part and dense MLPs are the operations of ``costmodel.layout`` for one GPU, each
timed by its kernel family. Routed experts are counted here, because they spread differently: of T
tokens a GPU multiplies T k / ep rows with the hit ones of its E / ep experts, each 1 / moe_tp wide,

    expert roofline = max(2 rows n k / peak, (hit experts' bytes + rows (n + k) b) / bandwidth)

summed over the two matrices. With attention data parallelism tokens are gathered before the experts
and their sums scattered after them.

A packed integer cache in an engine whose own kernels unpack it is priced at level ``ideal``, and
beside its attention stands that on the 16-bit cache it replaces: published runs take about as long
(docs/accuracy.md).
"""

from dataclasses import dataclass, replace

import numpy as np

from costmodel.architecture import Architecture
from costmodel.engines import Engine, load_engine
from costmodel.errors import NotApplicableError
from costmodel.hardware import HardwareProfile
from costmodel.kernels import time_operation
from costmodel.kernels.fitted import attained_roofline_s
from costmodel.layout import Execution, decode_operations, prefill_operations, total
from costmodel.memory import state_of
from costmodel.methods.parse import parse_method
from costmodel.operation import Array, Operation, Operations
from costmodel.phase import hbm_bytes, peak_s
from costmodel.serving.deployment import Deployment
from costmodel.serving.stored import stored_as
from costmodel.workload import Level, Point

_ATTENTION = frozenset(
    {"prefill_attention", "decode_attention", "mla_prefill_attention", "mla_decode_attention"}
)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Parts:
    """Seconds of one pass on the slowest GPU, by what scales alike.

    matmul_s      dense matrix products
    attention_s   attention kernels
    attention_roofline_s   the same at full peaks and the bandwidth that kernels attain
    unpacked_attention_s   attention on the 16-bit cache that a packed one replaces, else 0
    other_s       norms, activations, scans, everything else on the GPU
    expert_s      roofline of the routed experts
    collective_s  all-reduces, gathers
    launches      kernels started
    roofline_s    the whole pass at datasheet rates, perfect overlap
    """

    matmul_s: Array
    attention_s: Array
    attention_roofline_s: Array
    unpacked_attention_s: Array
    other_s: Array
    expert_s: Array
    collective_s: Array
    launches: Array
    roofline_s: Array


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Served:
    """A model stored in one precision, spread over the GPUs of one replica, run by one engine."""

    architecture: Architecture
    run: Execution
    whole: Execution
    deployment: Deployment
    engine: Engine
    precision: str
    level: Level
    plain: "Served | None" = None  # the same with a 16-bit cache, where this one's is packed

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        hardware: HardwareProfile,
        engine: str,
        *,
        deployment: Deployment | None = None,
        precision: str = "",
        fp8_cache: bool = False,
        method: str = "full",
        level: Level = "ideal",
        dtype: str = "bf16",
    ) -> "Served":
        """Lay out a replica; raises ``NotApplicableError`` where the parts do not go together."""
        chosen = (deployment or Deployment()).for_model(architecture)
        stored, weight_dtype = stored_as(architecture, precision)
        compute = dtype if dtype in hardware.peak_flops_per_s else "fp16"
        stack = parse_method("fp8_kv" if fp8_cache and method == "full" else method)
        refusal = stack.refusal(stored)
        if refusal and method != "full":
            raise NotApplicableError(refusal)
        if refusal:
            stack = parse_method("full")
        run, whole = (
            Execution.of(stored, stack, hardware, weight_dtype=weight_dtype, dtype=compute, tp=tp)
            for tp in (chosen.tp, 1)
        )
        rules = load_engine(engine)
        packed = any(m.STORES.startswith("int") for m in stack.methods) and level == "ideal"
        plain = None
        if packed and rules.fused_dequantise:
            plain = cls.of(
                architecture,
                hardware,
                engine,
                deployment=deployment,
                precision=precision,
                dtype=dtype,
            )
        return cls(
            architecture=architecture,
            run=run,
            whole=whole,
            deployment=chosen,
            engine=rules,
            precision=precision,
            level=level,
            plain=plain,
        )

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return self.architecture.n_layers

    @property
    def n_expert_layers(self) -> int:
        """Blocks with routed experts."""
        return sum(n for _, n, _ in self.whole.experts)

    @property
    def matmul_precision(self) -> str:
        """Precision of the matrices outside of experts: 16 bits in sparse models "in fp4"."""
        return "" if self.precision == "fp4" and self.n_expert_layers else self.precision

    @property
    def weights_bytes(self) -> float:
        """Weights one GPU holds."""
        here, everywhere = (
            sum(m.stored_bytes * m.count for _, _, matmuls in x.experts for m in matmuls)
            for x in (self.run, self.whole)
        )
        return self.run.weights_bytes - here + everywhere / self.deployment.n_gpus

    def point(self, batch: Array, tokens: Array) -> Point:
        """Sequences of ``tokens`` cached tokens on one attention rank."""
        prompt = self.run.stack.prompt_tokens(tokens)
        return Point(
            batch=batch,
            prompt_tokens=prompt,
            cached_tokens=prompt,
            reserved_tokens=prompt,
            dtype=self.run.dtype,
            kv_dtype=self.run.dtype,
            level=self.level,
            engine=self.engine,
        )

    def most_sequences(self, tokens: Array, memory_fraction: float) -> Array:
        """Sequences of ``tokens`` cached tokens that fit on the replica; at least one a rank."""
        one = np.ones(np.shape(tokens))
        each = np.asarray(state_of(self.run, self.point(one, tokens))[0])
        hardware = self.run.hardware
        room = hardware.memory_bytes * memory_fraction - self.weights_bytes
        room -= self.engine.reserved_bytes[0 if self.deployment.n_gpus == 1 else 1]
        fits: Array = np.maximum(room / np.maximum(each, 1.0), 1.0) * self.deployment.dp
        return fits

    def step(self, sequences: Array, cached_tokens: Array) -> Parts:
        """Parts of a decode step of ``sequences`` on the whole replica."""
        here = np.maximum(np.asarray(sequences) / self.deployment.dp, 1.0)
        operations = decode_operations(self.run, self.point(here, np.asarray(cached_tokens)))
        parts = self._parts(operations, here)
        if self.plain is None:
            return parts
        unpacked = self.plain.step(sequences, cached_tokens)
        return replace(parts, unpacked_attention_s=unpacked.attention_s)

    def prefill(self, prompt_tokens: Array, prompts: Array = 1.0) -> Parts:
        """Parts of a prefill of ``prompts`` prompts on every attention rank at once."""
        tokens = np.asarray(prompt_tokens, dtype=np.float64)
        batch = np.broadcast_to(np.asarray(prompts, dtype=np.float64), tokens.shape)
        point = self.point(batch, tokens)
        operations = (
            *self.run.stack.prompt_operations(point),
            *prefill_operations(self.run, point),
        )
        return self._parts(operations, batch * point.prompt_tokens)

    def _parts(self, operations: Operations, tokens: Array) -> Parts:
        """``tokens`` are those of one attention rank."""
        hardware, name = self.run.hardware, self.engine.name
        matmul, attention, floor, other, collective = np.zeros((5, *np.shape(tokens)))
        rest = tuple(op for op in operations if op.kind != "moe_gemm")
        for op in (*rest, *self._exchanges(tokens)):
            seconds = op.count * time_operation(op, hardware, name, middle_only=True).mid_s
            if op.kind == "collective":
                collective = collective + seconds
            elif op.kind == "gemm":
                matmul = matmul + seconds
            elif op.kind in _ATTENTION:
                attention = attention + seconds
                floor = floor + op.count * attained_roofline_s(op, hardware, name)
            else:
                other = other + seconds
        experts = self._expert_operations(tokens)
        expert_s = np.zeros(np.shape(tokens))
        for op in experts:
            compute = op.flops / hardware.peak(op.dtype)
            memory = op.moved_bytes / hardware.hbm_bytes_per_s
            expert_s = expert_s + op.count * np.maximum(compute, memory)
        timed = (*rest, *experts)
        memory_s = hbm_bytes(timed) / hardware.hbm_bytes_per_s
        return Parts(
            matmul_s=matmul,
            attention_s=attention,
            attention_roofline_s=floor,
            unpacked_attention_s=np.zeros(np.shape(tokens)),
            other_s=other,
            expert_s=expert_s,
            collective_s=collective,
            launches=total(timed, _launches),
            roofline_s=np.maximum(peak_s(timed, hardware), memory_s),
        )

    def _expert_operations(self, tokens: Array) -> Operations:
        """Grouped products of one GPU for ``tokens`` on every attention rank."""
        d = self.deployment
        out: list[Operation] = []
        for moe, _, matmuls in self.whole.experts:
            share = min(moe.top_k / moe.n_experts, 1.0 - 1e-12)
            everywhere = np.asarray(tokens, dtype=np.float64) * d.dp
            rows = everywhere * (moe.top_k / d.ep)
            hit = moe.n_experts / d.ep * -np.expm1(everywhere * np.log1p(-share))
            for matmul in matmuls:
                linear = matmul.linear
                elements = linear.n_in * linear.n_out / d.moe_tp
                # The width of an expert is what moe_tp divides: the inner side of each matrix.
                inner_is_out = linear.name != "experts_down"
                n = linear.n_out / (d.moe_tp if inner_is_out else 1)
                k = linear.n_in / (1 if inner_is_out else d.moe_tp)
                out.append(
                    Operation(
                        name=linear.name,
                        kind="moe_gemm",
                        count=matmul.count,
                        flops=rows * (2.0 * elements),
                        weight_bytes=hit * (matmul.stored_bytes / linear.copies / d.moe_tp),
                        activation_bytes=rows * ((n + k) * 2.0),
                        dtype=matmul.dtype,
                    )
                )
        return tuple(out)

    def _exchanges(self, tokens: Array) -> Operations:
        """Tokens gathered before the experts and scattered after them, with data parallelism."""
        d = self.deployment
        if d.dp == 1 or not self.n_expert_layers:
            return ()
        message = np.asarray(tokens) * (d.dp * self.architecture.d_model * 2.0)
        return (
            Operation(
                name="all_reduce",
                kind="collective",
                count=self.n_expert_layers,
                link_bytes=message * (2.0 * (d.dp - 1) / d.dp),
                shape={"message_bytes": message, "n_gpus": float(d.n_gpus)},
            ),
        )


def _launches(op: Operation) -> Array:
    return op.launches

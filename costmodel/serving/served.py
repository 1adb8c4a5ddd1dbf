"""One model on one deployment, and what its decode steps and prefills are made of.

The attention part and dense MLPs are the operations of ``costmodel.layout`` for one GPU, each
timed by its kernel family. Routed experts are counted here, because they spread differently: of T
tokens a GPU multiplies T k / ep rows with the hit ones of its E / ep experts, each 1 / moe_tp wide,

    expert roofline = max(2 rows n k / peak, (hit experts' bytes + rows (n + k) b) / bandwidth)

summed over the two matrices. With attention data parallelism tokens are gathered before the experts
and their sums scattered after them.
"""

from dataclasses import dataclass

import numpy as np

from costmodel.architecture import Architecture
from costmodel.engines import Engine, load_engine
from costmodel.hardware import HardwareProfile
from costmodel.kernels import time_operation
from costmodel.layout import Execution, decode_operations, prefill_operations
from costmodel.memory import state_of
from costmodel.methods.parse import parse_method
from costmodel.mixers.mla import MLA
from costmodel.operation import Array, Operation, Operations
from costmodel.phase import hbm_bytes, peak_s
from costmodel.serving.deployment import Deployment
from costmodel.serving.stored import stored_as
from costmodel.workload import Point

_ATTENTION = frozenset(
    {"prefill_attention", "decode_attention", "mla_prefill_attention", "mla_decode_attention"}
)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Load:
    """A constant load on one replica; arrays that broadcast.

    concurrency     requests in the system at any time
    input_tokens, output_tokens   of each
    """

    concurrency: Array
    input_tokens: Array
    output_tokens: Array


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Parts:
    """Seconds of one pass on the slowest GPU, by what scales alike.

    dense_s       all kernels but routed experts and collectives
    attention_s   of that, attention kernels
    expert_s      roofline of the routed experts
    collective_s  all-reduces, gathers
    roofline_s    the whole pass at datasheet rates, perfect overlap
    """

    dense_s: Array
    attention_s: Array
    expert_s: Array
    collective_s: Array
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
    ) -> "Served":
        """Lay out a replica; raises ``NotApplicableError`` where the parts do not go together."""
        chosen = (deployment or Deployment()).for_model(architecture)
        stored, weight_dtype = stored_as(architecture, precision)
        dtype = "fp16" if "bf16" not in hardware.peak_flops_per_s else "bf16"
        stack = parse_method("fp8_kv" if fp8_cache else "full")
        refusal = stack.refusal(stored)
        if refusal:
            stack = parse_method("full")
        run, whole = (
            Execution.of(stored, stack, hardware, weight_dtype=weight_dtype, dtype=dtype, tp=tp)
            for tp in (chosen.tp, 1)
        )
        return cls(
            architecture=architecture,
            run=run,
            whole=whole,
            deployment=chosen,
            engine=load_engine(engine),
            precision=precision,
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
    def has_latent_attention(self) -> bool:
        """Whether attention is over a shared latent (MLA)."""
        return any(isinstance(g.mixer, MLA) for g in self.run.mixer_groups)

    @property
    def weights_bytes(self) -> float:
        """Weights one GPU holds."""
        here, everywhere = (
            sum(m.stored_bytes * m.count for _, _, matmuls in x.experts for m in matmuls)
            for x in (self.run, self.whole)
        )
        return self.run.weights_bytes - here + everywhere / self.deployment.n_gpus

    def _point(self, batch: Array, tokens: Array) -> Point:
        return Point(
            batch=batch,
            prompt_tokens=tokens,
            cached_tokens=tokens,
            reserved_tokens=tokens,
            dtype=self.run.dtype,
            kv_dtype=self.run.dtype,
            level="ideal",
            engine=self.engine,
        )

    def most_sequences(self, tokens: Array, memory_fraction: float) -> Array:
        """Sequences of ``tokens`` cached tokens that fit on the replica; at least one a rank."""
        one = np.ones(np.shape(tokens))
        each = np.asarray(state_of(self.run, self._point(one, tokens))[0])
        hardware = self.run.hardware
        room = hardware.memory_bytes * memory_fraction - self.weights_bytes
        room -= self.engine.reserved_bytes[0 if self.deployment.n_gpus == 1 else 1]
        fits: Array = np.maximum(room / np.maximum(each, 1.0), 1.0) * self.deployment.dp
        return fits

    def step(self, sequences: Array, cached_tokens: Array) -> Parts:
        """Parts of a decode step of ``sequences`` on the whole replica."""
        here = np.maximum(np.asarray(sequences) / self.deployment.dp, 1.0)
        operations = decode_operations(self.run, self._point(here, np.asarray(cached_tokens)))
        return self._parts(operations, here)

    def prefill(self, prompt_tokens: Array) -> Parts:
        """Parts of the prefill of one prompt on every attention rank at once."""
        tokens = np.asarray(prompt_tokens, dtype=np.float64)
        one = np.ones(tokens.shape)
        operations = prefill_operations(self.run, self._point(one, tokens))
        return self._parts(operations, tokens)

    def _parts(self, operations: Operations, tokens: Array) -> Parts:
        """``tokens`` are those of one attention rank."""
        hardware, name = self.run.hardware, self.engine.name
        dense, attention, collective = (np.zeros(np.shape(tokens)) for _ in range(3))
        rest = tuple(op for op in operations if op.kind != "moe_gemm")
        for op in (*rest, *self._exchanges(tokens)):
            seconds = op.count * time_operation(op, hardware, name).mid_s
            if op.kind == "collective":
                collective = collective + seconds
                continue
            dense = dense + seconds
            if op.kind in _ATTENTION:
                attention = attention + seconds
        experts = self._expert_operations(tokens)
        expert_s = np.zeros(np.shape(tokens))
        for op in experts:
            compute = op.flops / hardware.peak(op.dtype)
            memory = op.moved_bytes / hardware.hbm_bytes_per_s
            expert_s = expert_s + op.count * np.maximum(compute, memory)
        timed = (*rest, *experts)
        memory_s = hbm_bytes(timed) / hardware.hbm_bytes_per_s
        return Parts(
            dense_s=dense,
            attention_s=attention,
            expert_s=expert_s,
            collective_s=collective,
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

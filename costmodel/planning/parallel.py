"""Parallelism inside one replica beyond tensor parallelism.

Tensor parallelism is priced by the cost model itself (KV heads replicate where there are fewer than
GPUs). The others reshape the tables of one tensor-parallel group.

pp  Pipeline. In steady state as many micro-batches as stages are in flight, so an iteration over n
    sequences takes one micro-batch of n / pp through all stages, each as slow as the one with most
    layers (the bubble of uneven stages), plus pp - 1 sends. Prompts are cut into chunks that
    follow one another through the stages. Filling and draining an idle pipeline is left out.
cp  Context parallel. Tokens of a prompt and of the cache are spread evenly (zig-zag) over cp ranks,
    which pass K and V around a ring; a chunk takes the longer of its share of attention and of the
    exchange. Decode gathers partial results of every layer.
ep  Expert groups with data-parallel attention: every rank has its own sequences and queue, and
    1 / ep of the experts. Each iteration reads its experts for the tokens of all ranks, takes the
    fullest rank's share (balls in bins, experts chosen uniformly), and sends every token to its
    experts and back. That ranks wait for each other at each layer is left out.
"""

from dataclasses import dataclass, replace
from math import ceil, log
from typing import TYPE_CHECKING

import numpy as np

from costmodel.errors import NotApplicableError
from costmodel.kernels.prior import COLLECTIVE_FRACTION, COLLECTIVE_LATENCY_S
from costmodel.mlps import MoE
from costmodel.operation import Array, Operation, Operations

if TYPE_CHECKING:
    from costmodel.model import Model
    from costmodel.planning.steps import StepTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Degrees besides ``tp``: pipeline stages, expert groups, context-parallel ranks."""

    pp: int = 1
    ep: int = 1
    cp: int = 1

    @property
    def groups(self) -> int:
        """Tensor-parallel groups in one replica."""
        return self.pp * self.ep * self.cp

    def check(self, model: "Model") -> None:
        """Raise ``NotApplicableError`` where the model cannot be cut like this."""
        n_layers = model.architecture.n_layers
        if self.pp > n_layers:
            raise NotApplicableError(f"pp = {self.pp} is more than the {n_layers} layers")
        if self.ep == 1:
            return
        experts = [m for m, _, _ in model.run.experts]
        if not experts:
            raise NotApplicableError(f"ep = {self.ep}: {model.architecture.name} has no experts")
        for moe in experts:
            if moe.n_experts % self.ep:
                raise NotApplicableError(f"{moe.n_experts} experts do not divide by ep = {self.ep}")

    def _stage_share(self, model: "Model") -> float:
        """Share of the layers on the stage that has most."""
        n_layers = model.architecture.n_layers
        return ceil(n_layers / self.pp) / n_layers

    def pool_bytes(self, pool: float, model: "Model") -> float:
        """Room for state in one engine, in bytes of one tensor-parallel rank's whole model."""
        room = pool + model.run.weights_bytes - self.weights_bytes(model)
        return room / self._stage_share(model) * self.cp

    def weights_bytes(self, model: "Model") -> float:
        """Weights on the GPU that has most."""
        elsewhere = _expert_bytes(model) * (1.0 - 1.0 / self.ep)
        return (model.run.weights_bytes - elsewhere) * self._stage_share(model)

    def experts(self, operations: Operations, tokens: Array) -> Operations:
        """Expert matmuls of one rank, and the exchange of tokens, for ``tokens`` on each rank."""
        if self.ep == 1:
            return operations
        out: list[Operation] = []
        for op in operations:
            if op.kind != "moe_gemm":
                out.append(op)
                continue
            out.append(self._one_rank(op, tokens))
            if op.name == "experts_down":  # once per block, and its output is as wide as a token
                out.append(self._exchange(op, tokens))
        return tuple(out)

    def _one_rank(self, op: Operation, tokens: Array) -> Operation:
        n, k = float(np.max(op.shape["experts"])), float(np.max(op.shape["top_k"]))
        fullest = 1.0 + np.sqrt(2.0 * log(self.ep) / (np.asarray(tokens) * k))
        moe = MoE(n_experts=int(n), top_k=int(k), d_ff=1)
        here = moe.experts_read(np.asarray(tokens) * self.ep) / self.ep
        before = np.maximum(op.shape["active_experts"], 1e-9)
        return replace(
            op,
            flops=op.flops * fullest,
            executed_flops=None if op.executed_flops is None else op.executed_flops * fullest,
            activation_bytes=op.activation_bytes * fullest,
            weight_bytes=op.weight_bytes * here / before,
            shape={**op.shape, "experts": n / self.ep, "active_experts": here},
        )

    def _exchange(self, op: Operation, tokens: Array) -> Operation:
        """Every token to its experts and back: 2 k d b (ep - 1) / ep bytes sent per token."""
        width = float(np.max(op.shape["n"]))
        k = float(np.max(op.shape["top_k"]))
        bytes_each = 2.0 * width
        message = np.asarray(tokens) * (2.0 * k * bytes_each * (self.ep - 1) / self.ep)
        return Operation(
            name="all_to_all", kind="collective", count=op.count, link_bytes=message,
            launches=2.0, dtype=op.dtype,
            shape={"message_bytes": message, "n_gpus": float(self.ep)},
            formula="2 k d b (ep - 1) / ep bytes per token, dispatch and combine",
        )  # fmt: skip

    def applied(self, table: "StepTable", model: "Model") -> "StepTable":
        """The tables of a pipeline or context-parallel engine."""
        lanes = self.pp * self.cp
        if lanes == 1:
            return table
        uneven = self._stage_share(model) * self.pp
        shift = 1 << table.prompt_shift
        prefix = np.maximum(
            np.array(table.prefix_s) / self.cp,
            [self._ring_s(model, k * shift) for k in range(len(table.prefix_s))],
        )
        per_layer = self._decode_exchange_s(model)
        sends = [self._sends_s(model, m) for m in range(table.max_batch + 1)]

        def stretched(lists: list[list[float]], scale: float, extra: bool) -> list[list[float]]:
            out: list[list[float]] = [[]]
            for n in range(1, table.max_batch * lanes + 1):
                m = ceil(n / lanes)
                more = sends[m] + per_layer if extra else 0.0
                out.append([x * scale + more for x in lists[m]])
            return out

        largest = (table.chunk_tokens + table.max_batch) * lanes
        exact = [0.0]
        exact += [self._tokens_s(table, model, n / lanes, uneven) for n in range(1, 1025)]
        coarse = [
            self._tokens_s(table, model, (1024 + 64 * k) / lanes, uneven)
            for k in range(max(0, largest - 1024) // 64 + 3)
        ]
        return replace(
            table,
            chunk_tokens=table.chunk_tokens * lanes,
            max_batch=table.max_batch * lanes,
            base=stretched(table.base, uneven, True),
            slope=stretched(table.slope, uneven / lanes, False),
            exact_s=exact,
            coarse_s=coarse,
            prompt_s=[x * uneven / lanes for x in table.prompt_s],
            prefix_s=prefix.tolist(),
            alone_s=table.alone_s + self._sends_s(model, 1),
        )

    def _tokens_s(self, table: "StepTable", model: "Model", tokens: float, uneven: float) -> float:
        low = int(tokens)
        here = table.token_s(low)
        if tokens > low:
            here += (table.token_s(low + 1) - here) * (tokens - low)
        return here * uneven + self._sends_s(model, tokens)

    def _sends_s(self, model: "Model", tokens: float) -> float:
        """Activations of a micro-batch over pp - 1 borders."""
        if self.pp == 1:
            return 0.0
        bytes_each = model.architecture.d_model * 2.0
        wire = tokens * bytes_each / (_link(model) * COLLECTIVE_FRACTION[1])
        return (self.pp - 1) * (COLLECTIVE_LATENCY_S[1] + wire)

    def _ring_s(self, model: "Model", tokens: float) -> float:
        """K and V of so many tokens past every rank."""
        if self.cp == 1 or tokens == 0:
            return 0.0
        from costmodel.memory import state_of

        one = np.float64(1.0)
        point = model.point(one, np.float64(max(tokens, 1.0)), one)
        state = float(np.max(state_of(model.run, point)[0]))
        return state * (self.cp - 1) / self.cp / (_link(model) * COLLECTIVE_FRACTION[1])

    def _decode_exchange_s(self, model: "Model") -> float:
        """One small gather per layer with a cache."""
        if self.cp == 1:
            return 0.0
        layers = sum(g.n_layers for g in model.run.mixer_groups if g.mixer.HAS_KV)
        return layers * COLLECTIVE_LATENCY_S[1]


def _link(model: "Model") -> float:
    hardware = model.run.hardware
    return hardware.link_bytes_per_s or hardware.host_link_bytes_per_s or hardware.hbm_bytes_per_s


def _expert_bytes(model: "Model") -> float:
    """Stored bytes of routed experts on one rank."""
    return sum(
        matmul.stored_bytes * count for _, count, matmuls in model.run.experts for matmul in matmuls
    )

"""Parallelism inside one replica beyond tensor parallelism.

Tensor parallelism is priced by the cost model itself (KV heads replicate where there are fewer than
GPUs). The others reshape the tables of one tensor-parallel group.

pp  Pipeline. In steady state as many micro-batches as stages are in flight, so an iteration over n
    sequences takes one micro-batch of n / pp through all stages, each as slow as the one with most
    layers (the bubble of uneven stages), plus pp - 1 sends. Prompts are cut into chunks that
    follow one another through the stages: the last of them still has pp - 1 stages to go when the
    next prompt enters, which delays the first token (the bubble of filling and draining: k chunks
    take k + pp - 1 stage times) but holds nobody else up.
cp  Context parallel. Tokens of a prompt and of the cache are spread evenly (zig-zag) over cp ranks,
    which pass the prompt's whole K and V around a ring (an all-gather sends as much); a chunk
    takes the longer of its share of attention and of the exchange. In decode every rank attends
    over its part of the cache: queries are gathered and partial results returned in every layer.
ep  Expert groups with data-parallel attention: every rank has its own sequences and queue, and
    1 / ep of the experts. Each iteration reads its experts for the tokens of all ranks, takes the
    fullest rank's share (balls in bins, experts chosen uniformly), and sends every token to its
    experts and back. That ranks wait for each other at each layer is left out.

GPUs of a replica beyond one node are joined by the network, at ``network_bytes_per_s`` per GPU.
"""

from dataclasses import dataclass, replace
from math import ceil, log
from typing import TYPE_CHECKING

import numpy as np

from costmodel.errors import NotApplicableError
from costmodel.kernels.prior import COLLECTIVE_FRACTION, COLLECTIVE_LATENCY_S
from costmodel.methods.parse import parse_method
from costmodel.mlps import MoE
from costmodel.operation import Array, Operation, Operations

if TYPE_CHECKING:
    from costmodel.hardware import HardwareProfile
    from costmodel.model import Model
    from costmodel.planning.steps import StepTable


#: Of one GPU: a 400 Gbit/s adapter.
NETWORK_BYTES_PER_S = 50e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Degrees besides ``tp``: pipeline stages, expert groups, context-parallel ranks.

    network_bytes_per_s  between nodes, per GPU and direction
    """

    pp: int = 1
    ep: int = 1
    cp: int = 1
    network_bytes_per_s: float = NETWORK_BYTES_PER_S

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

    def gpu_bytes(self, pool: float, model: "Model") -> float:
        """Of a pool as ``pool_bytes`` counts it, what one GPU holds."""
        return pool * self._stage_share(model) / self.cp

    def weights_bytes(self, model: "Model") -> float:
        """Weights on the GPU that has most."""
        elsewhere = _expert_bytes(model) * (1.0 - 1.0 / self.ep)
        return (model.run.weights_bytes - elsewhere) * self._stage_share(model)

    def link_bytes_per_s(self, model: "Model") -> float:
        """Between the tensor-parallel groups of a replica, per GPU and direction."""
        hardware = model.run.hardware
        if model.run.tp * self.groups > hardware.max_gpus_per_node:
            return self.network_bytes_per_s
        return own_link_bytes_per_s(hardware)

    def experts(self, operations: Operations, tokens: Array, model: "Model") -> Operations:
        """Expert matmuls of one rank, and the exchange of tokens, for ``tokens`` on each rank."""
        if self.ep == 1:
            return operations
        # Collectives are priced over the GPU's own link: a slower one is that many more bytes.
        stretch = own_link_bytes_per_s(model.run.hardware) / self.link_bytes_per_s(model)
        out: list[Operation] = []
        for op in operations:
            if op.kind != "moe_gemm":
                out.append(op)
                continue
            out.append(self._one_rank(op, tokens))
            if op.name == "experts_down":  # once per block, and its output is as wide as a token
                out.append(self._exchange(op, tokens, stretch))
        return tuple(out)

    def _one_rank(self, op: Operation, tokens: Array) -> Operation:
        n, k = float(np.max(op.shape["experts"])), float(np.max(op.shape["top_k"]))
        fullest = self.fullest(tokens, k)
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

    def fullest(self, tokens: Array, top_k: float) -> Array:
        """Load of the fullest rank over the mean, ``tokens`` on each of the ranks.

        tokens x k x ep assignments fall on ep ranks; the largest of ep Poisson counts of mean
        m = tokens x k is about m + sqrt(2 m ln ep). No rank can take more than all of them.
        """
        spread = np.sqrt(2.0 * log(self.ep) / (np.asarray(tokens) * top_k))
        return np.minimum(1.0 + spread, float(self.ep))

    def _exchange(self, op: Operation, tokens: Array, stretch: float) -> Operation:
        """Dispatch and combine, each k d b (ep - 1) / ep bytes per token over the fullest link."""
        width, k = float(np.max(op.shape["n"])), float(np.max(op.shape["top_k"]))
        bytes_each = 2.0 * width
        message = np.asarray(tokens) * self.fullest(tokens, k) * (k * bytes_each * stretch)
        return Operation(
            name="all_to_all", kind="collective", count=2 * op.count,
            link_bytes=message * ((self.ep - 1) / self.ep), dtype=op.dtype,
            shape={"message_bytes": message, "n_gpus": float(self.ep)},
            formula="k d b (ep - 1) / ep bytes per token, dispatch and combine, fullest rank",
        )  # fmt: skip

    def applied(self, table: "StepTable", model: "Model") -> "StepTable":
        """The tables of a pipeline or context-parallel engine."""
        lanes = self.pp * self.cp
        if lanes == 1:
            return table
        uneven = self._stage_share(model) * self.pp
        shift = 1 << table.prompt_shift
        grid: Array = np.arange(0.0, len(table.prompt_s)) * float(shift)
        exchange = [] if self.cp == 1 else np.asarray(self.ring_s(model, grid)).tolist()
        sends = [self._sends_s(model, m) for m in range(table.max_batch + 1)]

        def stretched(lists: list[list[float]], scale: float, extra: bool) -> list[list[float]]:
            out: list[list[float]] = [[]]
            for n in range(1, table.max_batch * lanes + 1):
                m = ceil(n / lanes)
                more = sends[m] + self.decode_exchange_s(model, n) if extra else 0.0
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
            prefix_s=[x * uneven / lanes for x in table.prefix_s],
            exchange_s=exchange,
        )

    def _tokens_s(self, table: "StepTable", model: "Model", tokens: float, uneven: float) -> float:
        tokens = max(tokens, 1.0)  # a micro-batch without tokens is none
        low = int(tokens)
        here = table.token_s(low)
        if tokens > low:
            here += (table.token_s(low + 1) - here) * (tokens - low)
        return here * uneven + self._sends_s(model, tokens)

    def drain_s(self, table: "StepTable", prompt: Array, cached: Array) -> Array:
        """From the end of the iteration with the last tokens of each prompt to its first token.

        An iteration of the tables moves pp micro-batches by one stage each, so the last chunk still
        has pp - 1 of its pp stages to go. A prompt of one chunk may also pass whole, which is
        faster where the weights take longer than its tokens. Shape: that of ``prompt``.
        """
        prompts = np.asarray(prompt)
        last = np.minimum(prompts - cached, float(table.chunk_tokens))
        mixing = table.mixing_s(prompts, prompts - last)
        known = np.unique(np.append(np.geomspace(1.0, table.chunk_tokens, 257).round(), 1.0))
        times = np.array([table.token_s(int(t)) for t in known.tolist()])
        cut = np.interp(last, known, times)
        in_chunks = (cut + mixing) * ((self.pp - 1) / self.pp)
        whole = np.interp(last * self.pp, known, times) - cut + (self.pp - 1) * mixing
        whole = np.where(last * self.pp <= table.chunk_tokens, whole, np.inf)
        least: Array = np.minimum(in_chunks, whole)
        return least

    def _sends_s(self, model: "Model", tokens: float) -> float:
        """Activations of a micro-batch over pp - 1 borders."""
        if self.pp == 1:
            return 0.0
        bytes_each = model.architecture.d_model * 2.0
        wire = tokens * bytes_each / (self.link_bytes_per_s(model) * COLLECTIVE_FRACTION[1])
        return (self.pp - 1) * (COLLECTIVE_LATENCY_S[1] + wire)

    def ring_s(self, model: "Model", tokens: Array) -> Array:
        """The whole K and V of so many tokens past every rank: cp - 1 of cp parts of them over
        each GPU's link, whatever the method keeps once the prompt is done.
        """
        from costmodel.memory import state_of

        whole = replace(model.run, stack=parse_method("full"))
        one = np.float64(1.0)
        first = replace(model.point(one, one, one), prompt_tokens=one, cached_tokens=one)
        counts = np.maximum(np.asarray(tokens), 1.0)
        point = replace(
            first, prompt_tokens=counts, cached_tokens=counts, reserved_tokens=counts + 1.0
        )
        state = np.broadcast_to(state_of(whole, point)[0], np.shape(tokens))
        fixed = float(np.max(state_of(whole, first)[0]))  # recurrent state stays where it is
        rate = self.link_bytes_per_s(model) * COLLECTIVE_FRACTION[1]
        return np.maximum(state - fixed, 0.0) * ((self.cp - 1) / self.cp / rate)

    def decode_exchange_s(self, model: "Model", sequences: float) -> float:
        """Per layer with a cache: queries of all sequences to every rank, partial results back,
        each about as wide as the model's residual stream.
        """
        if self.cp == 1:
            return 0.0
        width = 2.0 * model.architecture.d_model / model.run.tp
        message = sequences * width * (self.cp - 1) / self.cp
        wire = message / (self.link_bytes_per_s(model) * COLLECTIVE_FRACTION[1])
        layers = sum(g.n_layers for g in model.run.mixer_groups if g.mixer.HAS_KV)
        return layers * 2.0 * (COLLECTIVE_LATENCY_S[1] + wire)


def own_link_bytes_per_s(hardware: "HardwareProfile") -> float:
    """GPU to GPU in one node, one direction; over the host where there is no link."""
    return hardware.link_bytes_per_s or hardware.host_link_bytes_per_s or hardware.hbm_bytes_per_s


def _expert_bytes(model: "Model") -> float:
    """Stored bytes of routed experts on one rank."""
    return sum(
        matmul.stored_bytes * count for _, count, matmuls in model.run.experts for matmul in matmuls
    )

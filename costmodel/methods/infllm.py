"""InfLLM: a local window on the GPU, distant blocks in host memory, the best of them fetched.

Xiao et al., arXiv 2402.04617; code thunlp/InfLLM ``context_manager.py``. The first I tokens and
the last W are always attended. Whatever leaves the window is cut into blocks of p tokens, moved to
the host and represented by one vector (mean of the repr_topk keys with the largest local scores,
all query heads); a chunk of queries (one token when decoding) attends to its top-k blocks.

With T tokens: i = min(I, max(T - W, 0)), n = max(0, floor((T - I - W) / p)) blocks, rem = T - i -
n p tokens not yet in a block (the window included). Bytes per layer and sequence, kv = K (Hk + Hv)
b:
    GPU   kv [min(T, W) + i + rem + (topk p + chunk + p + I) + cached p]
          + N Hk b cap(n) + N b rem,   cap(n) = 16 * 2^max(0, ceil(log2(n / 16)))
    host  kv n p
The terms: window; first tokens; remainder (so the window is held twice); attention buffer; GPU
block cache; representatives; local scores.

Blocks on the GPU are taken as uniform among the n, so a lookup misses topk max(0, 1 - cached / n)
of its blocks (no locality; measured runs miss less). ``ideal``: one fused kernel per chunk and the
score pass; ``reference``: concatenations, fp32 rotation of the window and buffer copies as well.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.methods.base import (
    PRESETS,
    AbstractMethod,
    Mask,
    Preset,
    Stage,
    State,
    attention_of,
    check_at_least,
    covers_unbounded,
    layer_bytes,
)
from costmodel.methods.chains import elementwise, host_link, select
from costmodel.mixers import AbstractMixer, Attention
from costmodel.mixers.attention import decode_attention, prefill_attention
from costmodel.operation import Array, Operation, Operations, causal_pairs
from costmodel.workload import Point

_MANAGER = "thunlp/InfLLM inf_llm/attention/context_manager.py"
_ROPE = "thunlp/InfLLM inf_llm/attention/rope.py in fp32"


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """Budgets in tokens and blocks; scalars, or arrays for a preset."""

    init: Array
    local: Array
    topk: Array
    cached: Array


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class InfLLM(AbstractMethod):
    """Block retrieval from host memory, with the upstream configuration for Llama-3."""

    NAME: ClassVar[str] = "infllm"
    TITLE: ClassVar[str] = "InfLLM: local window and retrieved blocks from host memory"
    REFERENCE: ClassVar[str] = "Xiao et al., arXiv 2402.04617; github.com/thunlp/InfLLM"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"prefill", "evict", "store"})
    ACTS: ClassVar[str] = "during prefill, chunk by chunk, and on every decoded token"
    DOES_NOT_SAVE: ClassVar[str] = (
        "host memory (the whole cache is there), weights or MLP work; its GPU buffers hold about "
        "twice the nominal budget, and every lookup waits for the host."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = ("InfLLM repository (Triton)", "MInference")
    PARAMETERS: ClassVar[dict[str, str]] = {
        "block_tokens": "tokens per block; larger blocks are fewer but fetched whole",
        "init_tokens": "first tokens always attended; fewer is smaller",
        "local_tokens": "window always attended; fewer is smaller",
        "topk": "blocks a chunk of queries attends to; fewer is smaller",
        "repr_topk": "keys averaged into a block's representative; no effect on size",
        "cached_blocks": "blocks held on the GPU; more is larger and saves transfers",
        "chunk_tokens": "prompt tokens that share one lookup; larger is a larger buffer",
        "preset": "the benchmark's 2x, 4x, 6x or 8x budgets, from the prompt's length",
    }
    STATE_FORMULA: ClassVar[str] = (
        "GPU: B {K (Hk + Hv) b [min(T, W) + i + rem + topk p + chunk + p + I + cached p] "
        "+ N Hk b cap(n) + N b rem}; host: B K (Hk + Hv) b n p"
    )
    PRESET_SETS: ClassVar[tuple[str, ...]] = (
        "init_tokens",
        "local_tokens",
        "topk",
        "cached_blocks",
    )

    block_tokens: int = 128
    init_tokens: int = 128
    local_tokens: int = 4096
    topk: int = 16
    repr_topk: int = 4
    cached_blocks: int = 32
    chunk_tokens: int = 512
    preset: Preset | None = None

    def __post_init__(self) -> None:
        check_at_least(
            "infllm",
            1,
            block_tokens=self.block_tokens,
            local_tokens=self.local_tokens,
            topk=self.topk,
            repr_topk=self.repr_topk,
            chunk_tokens=self.chunk_tokens,
        )
        check_at_least("infllm", 0, init_tokens=self.init_tokens)
        check_at_least("infllm", self.topk, cached_blocks=self.cached_blocks)

    def budget(self, prompt_tokens: Array) -> Budget:
        """Budgets; a preset splits a share of the prompt: 2.1 % first tokens, 32.4 % blocks."""
        if self.preset is None:
            return Budget(
                float(self.init_tokens),
                float(self.local_tokens),
                float(self.topk),
                float(self.cached_blocks),
            )
        total = np.floor(np.asarray(prompt_tokens, dtype=np.float64) * PRESETS[self.preset])
        init = np.floor(0.021 * total)
        blocks = np.floor(np.floor(0.324 * total) / self.block_tokens)
        local = np.maximum(float(self.chunk_tokens), total - init - blocks * self.block_tokens)
        return Budget(init, local, blocks, blocks)

    def resolved(self, context_tokens: int) -> "InfLLM":
        """The preset's budgets for this context (at least one block, which the fields require)."""
        if self.preset is None:
            return self
        budget = self.budget(float(context_tokens))
        return replace(
            self,
            init_tokens=int(budget.init),
            local_tokens=int(budget.local),
            topk=max(1, int(budget.topk)),
            cached_blocks=max(1, int(budget.cached)),
            preset=None,
        )

    def covers(self, mixer: AbstractMixer) -> bool:
        """Attention whose cache grows without bound."""
        return covers_unbounded(mixer)

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """First tokens, window and top-k blocks together hold the cache."""
        budget = self.budget(prompt_tokens)
        held = budget.init + budget.local + budget.topk * self.block_tokens
        return np.asarray(cached_tokens) <= held

    def counts(self, point: Point) -> tuple[Array, Array, Array]:
        """(first tokens, blocks on the host, tokens of the remainder)."""
        budget = self.budget(point.prompt_tokens)
        t = np.asarray(point.cached_tokens, dtype=np.float64)
        init = np.minimum(budget.init, np.maximum(t - budget.local, 0.0))
        n = np.maximum(np.floor((t - budget.init - budget.local) / self.block_tokens), 0.0)
        return init, n, t - init - n * self.block_tokens

    def device_bytes(self, mixer: Attention, point: Point) -> Array:
        """GPU bytes of one layer, whole batch."""
        budget = self.budget(point.prompt_tokens)
        init, n, rem = self.counts(point)
        p = float(self.block_tokens)
        buffer = budget.topk * p + self.chunk_tokens + p + budget.init
        window = np.minimum(point.cached_tokens, budget.local)
        tokens = window + init + rem + buffer + budget.cached * p
        doublings = np.ceil(np.log2(np.maximum(n, 1.0) / 16.0))
        capacity = 16.0 * 2.0 ** np.maximum(doublings, 0.0)
        per_head = capacity * mixer.head_dim + rem
        heads = point.batch * mixer.n_heads
        return layer_bytes(mixer, point, tokens) + heads * per_head * point.kv_element_bytes

    def state(self, group: MixerGroup, point: Point) -> State:
        """Window, buffers and representatives on the GPU; blocks on the host."""
        mixer = attention_of(group)
        _, n, _ = self.counts(point)
        return State(
            group.n_layers * self.device_bytes(mixer, point),
            host=group.n_layers * layer_bytes(mixer, point, n * self.block_tokens),
        )

    def _misses(self, point: Point, n: Array) -> Array:
        """Blocks a lookup fetches: uniform choice among n, ``cached`` of them on the GPU."""
        budget = self.budget(point.prompt_tokens)
        wanted = np.minimum(budget.topk, n)
        return wanted * np.maximum(1.0 - budget.cached / np.maximum(n, 1.0), 0.0)

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Chunks: window, first tokens, retrieved blocks and the tokens not yet in a block.

        The latter are (p + chunk) / 2 on average: up to p left by the chunk before, and what leaves
        the window within the chunk.
        """
        mixer = attention_of(group)
        budget = self.budget(point.prompt_tokens)
        s = point.prompt_tokens
        p = float(self.block_tokens)
        _, n, _ = self.counts(point.at(s))
        local_pairs = causal_pairs(s, budget.local)
        seen = budget.local + budget.init + budget.topk * p + (p + self.chunk_tokens) / 2
        pairs = causal_pairs(s, seen)
        reference = point.level == "reference"
        main = prefill_attention(
            mixer,
            point,
            pairs=pairs,
            executed_pairs=pairs,
            state_bytes=0.0,
            source=f"{_MANAGER} _append, Triton multi-stage kernel" if reference else "",
            formula="window + first + topk p + (p + chunk) / 2 keys per query",
            shape={"window_tokens": seen},
        )
        size = layer_bytes(mixer, point, s)
        chunks = np.ceil(s / self.chunk_tokens)
        state = self.device_bytes(mixer, point.at(s))
        main = replace(
            main,
            activation_bytes=main.activation_bytes + size,
            state_bytes=state,
            transient_bytes=main.transient_bytes + size,
        )
        operations = (
            main,
            _local_scores(mixer, point, local_pairs, _MANAGER if reference else ""),
            self._lookup(mixer, point, n / 2, count=chunks),
            *self._links(mixer, point, n / 2, count=chunks),
            host_link(
                "offload_blocks",
                layer_bytes(mixer, point, n * p),
                pinned=True,
                messages=np.maximum(2 * n, 1.0),
                source=f"{_MANAGER} MemoryUnit" if reference else "",
                formula="every block's K and V to the host once",
            ),
        )
        if not reference:
            return operations
        return operations + self._reference_chunk(mixer, point, budget, chunks)

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Lookup, transfers, attention over what is held and what was fetched."""
        mixer = attention_of(group)
        budget = self.budget(point.prompt_tokens)
        init, n, rem = self.counts(point)
        p = float(self.block_tokens)
        tokens = init + rem + np.minimum(budget.topk, n) * p
        window = np.minimum(point.cached_tokens, budget.local)
        heads = point.batch * mixer.n_heads
        reference = point.level == "reference"
        attention = decode_attention(
            mixer,
            point,
            read_tokens=tokens,
            executed_tokens=tokens + 1 + window / 2,
            read_bytes=layer_bytes(mixer, point, tokens),
            # the new token goes into the window and into the remainder
            written_bytes=layer_bytes(mixer, point, 2.0),
            workspace_bytes=heads * (window + rem) * point.kv_element_bytes,
            launches=3 if reference else 1,
            source=f"{_MANAGER} _append, Triton multi-stage kernel" if reference else "",
            formula="first + remainder + topk p tokens read once; scores of the window again",
        )
        operations = (
            self._lookup(mixer, point, n, count=1.0),
            *self._links(mixer, point, n, count=1.0),
            attention,
        )
        if not reference:
            return operations
        return operations + self._reference_chunk(mixer, point, budget, 1.0, step=True)

    def _lookup(self, mixer: Attention, point: Point, n: Array, *, count: Array) -> Operation:
        """Mean query of all heads against n representatives, top-k; shared by all heads."""
        size = point.batch * n * (mixer.n_heads * mixer.head_dim)
        reference = point.level == "reference"
        return select(
            "block_lookup",
            rows=point.batch,
            length=n,
            keep=self.budget(point.prompt_tokens).topk,
            state_bytes=size * point.kv_element_bytes,
            executed_flops=2.0 * size,
            dtype=point.dtype,
            launches=4 if reference else 1,
            count=count,
            source=f"{_MANAGER} calc_block_topk" if reference else "",
            formula="N Hk b per representative read, 2 N Hk FLOPs each",
        )

    def _links(
        self, mixer: Attention, point: Point, n: Array, *, count: Array
    ) -> Operations:
        """Blocks that are not on the GPU, fetched; upstream the host waits for the indices."""
        reference = point.level == "reference"
        missed = self._misses(point, n)
        fetch = host_link(
            "fetch_blocks",
            layer_bytes(mixer, point, missed * self.block_tokens),
            pinned=True,
            messages=np.maximum(2 * missed, 1.0),
            count=count,
            source=f"{_MANAGER} MemoryUnit.load" if reference else "",
            formula="topk max(0, 1 - cached / n) blocks of K and V",
        )
        if not reference:
            return (fetch,)
        sync = host_link(
            "indices_to_host",
            point.batch * self.budget(point.prompt_tokens).topk * 8.0,
            pinned=False,
            count=count,
            source=f"{_MANAGER} calc_block_topk .cpu().tolist()",
            formula="8 bytes per index; the host waits for them",
        )
        return sync, fetch

    def _reference_chunk(
        self,
        mixer: Attention,
        point: Point,
        budget: Budget,
        count: Array,
        *,
        step: bool = False,
    ) -> Operations:
        """Copies around the kernel: per chunk of the prompt, or per decode step."""
        new = 1.0 if step else float(self.chunk_tokens)
        p = float(self.block_tokens)
        window = np.minimum(point.cached_tokens, budget.local)
        _, n, rem = self.counts(point)
        cat_tokens = window + rem + (1.0 if step else 0.0)
        rotated = point.batch * (window + new) * (mixer.n_kv_heads * mixer.head_dim)
        held = np.minimum(budget.topk, n) * p + np.maximum(rem - window, 0.0)
        size = layer_bytes(mixer, point, cat_tokens)
        return (
            elementwise(
                "window_and_remainder_cat",
                workspace_bytes=2 * size,
                transient_bytes=size,
                launches=6,
                # upstream concatenates once per forward of up to 8192 tokens
                count=1.0 if step else np.ceil(point.prompt_tokens / 8192.0),
                source=f"{_MANAGER} append torch.cat",
                formula="window, remainder and local scores read and written",
            ),
            elementwise(
                "rotate_window",
                count=count,
                vector_flops=3 * rotated,
                workspace_bytes=rotated * (2 * point.element_bytes + 28),
                transient_bytes=rotated * 8,
                launches=6,
                source=_ROPE,
                formula="to fp32 (b, 4), two products (4, 4), sum (8, 4), cast (4, b)",
            ),
            elementwise(
                "fill_buffer",
                count=count,
                workspace_bytes=2 * layer_bytes(mixer, point, held),
                launches=4,
                source=f"{_MANAGER} get_global_hidden_and_mask",
                formula="retrieved blocks and the remainder copied into the attention buffer",
            ),
        )


def _local_scores(mixer: Attention, point: Point, pairs: Array, source: str) -> Operation:
    """Q K^T of the window again, summed over queries: what representatives are chosen by."""
    s = point.prompt_tokens
    heads = point.batch * mixer.n_heads
    return Operation(
        name="local_scores",
        kind="prefill_attention",
        executed_flops=heads * pairs * (2.0 * mixer.head_dim),
        vector_flops=2 * heads * pairs,
        activation_bytes=heads * s * (mixer.head_dim * point.element_bytes),
        workspace_bytes=heads * s * point.kv_element_bytes,
        transient_bytes=heads * s * point.kv_element_bytes,
        dtype=point.dtype,
        shape={
            "batch": point.batch,
            "q_len": s,
            "kv_len": s,
            "pairs": pairs,
            "n_heads": mixer.n_heads,
            "n_kv_heads": mixer.n_kv_heads,
            "head_dim": mixer.head_dim,
            "v_head_dim": 0.0,
            "window_tokens": mixer.limit_tokens,
        },
        source=f"{source} get_score=True, _score_kernel" if source else "",
        formula="2 Hk N per pair of the window: half of its multiplications again",
    )

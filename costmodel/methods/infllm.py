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
score pass; ``reference``: concatenations, fp32 rotation of the window and buffer copies as well,
and the host waits for the indices of every chunk and layer, so that its starting of kernels adds to
their running. Its attention is the Triton kernel; plain torch runs the authors' torch form, which
holds a chunk's scores in memory and takes what keys received from them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.fused_kernels import fused_step
from costmodel.methods.base import (
    PRESETS,
    AbstractMethod,
    Mask,
    Preset,
    Scope,
    Stage,
    State,
    attention_of,
    check_at_least,
    layer_bytes,
    within_pass,
)
from costmodel.methods.block_retrieval import (
    MANAGER,
    MODEL_CHUNK,
    Budget,
    chunk_counts,
    copies,
    in_chunks,
    links,
    looked_up,
    lookup,
    prompt_copies,
)
from costmodel.methods.chains import (
    alive_around_bytes,
    blocked_transient_bytes,
    host_link,
    score_pass,
)
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention, prefill_attention
from costmodel.operation import Array, Operations, causal_pairs
from costmodel.workload import Point

#: Window, first tokens and looked-up blocks in one attention look like a window to a fitted family.
_UNFITTED = "no table of measured kernels holds InfLLM's attention over window, first and blocks"
_KERNEL = f"{MANAGER} _append, Triton multi-stage kernel"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class InfLLM(AbstractMethod):
    """Block retrieval from host memory, with the upstream configuration for Llama-3."""

    NAME: ClassVar[str] = "infllm"
    TITLE: ClassVar[str] = "InfLLM: local window and retrieved blocks from host memory"
    REFERENCE: ClassVar[str] = "Xiao et al., arXiv 2402.04617; github.com/thunlp/InfLLM"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"prefill", "evict", "store"})
    ACTS: ClassVar[str] = "during prefill, chunk by chunk, and on every decoded token"
    SCOPE: ClassVar[Scope] = "unbounded"
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
        """Budgets; a preset splits a share of the prompt: 2.1 % first tokens, 32.4 % blocks
        (at least one), the rest window (at least a chunk).
        """
        p, chunk = float(self.block_tokens), float(self.chunk_tokens)
        if self.preset is None:
            return Budget(
                init=float(self.init_tokens),
                local=float(self.local_tokens),
                topk=float(self.topk),
                cached=float(self.cached_blocks),
                block_tokens=p,
                chunk_tokens=chunk,
            )
        total = np.floor(np.asarray(prompt_tokens, dtype=np.float64) * PRESETS[self.preset])
        init = np.floor(0.021 * total)
        blocks = np.maximum(np.floor(np.floor(0.324 * total) / p), 1.0)
        return Budget(
            init=init,
            local=np.maximum(chunk, total - init - blocks * p),
            topk=blocks,
            cached=blocks,
            block_tokens=p,
            chunk_tokens=chunk,
        )

    def resolved(self, context_tokens: int) -> "InfLLM":
        """The preset's budgets for this context."""
        if self.preset is None:
            return self
        budget = self.budget(float(context_tokens))
        return replace(
            self,
            init_tokens=int(budget.init),
            local_tokens=int(budget.local),
            topk=int(budget.topk),
            cached_blocks=int(budget.cached),
            preset=None,
        )

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

    def fed_tokens(self, point: Point) -> float:
        """Upstream feeds the model chunks of 8192 tokens, cut into ``chunk_tokens`` for lookups."""
        return MODEL_CHUNK

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
        _, n, rem = self.counts(point.at(s))
        scores = point.batch * mixer.n_heads * s * point.kv_element_bytes
        local_pairs = causal_pairs(s, budget.local)
        seen = budget.local + budget.init + budget.topk * p + (p + self.chunk_tokens) / 2
        pairs = causal_pairs(s, seen)
        reference = point.level == "reference"
        chunks = np.ceil(s / self.chunk_tokens)
        # over the prompt there are n / 2 blocks on average
        executed, scored = pairs, n / 2
        unfused = bool(point.engine.score_block_tokens)
        if unfused:  # the window's probabilities are at hand: no second pass for local scores
            executed, scored = (
                # the published torch form takes a chunk at once, and W keys before its first query
                chunk_counts(s, budget, float(self.chunk_tokens), spare=0.0)
                if reference
                else chunk_counts(s, budget, float(point.engine.score_block_tokens))
            )
            scored = scored / chunks
        main = prefill_attention(
            mixer,
            point,
            pairs=pairs,
            executed_pairs=executed,
            state_bytes=0.0,
            source=_KERNEL if reference else "",
            formula="window + first + topk p + (p + chunk) / 2 keys per query",
            unfitted=_UNFITTED,
            shape={"window_tokens": seen},
        )
        size = layer_bytes(mixer, point, s)
        init, _, _ = self.counts(point.at(s))
        window = np.minimum(s, budget.local)
        main = replace(
            main,
            activation_bytes=main.activation_bytes + size,
            state_bytes=layer_bytes(mixer, point, window + init + rem),
            transient_bytes=main.transient_bytes + size,
        )
        (main,) = within_pass((main,), point)
        if unfused:
            # also rotated twice (near and far), and what every key received
            alive = (
                self._stages_alive(mixer, point, seen)
                if reference
                else blocked_transient_bytes(
                    mixer,
                    point,
                    seen + float(self.chunk_tokens),
                    block=min(float(point.engine.score_block_tokens), float(self.chunk_tokens)),
                )
            )
            heads = mixer.n_heads * mixer.head_dim
            copies_alive = point.batch * s * (heads * point.element_bytes + mixer.n_heads * 4.0)
            main = replace(main, transient_bytes=alive + copies_alive)
        local = score_pass(
            mixer,
            point,
            local_pairs,
            name="local_scores",
            keys=budget.local,
            result_bytes=scores,
            transient_bytes=scores,
            source=f"{MANAGER} get_score=True, _score_kernel" if reference else "",
            unfitted=_UNFITTED,
        )
        if reference:
            queries = np.minimum(s, float(self.chunk_tokens))
            main = in_chunks(main, chunks, queries, seen, launches=3.0)
            local = in_chunks(local, chunks, queries, budget.local, launches=1.0)
        operations = (
            main,
            *(() if unfused else (local,)),
            lookup(mixer, point, budget, scored, count=chunks),
            *links(mixer, point, budget, n / 2, count=chunks),
            host_link(
                "offload_blocks",
                layer_bytes(mixer, point, n * p),
                pinned=True,
                messages=np.maximum(2 * n, 1.0),
                source=f"{MANAGER} MemoryUnit" if reference else "",
                formula="every block's K and V to the host once",
            ),
        )
        if not reference:
            return operations
        return operations + prompt_copies(mixer, point, budget, n_blocks=n, remainder=rem)

    def _stages_alive(self, mixer: Attention, point: Point, seen: Array) -> Array:
        """Bytes alive where a chunk's scores are in memory: masked, joined, their softmax, and a
        stage's masked copy; beside K and V repeated to all query heads.
        """
        queries = np.minimum(float(self.chunk_tokens), point.prompt_tokens)
        keys = np.minimum(seen + queries / 2, point.prompt_tokens)
        scores = point.batch * mixer.n_heads * queries * keys * (4 * point.element_bytes)
        repeated = layer_bytes(mixer, point, keys) * (mixer.n_heads / mixer.n_kv_heads)
        return scores + repeated + alive_around_bytes(mixer, point)

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
        unfused = bool(point.engine.score_block_tokens)
        # a fused kernel's probabilities are gone: scores of the window again; the published torch
        # form also multiplies with the token that leaves the window
        again = window / 2 if not unfused else float(reference)
        attention = decode_attention(
            mixer,
            point,
            read_tokens=tokens,
            executed_tokens=tokens + 1 + again,
            read_bytes=layer_bytes(mixer, point, tokens),
            # the new token goes into the window and into the remainder
            written_bytes=layer_bytes(mixer, point, 2.0),
            workspace_bytes=heads * (window + rem) * point.kv_element_bytes,
            launches=3 if reference else 1,
            source=_KERNEL if reference else "",
            formula="first + remainder + topk p tokens read once; scores of the window again",
            unfitted=_UNFITTED,
        )
        look = lookup(mixer, point, budget, looked_up(budget, n), count=1.0)
        fetched = links(mixer, point, budget, n, count=1.0)
        if not reference:
            shape = {**attention.shape, "copied_tokens": np.minimum(budget.topk, n) * p}
            step = fused_step(point, "infllm", replace(attention, shape=shape), look)
            return (*step, *fetched)
        around = copies(
            mixer,
            point,
            budget,
            n_blocks=n,
            remainder=rem,
            new_tokens=1.0,
            count=1.0,
            cats=1.0,
        )
        return (look, *fetched, attention, *around)

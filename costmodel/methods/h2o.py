"""H2O: keep the heavy hitters (tokens with the largest summed attention) and the most recent
tokens.

Zhang et al., arXiv 2306.14048. Budgets are shares of the prompt: heavy = floor(hS), recent =
floor(rS), C = heavy + recent tokens per KV head, each with one fp32 score and one int32 position.

Three algorithms carry the name:
    slot       every KV head keeps C slots; a new token overwrites the lightest non-recent one
               (h2o_flexgen)
    real_drop  the new token is appended and the lightest gathered away on every step
               (h2o_hf/utils_real_drop; batch 1 upstream)
    mask       the cache stays whole and dropped tokens are masked, from the second token on
               (h2o_hf/utils_hh, the benchmark's harness): nothing is saved

State per layer: B K C [(Hk + Hv) b + 8]; mask: B K [T (Hk + Hv) b + 8 C once decoding has begun].
``ideal`` prefill sums the scores in a second, blockwise pass over Q K^T (O(S) memory);
``reference`` holds the N S S matrix. With GQA a KV head's score is the sum over its query heads.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.fused_kernels import fused_step
from costmodel.methods.base import (
    AbstractMethod,
    Mask,
    Preset,
    Scope,
    Stage,
    State,
    attention_of,
    check_fraction,
    kept,
    layer_bytes,
    not_stored,
)
from costmodel.methods.chains import (
    cache_cat,
    elementwise,
    gather_tokens,
    probability_bytes,
    score_pass,
    select,
)
from costmodel.methods.eager import eager_prompt, eager_step
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Point

#: Share of the prompt for heavy hitters and for recent tokens, each (arXiv 2407.01527).
_PRESET_SHARE = {"2x": 0.25, "4x": 0.125, "6x": 0.083, "8x": 0.0625}
_ENTRY_BYTES = 8.0  # fp32 score and int32 position
_FLEXGEN = "FMInference/H2O h2o_flexgen/flexgen/pytorch_backend.py"
_REAL_DROP = "FMInference/H2O h2o_hf/utils_real_drop/modify_llama.py"
_MASKED = "FMInference/H2O h2o_hf/utils_hh/modify_llama.py"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class H2O(AbstractMethod):
    """Heavy-hitter oracle."""

    NAME: ClassVar[str] = "h2o"
    TITLE: ClassVar[str] = "H2O: heavy hitters and recent tokens"
    REFERENCE: ClassVar[str] = "Zhang et al., arXiv 2306.14048; github.com/FMInference/H2O"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"prefill", "evict", "store"})
    ACTS: ClassVar[str] = "scores during prefill, evicts after it and on every decoded token"
    SCOPE: ClassVar[Scope] = "unbounded"
    DOES_NOT_SAVE: ClassVar[str] = (
        "prefill compute: scoring adds half of the attention's work and cannot use FlashAttention "
        "alone; the mask variant saves nothing at all."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = (
        "H2O repository: FlexGen fork (slot, OPT), Hugging Face (real_drop, batch 1)",
        "benchmark harness (mask)",
    )
    PARAMETERS: ClassVar[dict[str, str]] = {
        "variant": "slot (in place), real_drop (gather every step) or mask (saves nothing)",
        "heavy_fraction": "heavy hitters kept, share of the prompt; less is smaller",
        "recent_fraction": "recent tokens kept, share of the prompt; less is smaller",
        "preset": "the benchmark's 2x, 4x, 6x or 8x budgets",
    }
    STATE_FORMULA: ClassVar[str] = "B K C [(Hk + Hv) b + 8], C = floor(h S) + floor(r S)"
    PRESET_SETS: ClassVar[tuple[str, ...]] = ("heavy_fraction", "recent_fraction")

    variant: Literal["slot", "real_drop", "mask"] = "slot"
    heavy_fraction: float = 0.1
    recent_fraction: float = 0.1
    preset: Preset | None = None

    def __post_init__(self) -> None:
        check_fraction(
            "h2o", heavy_fraction=self.heavy_fraction, recent_fraction=self.recent_fraction
        )

    def resolved(self, context_tokens: int) -> "H2O":
        """The preset's shares."""
        if self.preset is None:
            return self
        share = _PRESET_SHARE[self.preset]
        return replace(self, heavy_fraction=share, recent_fraction=share, preset=None)

    def budget(self, prompt_tokens: Array) -> tuple[Array, Array]:
        """(heavy, recent) tokens kept; at least the newest token."""
        plain = self.resolved(0)
        s = np.asarray(prompt_tokens, dtype=np.float64)
        heavy = np.floor(s * plain.heavy_fraction)
        recent = heavy
        if plain.recent_fraction != plain.heavy_fraction:
            recent = np.floor(s * plain.recent_fraction)
        return heavy, np.maximum(recent, 1.0)

    def slots(self, point: Point) -> Array:
        """C: tokens a KV head keeps."""
        heavy, recent = self.budget(point.prompt_tokens)
        return kept(heavy + recent, point.cached_tokens)

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """Budgets of at least the cached tokens."""
        heavy, recent = self.budget(prompt_tokens)
        return heavy + recent >= np.asarray(cached_tokens)

    def state(self, group: MixerGroup, point: Point) -> State:
        """C tokens with scores and positions; the whole cache for ``mask``."""
        mixer = attention_of(group)
        slots = self.slots(point)
        entries = slots * point.batch * (mixer.n_kv_heads * _ENTRY_BYTES)
        if self.variant == "mask":
            decoding = np.asarray(point.cached_tokens) > point.prompt_tokens
            whole = layer_bytes(mixer, point, point.cached_tokens)
            return State(group.n_layers * (whole + np.where(decoding, entries, 0.0)))
        return State(group.n_layers * (layer_bytes(mixer, point, slots) + entries))

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Attention and the column sums of its probabilities."""
        mixer = attention_of(group)
        pairs = mixer.prompt_pairs(point.prompt_tokens)
        if self.variant == "mask":
            return attention
        if point.level == "ideal":
            second = _second_pass(mixer, point, pairs)
            return (*not_stored(attention, point), *fused_step(point, "prompt_scores", second))
        s = point.prompt_tokens
        scores = point.batch * mixer.n_heads * s * s
        b = point.element_bytes
        slot = self.variant == "slot"
        clone = 0.0 if slot else 2 * b * scores
        return (
            *eager_prompt(
                mixer, point, pairs=pairs, source=f"{_FLEXGEN} mha" if slot else _REAL_DROP
            ),
            elementwise(
                "sum_scores",
                vector_flops=scores,
                workspace_bytes=b * scores + clone,
                transient_bytes=scores * (2 * b) + layer_bytes(mixer, point, s),
                launches=2,
                source=f"{_FLEXGEN} _heavy_hitter_pruning torch.sum"
                if slot
                else f"{_REAL_DROP} attn_weights.clone(), _update_hh_score",
                formula="B N S S probabilities read" + ("" if slot else " and cloned"),
            ),
        )

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Choose the heavy hitters and copy them with the recent tokens."""
        if self.variant == "mask":
            return ()
        mixer = attention_of(group)
        heavy, _ = self.budget(point.prompt_tokens)
        c = self.slots(point.at(point.prompt_tokens))
        rows = point.batch * mixer.n_kv_heads
        reference = point.level == "reference"
        slot = self.variant == "slot"
        source = f"{_FLEXGEN} _heavy_hitter_pruning" if slot else f"{_REAL_DROP} H2OKVCache"
        source = source if reference else ""
        return (
            select(
                "select_heavy",
                rows=rows,
                length=point.prompt_tokens,
                keep=heavy,
                workspace_bytes=rows * point.prompt_tokens * 4.0,
                launches=2,
                source=source,
                formula="top-k over S scores per KV head",
            ),
            gather_tokens(
                mixer,
                point,
                c,
                # the boolean mask reads every token, an index only those it wants
                read_tokens=point.prompt_tokens if reference and not slot else None,
                extra_bytes=rows * c * _ENTRY_BYTES,
                source=source,
            ),
        )

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Attention over the kept tokens, the scores updated, one token replaced."""
        mixer = attention_of(group)
        c = self.slots(point)
        tokens = point.cached_tokens if self.variant == "mask" else c
        if point.level == "reference":
            return self._reference_decode(mixer, point, tokens, c)
        attention = decode_attention(
            mixer,
            point,
            read_tokens=tokens,
            executed_tokens=tokens + 1,
            read_bytes=layer_bytes(mixer, point, tokens),
            written_bytes=layer_bytes(mixer, point, 1.0),
            name="scored_attention",
            # probabilities of all query heads, needed once the row's sum is known
            workspace_bytes=point.batch * mixer.n_heads * tokens * (2.0 * probability_bytes(point)),
            formula="kept tokens read once; B N C probabilities written and read",
        )
        update = _update_scores(mixer, point, c)
        if self.variant == "slot":
            return fused_step(point, "h2o", attention, update)
        return attention, update

    def _reference_decode(
        self, mixer: Attention, point: Point, tokens: Array, c: Array
    ) -> Operations:
        b = point.element_bytes
        probabilities = point.batch * mixer.n_heads * (tokens + 1)
        if self.variant == "slot":
            source = f"{_FLEXGEN} mha_gen"
            size = layer_bytes(mixer, point, tokens)
            copy = elementwise(
                "permute_copy",
                state_bytes=size,
                workspace_bytes=size,
                transient_bytes=size,
                launches=2,
                source=f"{source} permute().reshape()",
                formula="slots x heads to heads x slots: read and written",
            )
            return (
                copy,
                *eager_step(mixer, point, tokens, source=source, from_state=False),
                replace(_update_scores(mixer, point, c), launches=6, source=source),
            )
        source = _REAL_DROP if self.variant == "real_drop" else _MASKED
        cat = cache_cat(mixer, point, tokens, source=f"{source} torch.cat of keys, values")
        chain = (cat, *eager_step(mixer, point, tokens, source=source))
        scores = elementwise(
            "accumulate_scores",
            vector_flops=2 * probabilities,
            state_bytes=2 * _ENTRY_BYTES * point.batch * mixer.n_kv_heads * c,
            workspace_bytes=probabilities * (2 * b + b + 2 * b),
            transient_bytes=probabilities * 2 * b,
            launches=6,
            source=f"{source} attn_weights.clone(), sums over batch and queries",
            formula="B N T: clone (b, b), sum (b), add (b, b)",
        )
        rows = point.batch * mixer.n_kv_heads
        topk = select(
            "select_heavy",
            rows=rows,
            length=tokens + 1,
            keep=c,
            workspace_bytes=rows * (tokens + 1) * (4.0 + 1.0),
            launches=6,
            source=source,
            formula="top-k, sort and a boolean mask over the cached tokens",
        )
        if self.variant == "mask":
            mask = elementwise(
                "mask_scores",
                workspace_bytes=probabilities * 2 * b,
                transient_bytes=probabilities * b,
                launches=2,
                source=f"{source} attn_weights * mask_bottom",
                formula="B N T (b, b)",
            )
            return (*chain, mask, scores, topk)
        gather = elementwise(
            "gather_kept",
            workspace_bytes=2 * layer_bytes(mixer, point, tokens + 1),
            transient_bytes=layer_bytes(mixer, point, tokens),
            launches=4,
            source=f"{source} past_key_values[mask]",
            formula="C + 1 tokens read, C written, every step",
        )
        return (*chain, scores, topk, gather)


def _second_pass(mixer: Attention, point: Point, pairs: Array) -> Operation:
    """Column sums per KV head; needs the row sums of every query head. O(S) memory."""
    s = point.prompt_tokens
    sums = point.batch * s * (4.0 * (mixer.n_heads + mixer.n_kv_heads))
    alive = sums + layer_bytes(mixer, point, s)
    if point.engine.score_block_tokens:  # the scaled queries, and which scores of a block exist
        block = np.minimum(point.engine.score_block_tokens, s)
        alive = point.batch * s * (mixer.n_heads * mixer.head_dim * point.element_bytes)
        alive = alive + point.batch * s * 4.0 * mixer.n_kv_heads + block * s
    return score_pass(
        mixer, point, pairs, name="score_pass", result_bytes=sums, transient_bytes=alive
    )


def _update_scores(mixer: Attention, point: Point, c: Array) -> Operation:
    """Scores of C tokens read and written, the lightest found, its slot taken."""
    rows = point.batch * mixer.n_kv_heads
    return select(
        "update_and_evict",
        rows=rows,
        length=c,
        keep=1.0,
        state_bytes=rows * (c * (4.0 + 4.0) + _ENTRY_BYTES),
        formula="C fp32 scores read and written per KV head, argmin, one slot overwritten",
    )

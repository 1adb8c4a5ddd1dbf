"""TOVA: a cache of C tokens; every step drops the one the last query attended to least.

Oren et al., arXiv 2401.06104; code schwartz-lab-NLP/TOVA. Scores are the last query's
probabilities, averaged over heads, so all heads of a layer keep the same tokens. The prompt is
attended exactly, then cut to C; afterwards each decoded token evicts one.

State per layer: B K min(T, C) (Hk + Hv) b. ``ideal`` recomputes one row of scores after the prompt
and overwrites a slot. ``reference`` attends the prompt eagerly, stores keys before rotation and
rotates all of them on every step, and gathers the whole cache on every step; it also keeps the
position of every token, B min(T, C) 8 bytes a layer.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.fused_kernels import fused_step
from costmodel.methods.base import (
    AbstractMethod,
    Mask,
    Scope,
    Stage,
    State,
    attention_of,
    check_at_least,
    kept,
    layer_bytes,
    not_stored,
)
from costmodel.methods.chains import (
    cache_cat,
    elementwise,
    gather_tokens,
    probability_bytes,
    select,
)
from costmodel.methods.eager import eager_prompt, eager_step, rotate_keys
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Array, Operations
from costmodel.workload import Point

_CACHE = "schwartz-lab-NLP/TOVA src/tova_cache.py"
_LLAMA = "schwartz-lab-NLP/TOVA src/convert_models/llama_custom.py"
_POSITION_BYTES = 8.0  # int64, one per sequence and token


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tova(AbstractMethod):
    """Token omission via attention."""

    NAME: ClassVar[str] = "tova"
    TITLE: ClassVar[str] = "TOVA: drop the token the last query attended to least"
    REFERENCE: ClassVar[str] = "Oren et al., arXiv 2401.06104; github.com/schwartz-lab-NLP/TOVA"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"evict", "store"})
    ACTS: ClassVar[str] = "after prefill and on every decoded token"
    SCOPE: ClassVar[Scope] = "unbounded"
    DOES_NOT_SAVE: ClassVar[str] = "prefill compute or one layer's full cache during prefill."
    REALISED_BY: ClassVar[tuple[str, ...]] = ("TOVA repository", "kvpress (after prefill only)")
    PARAMETERS: ClassVar[dict[str, str]] = {
        "keep_tokens": "tokens kept in every layer; fewer is smaller",
    }
    STATE_FORMULA: ClassVar[str] = "B K min(T, C) (Hk + Hv) b"

    keep_tokens: int = 2048

    def __post_init__(self) -> None:
        check_at_least("tova", 1, keep_tokens=self.keep_tokens)

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """The cache is not full yet."""
        return np.asarray(cached_tokens) <= self.keep_tokens

    def state(self, group: MixerGroup, point: Point) -> State:
        """At most C tokens; at level ``reference`` their positions and no spare room."""
        tokens = kept(float(self.keep_tokens), point.cached_tokens)
        size = layer_bytes(attention_of(group), point, tokens)
        if point.level == "ideal":
            return State(group.n_layers * size)
        size = group.n_layers * (size + point.batch * tokens * _POSITION_BYTES)
        return State(size, allocated=size)

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Exact; upstream eager, because it needs the last row of probabilities."""
        if point.level == "ideal":
            return not_stored(attention, point)
        mixer = attention_of(group)
        s = point.prompt_tokens
        return (
            rotate_keys(mixer, point, s, source=f"{_LLAMA} apply_rotary_pos_emb"),
            *eager_prompt(mixer, point, pairs=mixer.prompt_pairs(s), source=_LLAMA),
        )

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """One row of scores, the top C tokens, a gather."""
        mixer = attention_of(group)
        s = point.prompt_tokens
        heads = point.batch * mixer.n_heads
        reference = point.level == "reference"
        c = kept(float(self.keep_tokens), s)
        source = f"{_CACHE} reduce" if reference else ""
        return (
            select(
                "select_kept",
                rows=point.batch,
                length=s,
                keep=c,
                executed_flops=0.0 if reference else heads * s * (2.0 * mixer.head_dim),
                workspace_bytes=heads * s * 4.0,
                dtype=point.dtype,
                launches=3,
                source=source,
                formula="mean over heads of the last row, top-k per sequence",
            ),
            gather_tokens(mixer, point, c, read_tokens=c, source=source),
        )

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Attention over C tokens and the new one, the least attended of them dropped."""
        mixer = attention_of(group)
        c = kept(float(self.keep_tokens), point.cached_tokens)
        probabilities = point.batch * mixer.n_heads * (c + 1)
        drop = select(
            "drop_least",
            rows=point.batch,
            length=c + 1,
            keep=c,
            workspace_bytes=probabilities * probability_bytes(point),
            launches=1 if point.level == "ideal" else 3,
            source="" if point.level == "ideal" else f"{_CACHE} reduce",
            formula="B N C probabilities read, mean over heads, one token chosen",
        )
        if point.level == "ideal":
            attention = decode_attention(
                mixer,
                point,
                read_tokens=c,
                executed_tokens=c + 1,
                read_bytes=layer_bytes(mixer, point, c),
                written_bytes=layer_bytes(mixer, point, 1.0),
                name="scored_attention",
                workspace_bytes=probabilities * probability_bytes(point),
                formula="C tokens read once; B N C probabilities written",
            )
            return fused_step(point, "tova", attention, drop)
        gather = elementwise(
            "gather_kept",
            workspace_bytes=2 * layer_bytes(mixer, point, c),
            transient_bytes=layer_bytes(mixer, point, c),
            launches=2,
            source=f"{_CACHE} reduce torch.gather",
            formula="the whole cache read and written on every step",
        )
        return (
            cache_cat(mixer, point, c, source=f"{_LLAMA} past_key_value.update"),
            rotate_keys(mixer, point, c + 1, source=f"{_LLAMA} apply_rotary_pos_emb"),
            *eager_step(mixer, point, c, source=_LLAMA),
            drop,
            gather,
        )

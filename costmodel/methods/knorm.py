"""Knorm: keep the tokens whose keys have the smallest norm.

Devoto et al., arXiv 2406.11430; kvpress ``knorm_press.py``. After the prompt, per layer and KV
head: norms of all keys, the smallest kept_fraction of them, a gather. No eviction while decoding.

State per layer: B K [max(1, floor(f S)) + T - S] (Hk + Hv) b. ``reference``: kvpress over a
transformers cache, which grows by ``torch.cat``.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.methods.base import (
    AbstractMethod,
    Mask,
    Scope,
    Stage,
    State,
    attention_of,
    check_fraction,
    layer_bytes,
    not_stored,
)
from costmodel.methods.chains import cache_cat, elementwise, gather_tokens, select
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Array, Operations
from costmodel.workload import Point

_PRESS = "NVIDIA/kvpress kvpress/presses/knorm_press.py, scorer_press.py"
_CAT = "transformers 5.23 cache_utils.py DynamicLayer.update (torch.cat)"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Knorm(AbstractMethod):
    """Smallest key norms."""

    NAME: ClassVar[str] = "knorm"
    TITLE: ClassVar[str] = "Knorm: keep the tokens with the smallest key norms"
    REFERENCE: ClassVar[str] = "Devoto et al., arXiv 2406.11430; github.com/NVIDIA/kvpress"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"evict"})
    ACTS: ClassVar[str] = "after prefill, layer by layer; never while decoding"
    SCOPE: ClassVar[Scope] = "unbounded"
    DOES_NOT_SAVE: ClassVar[str] = "prefill compute or one layer's full cache during prefill."
    REALISED_BY: ClassVar[tuple[str, ...]] = ("kvpress",)
    PARAMETERS: ClassVar[dict[str, str]] = {
        "kept_fraction": "share of the prompt kept; less is smaller (kvpress: 1 - ratio)",
    }
    STATE_FORMULA: ClassVar[str] = "B K [floor(f S) + T - S] (Hk + Hv) b"
    COST_ONLY: ClassVar[bool] = True

    kept_fraction: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("knorm", zero=False, kept_fraction=self.kept_fraction)

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """Everything is kept, or the prompt is one token."""
        return self._kept_prompt(prompt_tokens) >= np.asarray(prompt_tokens)

    def _kept_prompt(self, prompt_tokens: Array) -> Array:
        s = np.asarray(prompt_tokens, dtype=np.float64)
        return np.maximum(np.floor(s * self.kept_fraction), 1.0)

    def tokens_left(self, group: MixerGroup, point: Point) -> Array:
        """max(1, floor(f S)) + T - S."""
        s = point.prompt_tokens
        return self._kept_prompt(s) + (point.cached_tokens - s)

    def state(self, group: MixerGroup, point: Point) -> State:
        """The kept tokens."""
        tokens = self.tokens_left(group, point)
        return State(group.n_layers * layer_bytes(attention_of(group), point, tokens))

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Exact; the prompt's K and V live for one layer only."""
        return not_stored(attention, point)

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Norms, top-k, gather."""
        mixer = attention_of(group)
        s = point.prompt_tokens
        keep = self._kept_prompt(s)
        rows = point.batch * mixer.n_kv_heads
        keys = rows * s * mixer.head_dim
        reference = point.level == "reference"
        source = _PRESS if reference else ""
        return (
            elementwise(
                "key_norms",
                vector_flops=2 * keys,
                workspace_bytes=(keys * point.element_bytes if reference else 0.0) + rows * s * 4,
                activation_bytes=0.0 if reference else keys * point.element_bytes,
                transient_bytes=layer_bytes(mixer, point, s) + rows * s * 4,
                launches=2,
                source=source,
                formula="keys read, one norm per token and KV head written",
            ),
            select(
                "select_kept",
                rows=rows,
                length=s,
                keep=keep,
                workspace_bytes=rows * s * 4,
                source=source,
                formula="top-k of the negated norms",
            ),
            gather_tokens(mixer, point, keep, source=source),
        )

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Attention over what is left."""
        mixer = attention_of(group)
        tokens = self.tokens_left(group, point)
        if point.level == "ideal":
            return mixer.decode(point.at(tokens))
        return (
            cache_cat(mixer, point, tokens, source=_CAT),
            decode_attention(
                mixer,
                point,
                read_tokens=tokens,
                executed_tokens=tokens + 1,
                read_bytes=layer_bytes(mixer, point, tokens),
                written_bytes=layer_bytes(mixer, point, 1.0),
                source="flash_attention_2",
                formula="kept tokens read once",
            ),
        )

"""SnapKV: after the prompt, keep the tokens its last window of queries attended to most.

Li et al., arXiv 2404.14469. Per layer, after exact attention: scores of the last w queries over the
prompt, pooled along the tokens, top C - w per KV head, plus the window itself. Nothing is evicted
while decoding: min(S, C) + generated tokens.

State per layer: B K [min(S, C) + T - S] (Hk + Hv) b. ``reference`` is FasterDecoding/SnapKV, which
repeats K and V to all query heads before it caches them: it holds and reads G times the state
(kvpress keeps K heads and averages the scores of a group).
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.errors import ConfigError
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
)
from costmodel.methods.window_scores import (
    decode_kept,
    held,
    keep_prompt_apart,
    score_select_gather,
)
from costmodel.operation import Array, Operations
from costmodel.workload import Point

_UTILS = "FasterDecoding/SnapKV snapkv/monkeypatch/snapkv_utils.py update_kv"
_HIJACK = "FasterDecoding/SnapKV snapkv/monkeypatch/llama_hijack_4_37.py"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV(AbstractMethod):
    """One-shot selection by the last queries."""

    NAME: ClassVar[str] = "snapkv"
    TITLE: ClassVar[str] = "SnapKV: keep what the last queries attended to"
    REFERENCE: ClassVar[str] = "Li et al., arXiv 2404.14469; github.com/FasterDecoding/SnapKV"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"evict"})
    ACTS: ClassVar[str] = "after prefill, layer by layer; never while decoding"
    SCOPE: ClassVar[Scope] = "unbounded"
    DOES_NOT_SAVE: ClassVar[str] = (
        "prefill compute or one layer's full cache during prefill; the cache still grows by every "
        "generated token."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = (
        "kvpress",
        "SnapKV repository (caches all query heads)",
        "KVCache-Factory",
        "MInference",
    )
    PARAMETERS: ClassVar[dict[str, str]] = {
        "keep_tokens": "prompt tokens kept per KV head, window included; fewer is smaller",
        "window_tokens": "last prompt tokens whose attention votes, always kept",
        "kernel": "width of the pooling over neighbouring tokens, odd; no effect on size",
    }
    STATE_FORMULA: ClassVar[str] = "B K [min(S, C) + T - S] (Hk + Hv) b"

    keep_tokens: int = 2048
    window_tokens: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        check_at_least("snapkv", 1, window_tokens=self.window_tokens, kernel=self.kernel)
        check_at_least("snapkv", self.window_tokens + 1, keep_tokens=self.keep_tokens)
        if self.kernel % 2 == 0:
            raise ConfigError(f"snapkv: expected an odd kernel, got {self.kernel}")

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """The whole prompt fits the budget."""
        return np.asarray(prompt_tokens) <= self.keep_tokens

    def tokens_left(self, group: MixerGroup, point: Point) -> Array:
        """min(S, C) + T - S."""
        s = point.prompt_tokens
        return kept(float(self.keep_tokens), s) + (point.cached_tokens - s)

    def state(self, group: MixerGroup, point: Point) -> State:
        """K heads; at level ``reference`` all query heads."""
        mixer = attention_of(group)
        size = group.n_layers * layer_bytes(mixer, point, self.tokens_left(group, point))
        return held(mixer, point, size)

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Exact; the prompt's K and V live for one layer only."""
        return keep_prompt_apart(attention_of(group), point, attention, source=_HIJACK)

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Score with the last window, choose, copy."""
        return score_select_gather(
            attention_of(group),
            point,
            window=float(self.window_tokens),
            keep=kept(float(self.keep_tokens), point.prompt_tokens),
            pooling=float(self.kernel),
            source=_UTILS,
        )

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Attention over what is left; the cache grows by one token."""
        mixer = attention_of(group)
        return decode_kept(mixer, point, self.tokens_left(group, point), source=_HIJACK)

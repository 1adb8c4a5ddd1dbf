"""PyramidKV: SnapKV's selection with budgets that shrink from the first layer to the last.

Cai et al., arXiv 2406.02069; code Zefan-Cai/KVCache-Factory. With m = C - w beyond the window and L
layers, layer l of a long prompt (S >= 2 m) keeps w + max - l step tokens:
    min = m // beta, max = 2 m - min; if max >= S - w: max = S - w, min = 2 m - max
    step = (max - min) // (L - 1)
A shorter prompt (C <= S < 2 m) keeps C in every layer, one below C everything. The mean over
layers is C, up to the rounding of step (never below).

State: the sum over layers of B K [budget + T - S] (Hk + Hv) b. Layers are counted among the model's
cache-keeping layers. ``reference`` as for SnapKV: all query heads are cached. (kvpress falls back
to equal budgets without a word when fewer than about 1,280 tokens are kept.)
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
    check_at_least,
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

_UTILS = "Zefan-Cai/KVCache-Factory pyramidkv/pyramidkv_utils.py PyramidKVCluster.update_kv"
_MODEL = "Zefan-Cai/KVCache-Factory pyramidkv/llama_model.py"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PyramidKV(AbstractMethod):
    """SnapKV with a pyramid of budgets."""

    NAME: ClassVar[str] = "pyramidkv"
    TITLE: ClassVar[str] = "PyramidKV: larger budgets in lower layers"
    REFERENCE: ClassVar[str] = "Cai et al., arXiv 2406.02069; github.com/Zefan-Cai/KVCache-Factory"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"evict", "store"})
    ACTS: ClassVar[str] = "after prefill, layer by layer; never while decoding"
    SCOPE: ClassVar[Scope] = "unbounded"
    DOES_NOT_SAVE: ClassVar[str] = (
        "prefill compute or one layer's full cache during prefill; no more memory than SnapKV at "
        "the same budget, which it only distributes."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = ("KVCache-Factory (caches all query heads)", "kvpress")
    PARAMETERS: ClassVar[dict[str, str]] = {
        "keep_tokens": "mean prompt tokens kept per layer and KV head; fewer is smaller",
        "window_tokens": "last prompt tokens whose attention votes, always kept",
        "beta": "how steep: the last layer keeps 1/beta beyond its window; larger is steeper",
    }
    STATE_FORMULA: ClassVar[str] = "sum over layers of B K [w + max - l step + T - S] (Hk + Hv) b"

    keep_tokens: int = 2048
    window_tokens: int = 32
    beta: int = 20

    def __post_init__(self) -> None:
        check_at_least("pyramidkv", 1, window_tokens=self.window_tokens, beta=self.beta)
        check_at_least("pyramidkv", self.window_tokens + 1, keep_tokens=self.keep_tokens)

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """The whole prompt fits the budget."""
        return np.asarray(prompt_tokens) <= self.keep_tokens

    def budget(self, prompt_tokens: Array, layer: Array, n_layers: int) -> Array:
        """Prompt tokens kept in a layer (or at the mean ordinal of several: it is affine)."""
        s = np.asarray(prompt_tokens, dtype=np.float64)
        w = float(self.window_tokens)
        m = self.keep_tokens - w
        low = np.floor(m / self.beta)
        high = np.minimum(2 * m - low, s - w)
        low = 2 * m - high
        step = np.floor((high - low) / max(n_layers - 1, 1))
        pyramid = w + high - layer * step
        return np.where(
            s < self.keep_tokens, s, np.where(s < 2 * m, float(self.keep_tokens), pyramid)
        )

    def mean_tokens(self, group: MixerGroup, point: Point) -> Array:
        """Mean over the group's layers of the tokens in the cache; budgets are affine in l."""
        s = point.prompt_tokens
        mean_layer = float(np.mean(group.indices))
        return self.budget(s, mean_layer, group.n_kv_layers) + (point.cached_tokens - s)

    def state(self, group: MixerGroup, point: Point) -> State:
        """Sum over the group's layers."""
        mixer = attention_of(group)
        s = point.prompt_tokens
        # the sum of the ordinals is exact where their mean is not
        total = group.n_layers * (
            self.budget(s, 0.0, group.n_kv_layers) + (point.cached_tokens - s)
        )
        step = self.budget(s, 0.0, group.n_kv_layers) - self.budget(s, 1.0, group.n_kv_layers)
        size = layer_bytes(mixer, point, total - step * float(sum(group.indices)))
        return held(mixer, point, size)

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Exact; the prompt's K and V live for one layer only."""
        return keep_prompt_apart(attention_of(group), point, attention, source=_MODEL)

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Score with the last window, choose, copy."""
        return score_select_gather(
            attention_of(group),
            point,
            window=float(self.window_tokens),
            keep=self.mean_tokens(group, point.at(point.prompt_tokens)),
            pooling=5.0,
            source=_UTILS,
        )

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Attention over what is left; the cache grows by one token."""
        mixer = attention_of(group)
        return decode_kept(mixer, point, self.mean_tokens(group, point), source=_MODEL)

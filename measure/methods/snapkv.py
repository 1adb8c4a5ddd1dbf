"""SnapKV run for real: the last w queries of the prompt choose what is kept, once.

Their probabilities are summed over the window and over a KV head's query heads, pooled over
neighbouring tokens, and the best C - w tokens of every KV head stay, with the window itself. The
cache then grows by every generated token.

``reference`` repeats K and V to all query heads before anything else: it scores, gathers and
caches N heads, which grow by ``torch.cat``.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from costmodel.methods.base import AbstractMethod
from costmodel.methods.full import Full
from costmodel.methods.snapkv import SnapKV
from measure.kernels._dropping import heads_fit
from measure.methods.base import AbstractLayerCache, Realisation
from measure.methods.eager import repeat_kv, softmax_fp32
from measure.methods.evicting import EvictingCache
from measure.methods.full import FullCache


class WindowScoresCache(EvictingCache):
    """What the last queries of a prompt chose, and every token since."""

    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "K and V repeated to all query heads, which are scored, gathered and cached; "
        "`torch.cat` every step. With GQA all heads of a group keep what the group's votes chose "
        "(upstream: every query head its own), so that both forms keep the same tokens"
    )

    #: prompt tokens kept by a layer, the mean of all layers; one that is not longer is kept whole
    keep: int
    window: int
    kernel: int
    #: the reference form's caches of a prompt that was not cut, and of one that was
    whole: AbstractLayerCache
    repeated: FullCache | None = None

    def _build(self, method: AbstractMethod) -> None:
        super()._build(method)
        self.whole = self.inner
        if self.is_reference:
            mixer = replace(self.mixer, n_kv_heads=self.mixer.n_heads)
            self.repeated = FullCache(
                Full(), mixer, batch=self.batch, dtype=self.dtype, device=self.device
            )

    def hold_in(self, inner: AbstractLayerCache) -> None:
        """Let ``inner`` hold what is kept, with the model's own KV heads."""
        super().hold_in(inner)
        self.whole, self.repeated = inner, None

    def reserve(self, n_tokens: int) -> None:
        """Room for ``n_tokens``, unless what is kept grows by ``torch.cat``."""
        if self.repeated is None or n_tokens <= self.keep:
            self.whole.reserve(n_tokens)

    def make_room(self, n_prompt: int, n_more: int) -> None:
        """Room for what is kept of the prompt, and all that follows; none beside ``torch.cat``."""
        if self.repeated is None or n_prompt <= self.keep:
            super().make_room(n_prompt, n_more)

    def clear(self) -> None:
        """Empty the caches of both kinds of prompts."""
        super().clear()
        for cache in (self.whole, self.repeated):
            if cache is not None:
                cache.clear()

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend, choose, hand over; published code repeats and chooses before it attends."""
        if not self.is_reference or k.shape[2] <= self.keep:
            self.inner = self.whole
            return super().prefill(q, k, v)
        n_kv, n_heads = self.mixer.n_kv_heads, self.mixer.n_heads
        keys, values = repeat_kv(k, n_heads), repeat_kv(v, n_heads)
        chosen = self._best(self._repeated_votes(q[:, :, -self.window :], keys))
        if self.repeated is None:
            out = self.attend_prompt(q, keys, values)
            self._keep(k, v, chosen.unflatten(1, (n_kv, -1))[:, :, 0])
            return out
        self.inner = self.repeated
        self._keep(keys, values, chosen)
        return self.attend_prompt(q, keys, values)

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep a prompt without queries."""
        self.inner = self.whole
        chosen = self._chosen_blindly(k)
        if chosen is not None and self.repeated is not None:
            self.inner = self.repeated
            k, v, chosen = (repeat_kv(x, self.mixer.n_heads) for x in (k, v, chosen))
        self._keep(k, v, chosen)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The inner cache's step."""
        if self.inner is self.repeated:
            k, v = repeat_kv(k, self.mixer.n_heads), repeat_kv(v, self.mixer.n_heads)
        return super().decode(q, k, v)

    def restore(self, snapshot: Any) -> None:
        """Put both back; what grows by ``torch.cat`` has no room for the next token again."""
        super().restore(snapshot)
        if self.inner is self.repeated:
            for buffer in self.inner._buffers():
                buffer.reserve(buffer.length)

    def _chosen(self, q: Tensor, k: Tensor) -> Tensor | None:
        if k.shape[2] <= self.keep:
            return None
        return self._best(self._votes(q[:, :, -self.window :], k))

    def _chosen_blindly(self, k: Tensor) -> Tensor | None:
        if k.shape[2] <= self.keep:
            return None
        return self._best(torch.zeros(k.shape[:3], device=k.device))

    def _best(self, votes: Tensor) -> Tensor:
        """The best of votes [B, heads, S] before the window, pooled; and the window."""
        n = votes.shape[-1]
        pooled = avg_pool1d(
            votes[..., : n - self.window], self.kernel, stride=1, padding=self.kernel // 2
        )
        best = pooled.topk(self._budget(n) - self.window, dim=-1).indices
        window = torch.arange(n - self.window, n, device=votes.device)
        window = window.expand(*votes.shape[:2], -1)
        return torch.cat((best.sort(dim=-1).values, window), dim=-1)

    def _votes(self, q: Tensor, k: Tensor) -> Tensor:
        """Sums [B, K, S] of the window's probabilities."""
        if self.fused and heads_fit(self.mixer):
            from measure.kernels.prompt_scores import received_scores

            return received_scores(q, k)
        b, n_kv, s, size = k.shape
        w = q.shape[2]
        queries = (q * size**-0.5).reshape(b, n_kv, -1, size)
        scores = torch.matmul(queries, k.transpose(-1, -2)).unflatten(2, (-1, w))
        scores = scores.masked_fill(self._unseen(w, s), float("-inf"))
        return scores.softmax(dim=-1, dtype=torch.float32).sum(dim=(2, 3))

    def _repeated_votes(self, q: Tensor, keys: Tensor) -> Tensor:
        """``update_kv``: sums [B, N, S] of the window's probabilities, the same for every query
        head of a group.
        """
        scores = torch.matmul(q, keys.transpose(2, 3)) / q.shape[-1] ** 0.5
        hidden = self._unseen(q.shape[2], keys.shape[2])
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
        votes = softmax_fp32(scores).sum(dim=2)
        groups = votes.unflatten(1, (self.mixer.n_kv_heads, -1)).sum(dim=2)
        return repeat_kv(groups, self.mixer.n_heads)

    def _unseen(self, w: int, s: int) -> Tensor:
        """Pairs [w, S] that the last w queries of S do not see."""
        return torch.ones(w, s, dtype=torch.bool, device=self.device).triu_(s - w + 1)


class SnapKVCache(WindowScoresCache):
    """One budget for all layers."""

    NAME: ClassVar[str] = "snapkv"

    def _configure(self, method: AbstractMethod) -> None:
        assert isinstance(method, SnapKV)
        self.window, self.kernel, self.keep = (
            method.window_tokens,
            method.kernel,
            method.keep_tokens,
        )

    def _budget(self, n_prompt: int) -> int:
        return min(n_prompt, self.keep)

"""SnapKV run for real: the last w queries of the prompt choose what is kept, once.

Their probabilities are summed over the window and over a KV head's query heads, pooled over
neighbouring tokens, and the best C - w tokens of every KV head stay, with the window itself. The
cache then grows by every generated token.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from costmodel.methods.base import AbstractMethod
from costmodel.methods.snapkv import SnapKV
from measure.kernels._dropping import heads_fit
from measure.methods.evicting import EvictingCache


class WindowScoresCache(EvictingCache):
    """What the last queries of a prompt chose, and every token since."""

    window: int
    kernel: int

    def _chosen(self, q: Tensor, k: Tensor) -> Tensor | None:
        n = k.shape[2]
        if self._budget(n) >= n:
            return None
        return self._best(self._votes(q[:, :, -self.window :], k))

    def _chosen_blindly(self, k: Tensor) -> Tensor | None:
        if self._budget(k.shape[2]) >= k.shape[2]:
            return None
        return self._best(torch.zeros(k.shape[:3], device=k.device))

    def _best(self, votes: Tensor) -> Tensor:
        """The best of votes [B, K, S], and the window."""
        n = votes.shape[-1]
        best = votes[..., : n - self.window].topk(self._budget(n) - self.window, dim=-1).indices
        window = torch.arange(n - self.window, n, device=votes.device)
        window = window.expand(*votes.shape[:2], -1)
        return torch.cat((best.sort(dim=-1).values, window), dim=-1)

    def _votes(self, q: Tensor, k: Tensor) -> Tensor:
        """Pooled sums [B, K, S] of the window's probabilities."""
        if self.fused and heads_fit(self.mixer):
            from measure.kernels.prompt_scores import window_votes

            return window_votes(q, k, self.kernel)
        b, n_kv, s, size = k.shape
        w = q.shape[2]
        queries = (q * size**-0.5).reshape(b, n_kv, -1, size)
        scores = torch.matmul(queries, k.transpose(-1, -2)).unflatten(2, (-1, w))
        hidden = torch.ones(w, s, dtype=torch.bool, device=k.device).triu_(s - w + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
        votes = scores.softmax(dim=-1, dtype=torch.float32).sum(dim=(2, 3))
        return avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)


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

"""SnapKV run for real: the last w queries of the prompt choose what is kept, once.

Their probabilities are summed over the window and over a KV head's query heads, pooled over
neighbouring tokens, and the best C - w tokens of every KV head stay, with the window itself. The
cache then grows by every generated token.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, scaled_dot_product_attention

from costmodel.methods.base import AbstractMethod
from costmodel.methods.snapkv import SnapKV
from measure.methods.buffers import GrowingBuffer
from measure.methods.kept_tokens import KeptTokensCache, attend_all, gather_tokens


class WindowScoresCache(KeptTokensCache):
    """K and V of what the last queries chose, and of every token since."""

    window: int
    kernel: int

    def _build(self, method: AbstractMethod) -> None:
        self._configure(method)
        self.keys, self.values = self._kv_buffers()

    @abstractmethod
    def _configure(self, method: AbstractMethod) -> None:
        """Read the method's parameters."""

    @abstractmethod
    def _budget(self, n_prompt: int) -> int:
        """Prompt tokens kept per KV head."""

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from (self.keys, self.values)

    def reserve(self, n_tokens: int) -> None:
        """Room for ``n_tokens``: how many of them are prompt is not known yet."""
        for buffer in self._buffers():
            buffer.reserve(n_tokens)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend exactly, score with the last window, keep."""
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        votes = None
        if self._is_cut(k.shape[2]):
            votes = self._votes(q[:, :, -self.window :], k)
        self._keep(k, v, votes)
        return out

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep a prompt without queries: as if all its tokens had the same votes."""
        self._keep(k, v, torch.zeros(k.shape[:3], device=k.device))

    def _is_cut(self, n_prompt: int) -> bool:
        return self._budget(n_prompt) < n_prompt

    def _votes(self, q: Tensor, k: Tensor) -> Tensor:
        """Pooled sums [B, K, S] of the window's probabilities."""
        b, n_kv, s, size = k.shape
        w = q.shape[2]
        queries = (q * size**-0.5).reshape(b, n_kv, -1, size)
        scores = torch.matmul(queries, k.transpose(-1, -2)).unflatten(2, (-1, w))
        hidden = torch.ones(w, s, dtype=torch.bool, device=k.device).triu_(s - w + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
        votes = scores.softmax(dim=-1, dtype=torch.float32).sum(dim=(2, 3))
        return avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)

    def _keep(self, k: Tensor, v: Tensor, votes: Tensor | None) -> None:
        n = k.shape[2]
        if votes is not None and self._is_cut(n):
            chosen = votes[..., : n - self.window].topk(self._budget(n) - self.window, dim=-1)
            window = torch.arange(n - self.window, n, device=k.device).expand(*k.shape[:2], -1)
            index = torch.cat((chosen.indices.sort(dim=-1).values, window), dim=-1)
            k, v = gather_tokens(k, index), gather_tokens(v, index)
        self.keys.append(k)
        self.values.append(v)
        self.n_tokens = n

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append, then attend what is held."""
        self.keys.append(k)
        self.values.append(v)
        self.n_tokens += 1
        return attend_all(self, q, self.keys.entries(), self.values.entries())


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

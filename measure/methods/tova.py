"""TOVA run for real: every step drops the token its query attended to least.

All heads of a layer keep the same tokens: probabilities are averaged over heads. The prompt's last
query chooses the first C; afterwards the new token takes the slot of the one that leaves, unless it
is the least attended itself.
"""

from collections.abc import Iterator
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from costmodel.methods.base import AbstractMethod
from costmodel.methods.tova import Tova
from measure.kernels._dropping import heads_fit, tova_step
from measure.methods.buffers import GrowingBuffer
from measure.methods.kept_tokens import KeptTokensCache, attend_all, gather_tokens


@final
class TovaCache(KeptTokensCache):
    """K and V of at most C tokens."""

    NAME: ClassVar[str] = "tova"

    def _build(self, method: AbstractMethod) -> None:
        assert isinstance(method, Tova)
        self.keep = method.keep_tokens
        self.keys, self.values = self._kv_buffers()

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from (self.keys, self.values)

    def reserve(self, n_tokens: int) -> None:
        """Room for C tokens."""
        for buffer in self._buffers():
            buffer.reserve(min(n_tokens, self.keep))

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend exactly; the last query's probabilities choose."""
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        weights = None
        if k.shape[2] > self.keep:
            query = self.fold(q[:, :, -1:]) * q.shape[-1] ** -0.5
            scores = torch.matmul(query, k.transpose(-1, -2))
            weights = scores.softmax(dim=-1, dtype=torch.float32).mean(dim=(1, 2))
        self._keep(k, v, weights)
        return out

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep a prompt without queries: as if all its tokens were attended alike."""
        self._keep(k, v, torch.zeros(k.shape[0], k.shape[2], device=k.device))

    def _keep(self, k: Tensor, v: Tensor, weights: Tensor | None) -> None:
        self.n_tokens = k.shape[2]
        if weights is not None and self.n_tokens > self.keep:
            chosen = weights.topk(self.keep, dim=-1).indices.sort(dim=-1).values
            chosen = chosen.unsqueeze(1).expand(-1, k.shape[1], -1)
            k, v = gather_tokens(k, chosen), gather_tokens(v, chosen)
        self.keys.append(k)
        self.values.append(v)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend C tokens and the new one; the least attended of them leaves."""
        self.n_tokens += 1
        if self.n_tokens <= self.keep:
            self.keys.append(k)
            self.values.append(v)
            return attend_all(self, q, self.keys.entries(), self.values.entries())
        if self.fused and heads_fit(self.mixer):
            return tova_step(self, q, k, v)
        keys, values = self.keys.entries(), self.values.entries()
        out, weights = self.attend_with_new(q, keys, values, k, v)
        least = weights.mean(dim=(1, 2)).argmin(dim=-1)
        stays = least == self.keep  # the new token is the least attended: nothing is written
        slots = torch.where(stays, 0, least).view(-1, 1, 1, 1)
        for held, new in ((keys, k), (values, v)):
            index = slots.expand_as(new)
            entry = torch.where(stays.view(-1, 1, 1, 1), held.gather(2, index), new)
            held.scatter_(2, index, entry)
        return out

"""What methods share that drop cached tokens: K and V of those kept, choosing, snapshots.

As long as a budget holds everything a twin is plain attention and keeps nothing besides K and V.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from measure.kernels._dropping import StepRoom
from measure.methods.base import AbstractLayerCache
from measure.methods.buffers import GrowingBuffer
from measure.parts import QUERY_BLOCK


class _Snapshot(NamedTuple):
    """Tokens seen; of every buffer its capacity and a copy of its entries."""

    n_tokens: int
    entries: list[tuple[int, Tensor]]


class KeptTokensCache(AbstractLayerCache):
    """K and V of the tokens that were kept; ``_buffers`` may add what decides about them."""

    #: what a step by kernels keeps beside the cache
    step_room: StepRoom | None = None

    def _kv_buffers(self) -> tuple[GrowingBuffer, GrowingBuffer]:
        keys, values = (
            self._buffer((size,), self.dtype)
            for size in (self.mixer.head_dim, self.mixer.v_head_dim)
        )
        return keys, values

    def _buffer(self, entry: tuple[int, ...], dtype: torch.dtype) -> GrowingBuffer:
        return GrowingBuffer(self.batch, self.mixer.n_kv_heads, entry, dtype, self.device)

    def reset_steps(self) -> None:
        """Also the count of a step by kernels, now: a replay asks for nothing on the host."""
        super().reset_steps()
        if self.step_room is not None:
            self.step_room.forget()
            self.step_room.set(self.n_tokens)

    def snapshot(self) -> Any:
        """Copies of everything kept: a step may overwrite any of it."""
        copies = [(x.capacity, x.entries().clone()) for x in self._buffers()]
        return _Snapshot(self.n_tokens, copies)

    def restore(self, snapshot: Any) -> None:
        """Put the copies back, laid out as they were (see ``GrowingBuffer.fit``)."""
        self.n_tokens = snapshot.n_tokens
        for buffer, (capacity, entries) in zip(self._buffers(), snapshot.entries, strict=True):
            buffer.clear()
            buffer.fit(capacity)
            buffer.append(entries)
        self.reset_steps()

    def attend_with_new(
        self, q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend kept tokens and the new one: out [B, N, 1, H], fp32 weights [B, K, G, C + 1]."""
        queries = self.fold(q) * q.shape[-1] ** -0.5
        scores = torch.cat([torch.matmul(queries, x.transpose(-1, -2)) for x in (keys, k)], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32)
        used = weights.to(v.dtype)
        out = torch.matmul(used[..., :-1], values) + torch.matmul(used[..., -1:], v)
        return self.unfold(out), weights


def gather_tokens(x: Tensor, chosen: Tensor) -> Tensor:
    """Entries ``chosen`` [B, K, n] of x [B, K, T, H]."""
    return x.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def overwrite(buffer: GrowingBuffer, slots: Tensor, entry: Tensor) -> None:
    """Put ``entry`` [B, K, 1, ...] into slot ``slots`` [B, K] of every head.

    Not by ``scatter_``: in bf16 on a CPU it copies the whole buffer (PyTorch 2.13).
    """
    rows = torch.arange(slots.shape[0], device=slots.device).unsqueeze(1)
    heads = torch.arange(slots.shape[1], device=slots.device)
    buffer.entries().index_put_((rows, heads, slots), entry.squeeze(2))


def query_blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Causal probabilities of a prompt, block by block of its queries, the last one first.

    q [B, N, S, H], k [B, K, S, H] -> (start, stop, [B, K, G, queries, stop]) in fp32.
    """
    b, n_kv, s, size = k.shape
    folded = q.view(b, n_kv, -1, s, size) * size**-0.5
    # The last block is the largest: what it frees holds every earlier one. The other way round a
    # heap that keeps what it has grows by a new piece a block, S x S in all.
    for start in reversed(range(0, s, QUERY_BLOCK)):
        stop = min(s, start + QUERY_BLOCK)
        queries = folded[:, :, :, start:stop].flatten(2, 3)
        yield start, stop, _causal_probabilities(queries, k[:, :, :stop], start)


def _causal_probabilities(queries: Tensor, k: Tensor, start: int) -> Tensor:
    """Of a block of queries from position ``start`` on; no score outlives the call."""
    n, stop = k.shape[2] - start, k.shape[2]
    scores = torch.matmul(queries, k.transpose(-1, -2)).unflatten(2, (-1, n))
    hidden = torch.ones(n, stop, dtype=torch.bool, device=k.device)
    scores.masked_fill_(hidden.triu_(start + 1), float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32)


def attend_all(cache: AbstractLayerCache, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query over all of ``keys``, the group as the query length."""
    return cache.unfold(scaled_dot_product_attention(cache.fold(q), keys, values))

"""What methods share that pack every token of K and V as it is cached.

A prompt is attended exactly and packed a piece at a time. A step unpacks piece after piece into a
small copy that stays in cache, multiplies it, attends the new token unpacked, and packs it.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from costmodel.methods.base import AbstractMethod
from measure.methods.base import AbstractLayerCache
from measure.methods.buffers import GrowingBuffer

#: Elements unpacked at once: half a megabyte in bf16, so the copy stays in a core's L2 cache.
PIECE_ELEMENTS = 2**18


class Side(NamedTuple):
    """Keys or values: their head size, and the buffers that hold the parts of their entries."""

    size: int
    parts: tuple[GrowingBuffer, ...]


class TokenPackedCache(AbstractLayerCache):
    """Keys and values packed token by token; one entry of every buffer is a token."""

    keys: Side
    values: Side

    def _build(self, method: AbstractMethod) -> None:
        self._configure(method)
        self.keys = Side(self.mixer.head_dim, self._parts(self.mixer.head_dim))
        self.values = Side(self.mixer.v_head_dim, self._parts(self.mixer.v_head_dim))

    @abstractmethod
    def _configure(self, method: AbstractMethod) -> None:
        """Read the method's parameters."""

    @abstractmethod
    def _parts(self, size: int) -> tuple[GrowingBuffer, ...]:
        """Empty buffers for entries of heads of ``size``."""

    @abstractmethod
    def _pack(self, x: Tensor, side: Side) -> tuple[Tensor, ...]:
        """[B, K, n, H] -> one tensor per buffer."""

    @abstractmethod
    def _unpack(self, parts: tuple[Tensor, ...], side: Side) -> Tensor:
        """Invert ``_pack``, in the compute type."""

    def _prepare(self, k: Tensor, v: Tensor) -> None:
        """Look at a whole prompt before it is packed."""

    def _buffer(self, entry: tuple[int, ...], dtype: torch.dtype) -> GrowingBuffer:
        return GrowingBuffer(self.batch, self.mixer.n_kv_heads, entry, dtype, self.device)

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from (*self.keys.parts, *self.values.parts)

    def _token_buffers(self) -> tuple[GrowingBuffer, ...]:
        return (*self.keys.parts, *self.values.parts)

    def reserve(self, n_tokens: int) -> None:
        """Room for ``n_tokens`` packed tokens."""
        for buffer in self._token_buffers():
            buffer.reserve(n_tokens)

    def store(self, k: Tensor, v: Tensor) -> None:
        """Pack the prompt, a piece at a time."""
        self._prepare(k, v)
        n_tokens = k.shape[2]
        for buffer in self._token_buffers():  # else every piece would reallocate all before it
            if buffer.capacity < n_tokens:
                buffer.reserve(n_tokens)
        for start, stop in self._pieces(n_tokens):
            self._append(k[:, :, start:stop], v[:, :, start:stop])
        self.n_tokens = n_tokens

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend the packed tokens and the new one, then pack it."""
        t = self.n_tokens
        queries = self.fold(q) * q.shape[-1] ** -0.5
        scores = queries.new_empty(*queries.shape[:-1], t + 1)
        for start, stop in self._pieces(t):
            keys = self.unpacked(self.keys, start, stop).transpose(-1, -2)
            scores[..., start:stop] = torch.matmul(queries, keys)
        scores[..., t:] = torch.matmul(queries, k.transpose(-1, -2))
        weights = scores.softmax(dim=-1)
        out = torch.matmul(weights[..., t:], v)
        for start, stop in self._pieces(t):
            out += torch.matmul(weights[..., start:stop], self.unpacked(self.values, start, stop))
        self._append(k, v)
        self.n_tokens += 1
        return self.unfold(out)

    def unpacked(self, side: Side, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` as [B, K, n, H] in the compute type."""
        return self._unpack(tuple(x.entries(start, stop) for x in side.parts), side)

    def _append(self, k: Tensor, v: Tensor) -> None:
        for x, side in ((k, self.keys), (v, self.values)):
            for buffer, part in zip(side.parts, self._pack(x, side), strict=True):
                buffer.append(part)

    def _pieces(self, n_tokens: int) -> Iterator[tuple[int, int]]:
        per_token = self.batch * self.mixer.n_kv_heads * self.mixer.head_dim
        step = max(1, PIECE_ELEMENTS // per_token)
        for start in range(0, n_tokens, step):
            yield start, min(start + step, n_tokens)

    def snapshot(self) -> int:
        """Remember the number of tokens."""
        return self.n_tokens

    def restore(self, snapshot: int) -> None:
        """Forget the tokens after it."""
        self.n_tokens = snapshot
        for buffer in self._token_buffers():
            buffer.length = snapshot

"""What methods share that pack every token of K and V as it is cached.

A prompt is attended exactly and packed a piece at a time. A step unpacks piece after piece into a
small copy that stays in cache, multiplies it, attends the new token unpacked, and packs it. With a
window of W tokens the buffers are rings: token t lies in entry t mod W, and a step leaves out the
entry that its own token overwrites.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from costmodel.errors import NotApplicableError
from costmodel.methods.base import AbstractMethod
from measure.kernels._steps import fits, token_step
from measure.methods.base import AbstractLayerCache
from measure.methods.buffers import GrowingBuffer
from measure.methods.fixed_steps import NO_ROOM, has_room
from measure.parts import piece_elements


class Side(NamedTuple):
    """Keys or values: their head size, and the buffers that hold the parts of their entries."""

    size: int
    parts: tuple[GrowingBuffer, ...]


class TokenPackedCache(AbstractLayerCache):
    """Keys and values packed token by token; one entry of every buffer is a token."""

    keys: Side
    values: Side
    #: bits and group that ``measure.kernels.token_decode`` knows; 0 bits: it has no such form
    kernel_bits = 0
    kernel_group = 0
    #: tokens there is room for, counted from the first
    _last_token = 0

    def _build(self, method: AbstractMethod) -> None:
        if self.mixer.chunk_tokens:
            raise NotApplicableError(f"{self.NAME}: chunked attention is run with full only")
        self.limit = self.mixer.max_kv_tokens()
        self._configure(method)
        m = self.mixer
        self.keys = Side(m.head_dim, self._parts(m.head_dim, is_values=False))
        self.values = Side(m.v_head_dim, self._parts(m.v_head_dim, is_values=True))

    @abstractmethod
    def _configure(self, method: AbstractMethod) -> None:
        """Read the method's parameters."""

    @abstractmethod
    def _parts(self, size: int, *, is_values: bool) -> tuple[GrowingBuffer, ...]:
        """Empty buffers for entries of heads of ``size``."""

    @abstractmethod
    def _pack(self, x: Tensor, side: Side) -> tuple[Tensor, ...]:
        """[B, K, n, H] -> one tensor per buffer."""

    @abstractmethod
    def _unpack(self, parts: tuple[Tensor, ...], side: Side) -> Tensor:
        """Invert ``_pack``, in the compute type."""

    def kernel_scales(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Scales of keys and of values that hold for all tokens, for the kernels."""
        return (), ()

    def _prepare(self, k: Tensor, v: Tensor) -> None:
        """Look at a whole prompt before it is packed."""

    def _buffer(self, entry: tuple[int, ...], dtype: torch.dtype, heads: int = 0) -> GrowingBuffer:
        return GrowingBuffer(self.batch, heads or self.mixer.n_kv_heads, entry, dtype, self.device)

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from self._token_buffers()

    def _token_buffers(self) -> tuple[GrowingBuffer, ...]:
        return (*self.keys.parts, *self.values.parts)

    def _held(self, n_tokens: int) -> int:
        return n_tokens if self.limit is None else min(n_tokens, self.limit)

    def reserve(self, n_tokens: int) -> None:
        """Room for ``n_tokens`` packed tokens, or for the window."""
        self._last_token = n_tokens
        for buffer in self._token_buffers():
            buffer.reserve(self._held(n_tokens))

    def store(self, k: Tensor, v: Tensor) -> None:
        """Pack the prompt, a piece at a time; of a window the last W tokens in their entries."""
        self._prepare(k, v)
        n_tokens = k.shape[2]
        held = self._held(n_tokens)
        for buffer in self._token_buffers():  # else every piece would reallocate all before it
            if buffer.capacity < held:
                buffer.reserve(held)
        if held < n_tokens:
            k, v = (x[:, :, -held:].roll(n_tokens % held, dims=2) for x in (k, v))
        for start, stop in self._pieces(0, held):
            self._append(k[:, :, start:stop], v[:, :, start:stop])
        self.n_tokens = n_tokens

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend the packed tokens and the new one, then pack it."""
        if self.is_reference:
            return self._reference_step(q, k, v)
        if self.fused and self.kernel_bits and fits(self.mixer):
            return token_step(
                self,
                (q, k, v),
                (self.keys.parts, self.values.parts),
                self.kernel_scales(),
                bits=self.kernel_bits,
                group=self.kernel_group,
            )
        now, queries, new_key = self.now(), q, k
        if self.ROTATES:
            queries, new_key = (self.turned(x, now, self._longest) for x in (q, k))
        queries = self.fold(queries) * q.shape[-1] ** -0.5
        scores = [
            torch.matmul(queries, self._positioned_keys(start, stop).transpose(-1, -2))
            for start, stop in self._attended()
        ]
        scores.append(torch.matmul(queries, new_key.transpose(-1, -2)))
        joined = torch.cat(scores, dim=-1)
        if self.fixed_shapes:
            joined[..., :-1].masked_fill_(self._unseen(now), -torch.inf)
        weights = joined.softmax(dim=-1)
        out = torch.matmul(weights[..., -1:], v)
        first = 0
        for start, stop in self._attended():
            part = weights[..., first : first + stop - start]
            out += torch.matmul(part, self.unpacked(self.values, start, stop))
            first += stop - start
        self._add(k, v)
        return self.unfold(out)

    def _reference_step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The whole layer unpacked, then attended with the new token."""
        keys, values = (
            torch.cat([*(self.unpacked(side, *part) for part in self._entries()), new], dim=2)
            for side, new in ((self.keys, k), (self.values, v))
        )
        out = self._attend_copy(q, keys, values)
        self._add(k, v)
        return out

    def _attend_copy(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend unpacked copies [B, K, T + 1, H] as the published code does."""
        raise AssertionError(f"{self.NAME} has no reference form")

    def _unseen(self, now: Tensor) -> Tensor:
        """Entries [room] that the new token does not attend: what is not held yet, or leaves."""
        entries = torch.arange(self._room, device=now.device)
        if not self._is_full_ring:
            return entries >= now
        return entries == now % self._ring

    @property
    def _room(self) -> int:
        return self.keys.parts[0].capacity

    @property
    def _longest(self) -> int:
        """No position of this or a later step with the same shapes reaches it."""
        return max(self.n_tokens + 1, self._last_token)

    def _why_shapes_change(self) -> str:
        if self._is_full_ring:
            return ""
        if self.limit is not None and self._room >= self.limit:
            return f"a window of {self.limit} tokens is not full yet: a step's reads still grow"
        return "" if has_room(self.keys.parts[0]) else NO_ROOM

    def _add(self, k: Tensor, v: Tensor) -> None:
        if self.fixed_shapes:
            now = self.now()
            slot = now % self._ring if self._is_full_ring else now
            for buffer, part in self._packed_parts(k, v):
                buffer.put(slot, part)
                buffer.length = min(self.n_tokens + 1, buffer.capacity)
        elif self._is_full_ring:
            self._overwrite(self.n_tokens % self._ring, k, v)
        else:
            self._append(k, v)
        self.n_tokens += 1

    def _entries(self) -> tuple[tuple[int, int], ...]:
        """Ranges of entries that the next token attends, none of them empty."""
        if self.fixed_shapes:  # what does not count is masked
            return ((0, self._room),)
        if not self._is_full_ring:
            return ((0, self.n_tokens),)
        leaving = self.n_tokens % self._ring
        return tuple(x for x in ((0, leaving), (leaving + 1, self._ring)) if x[0] < x[1])

    @property
    def _ring(self) -> int:
        return self.limit or 0

    @property
    def _is_full_ring(self) -> bool:
        return self.limit is not None and self.n_tokens >= self.limit

    def _attended(self) -> Iterator[tuple[int, int]]:
        """Ranges of entries that the next token attends, a piece each."""
        for first, last in self._entries():
            yield from self._pieces(first, last)

    def _positioned_keys(self, start: int, stop: int) -> Tensor:
        keys = self.unpacked(self.keys, start, stop)
        if not self.ROTATES:
            return keys
        return self.turned(keys, self._positions(start, stop), self._longest)

    def _positions(self, start: int, stop: int) -> Tensor:
        """Positions [n] of the tokens in a range of entries."""
        entries = torch.arange(start, stop, device=self.device)
        if not self._is_full_ring:
            return entries
        last = self.now() - 1
        return last - (last - entries) % self._ring

    def unpacked(self, side: Side, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` as [B, K, n, H] in the compute type."""
        return self._unpack(tuple(x.entries(start, stop) for x in side.parts), side)

    def _append(self, k: Tensor, v: Tensor) -> None:
        for buffer, part in self._packed_parts(k, v):
            buffer.append(part)

    def _overwrite(self, entry: int, k: Tensor, v: Tensor) -> None:
        for buffer, part in self._packed_parts(k, v):
            buffer.write(entry, part)

    def _packed_parts(self, k: Tensor, v: Tensor) -> Iterator[tuple[GrowingBuffer, Tensor]]:
        for x, side in ((k, self.keys), (v, self.values)):
            yield from zip(side.parts, self._pack(x, side), strict=True)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        per_token = self.batch * self.mixer.n_kv_heads * self.mixer.head_dim
        step = max(1, piece_elements(self.device) // per_token)
        for start in range(first, last, step):
            yield start, min(start + step, last)

    def snapshot(self) -> Any:
        """Remember the number of tokens, and what the next one overwrites in a full ring."""
        if not self._is_full_ring:
            return self.n_tokens, None
        entry = self.n_tokens % self._ring
        return self.n_tokens, [b.entries(entry, entry + 1).clone() for b in self._token_buffers()]

    def restore(self, snapshot: Any) -> None:
        """Forget the tokens after it, and put back what they overwrote."""
        self.n_tokens, overwritten = snapshot
        if overwritten is None:
            for buffer in self._token_buffers():
                buffer.length = self.n_tokens
            self.reset_steps()
            return
        for buffer, entry in zip(self._token_buffers(), overwritten, strict=True):
            buffer.write(self.n_tokens % self._ring, entry)

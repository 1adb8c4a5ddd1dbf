"""KIVI run for real: int32-packed keys (per channel) and values (per token), 16-bit residuals.

Keys are quantised in whole blocks of R tokens, along the tokens, one scale per ``group`` of them
and channel; values token by token along the channels. The residuals hold the last T mod R keys and
the last min(T, R) values in the compute type. A step attends everything in the compute type: packed
pieces are unpacked into a small copy that stays in cache, then multiplied. Only after it was used
is a full block of keys, or the oldest value, quantised, as in jy-yuan/KIVI
``models/llama_kivi.py``.

With a window of W tokens the values are a ring of W, and of the keys the oldest block leaves as
soon as the others cover the window; what is older than the window is masked.
"""

from collections.abc import Iterator
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from costmodel.errors import NotApplicableError
from costmodel.methods.base import AbstractMethod
from costmodel.methods.kivi import Kivi
from measure.kernels._steps import fits, kivi_step, sizes_fit
from measure.methods.base import AbstractLayerCache, Realisation
from measure.methods.buffers import GrowingBuffer
from measure.methods.eager import repeat_kv, softmax_fp32
from measure.methods.fixed_steps import NO_ROOM
from measure.methods.packing import dequantise, quantise
from measure.parts import piece_elements


class _Packed(NamedTuple):
    """Quantised entries: codes with their scales and zeros."""

    words: GrowingBuffer
    scales: GrowingBuffer
    zeros: GrowingBuffer

    def append(self, parts: tuple[Tensor, Tensor, Tensor]) -> None:
        for buffer, part in zip(self, parts, strict=True):
            buffer.append(part)

    def reserve(self, capacity: int) -> None:
        for buffer in self:
            buffer.reserve(capacity)

    def write(self, index: int, parts: tuple[Tensor, Tensor, Tensor]) -> None:
        for buffer, part in zip(self, parts, strict=True):
            buffer.write(index, part)

    def drop_oldest(self, n: int, *, release: bool) -> None:
        for buffer in self:
            buffer.drop_oldest(n, release=release)

    def truncate(self, length: int) -> None:
        for buffer in self:
            buffer.length = length

    @property
    def length(self) -> int:
        return self.words.length


class _Snapshot(NamedTuple):
    n_tokens: int
    key_blocks: int
    values: int
    recent_keys: Tensor
    recent_values: Tensor
    oldest: int
    oldest_packed: int
    packed: list[Tensor] | None


@final
class KiviCache(AbstractLayerCache):
    """Packed state and residuals of one layer.

    The value residual is a ring: ``_oldest`` is the entry that leaves next once it is full. With a
    window the packed values are one too, and ``_oldest_packed`` the entry that leaves next.
    """

    NAME: ClassVar[str] = "kivi"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "codes, scales and zeros repeated to all query heads and made contiguous, unpacked "
        "whole; scores and residuals concatenated; softmax in fp32"
    )

    def _build(self, method: AbstractMethod) -> None:
        assert isinstance(method, Kivi)
        self.bits, self.group, self.residual = method.bits, method.group, method.residual_tokens
        if self.mixer.chunk_tokens:
            raise NotApplicableError("kivi: chunked attention is run with full only")
        size, self.limit = self.mixer.head_dim, self.mixer.max_kv_tokens()
        self.ring = self.residual if self.limit is None else min(self.residual, self.limit)
        per_word = 32 // self.bits
        for name, length in (("head_dim", size), ("residual_tokens", self.residual)):
            if length % self.group or length % per_word:
                raise NotApplicableError(
                    f"kivi packs {name} in groups of {self.group} and words of {per_word}; "
                    f"{length} is not a multiple of both"
                )
        self.keys = self._packed(self.residual, (size,))
        self.values = self._packed(size, ())
        self.recent_keys = self._buffer((size,), self.dtype)
        self.recent_values = self._buffer((size,), self.dtype)
        self._oldest = self._oldest_packed = 0
        self._exact = True

    def _packed(self, length: int, rows: tuple[int, ...]) -> _Packed:
        """Entries of ``length`` elements packed along the last axis (for each of ``rows``)."""
        return _Packed(
            self._buffer((*rows, length * self.bits // 32), torch.int32),
            self._buffer((*rows, length // self.group), self.dtype),
            self._buffer((*rows, length // self.group), self.dtype),
        )

    def _buffer(self, entry: tuple[int, ...], dtype: torch.dtype) -> GrowingBuffer:
        return GrowingBuffer(self.batch, self.mixer.n_kv_heads, entry, dtype, self.device)

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from (*self.keys, *self.values, self.recent_keys, self.recent_values)

    def reserve(self, n_tokens: int) -> None:
        """Room for the packed blocks and tokens, and for both residuals at their fullest."""
        if self.is_reference:
            return  # it grows by torch.cat
        self._exact = False
        blocks = n_tokens // self.residual
        if self.limit is not None:
            blocks = min(blocks, -(-self.limit // self.residual) + 1)
        self.keys.reserve(blocks)
        self.values.reserve(max(0, self._held(n_tokens) - self.ring))
        self.recent_keys.reserve(min(n_tokens, self.residual))
        self.recent_values.reserve(min(n_tokens, self.ring))

    def clear(self) -> None:
        """Empty; the rings start over."""
        for buffer in self._buffers():
            buffer.clear(release=self._exact)
        self.n_tokens = self._oldest = self._oldest_packed = 0
        self.reset_steps()

    def _held(self, n_tokens: int) -> int:
        return n_tokens if self.limit is None else min(n_tokens, self.limit)

    def _blocks(self, n_tokens: int) -> int:
        """Packed blocks of keys held with ``n_tokens`` seen."""
        not_recent = self._held(n_tokens) - n_tokens % self.residual
        return max(0, -(-not_recent // self.residual))

    def store(self, k: Tensor, v: Tensor) -> None:
        """Quantise whole blocks of keys and all but the last values, a piece at a time."""
        n_tokens, r = k.shape[2], self.residual
        held, n_blocks, last = self._held(n_tokens), self._blocks(n_tokens), n_tokens // r * r
        n_values = held - min(held, r)
        blocks = k[:, :, last - n_blocks * r : last].unflatten(2, (n_blocks, r)).transpose(-1, -2)
        v = v[:, :, n_tokens - held :]
        if self._exact:  # else every piece would reallocate all before it
            self.keys.reserve(n_blocks)
            self.values.reserve(n_values)
        for start, stop in self._pieces(n_blocks, r):
            self.keys.append(quantise(blocks[:, :, start:stop], self.bits, self.group))
        for start, stop in self._pieces(n_values, 1):
            self.values.append(quantise(v[:, :, start:stop], self.bits, self.group))
        self.recent_keys.append(k[:, :, last:])
        self.recent_values.append(v[:, :, n_values:])
        self.n_tokens = n_tokens

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend packed and recent tokens and the new one, then quantise what is due."""
        if self.fused and fits(self.mixer) and sizes_fit(self.residual, self.group):
            return kivi_step(self, q, k, v)
        queries = self.fold(q)
        self.recent_keys.append(k)
        if self.n_tokens < self.ring:  # nothing is packed and the ring still has room
            self.recent_values.append(v)
            recent = self.recent_keys.entries(), self.recent_values.entries()
            out = scaled_dot_product_attention(queries, *recent)
        else:
            out = self.attend_packed(queries, v)
            self.replace_oldest_value(v)
        if self.recent_keys.length == self.residual:
            self.pack_full_block()
        self.n_tokens += 1
        if self.limit is not None:
            left = self.keys.length - self._blocks(self.n_tokens)
            self.keys.drop_oldest(left, release=self._exact)
        return self.unfold(out)

    def _why_shapes_change(self) -> str:
        kernels = self.fused and fits(self.mixer) and sizes_fit(self.residual, self.group)
        if not kernels:
            return "every R steps the host packs a block of keys (the kernels decide on the device)"
        return "" if self.keys.words.capacity else NO_ROOM

    @property
    def oldest(self) -> int:
        """Entry of the value ring that leaves next."""
        return self._oldest

    def now_holds(self, n_tokens: int) -> None:
        """Count what a step by kernels left in the buffers (without a window)."""
        r = self.residual
        if n_tokens > r:
            self._oldest = (self._oldest + 1) % r
        self.keys.truncate(n_tokens // r)
        self.values.truncate(max(0, n_tokens - r))
        self.recent_keys.length, self.recent_values.length = n_tokens % r, min(n_tokens, r)
        self.n_tokens = n_tokens

    def attend_packed(self, queries: Tensor, v: Tensor) -> Tensor:
        """Attend everything, the new key (among the recent ones) and value included."""
        if self.is_reference:
            return self._attend_reference(queries, v)
        scores = self._scores(queries)
        older = scores.shape[-1] - 1 - self._held(self.n_tokens)  # keys whose values are gone
        if self.limit is not None:
            scores[..., : older + (self.n_tokens >= self.limit)] = -torch.inf
        return self._weighted_sum(scores.softmax(dim=-1)[..., older:], v)

    def _attend_reference(self, queries: Tensor, v: Tensor) -> Tensor:
        """``llama_kivi.py``: codes, scales and zeros repeated to all query heads and made
        contiguous, unpacked whole, multiplied; scores concatenated, softmax in fp32.
        """
        m = self.mixer
        q = queries.reshape(self.batch, m.n_heads, 1, -1)
        words, scales, zeros = (repeat_kv(x.entries(), m.n_heads) for x in self.keys)
        # [B, N, H, tokens]: channels apart, tokens packed along the last axis
        parts = [x.transpose(2, 3).flatten(3).contiguous() for x in (words, scales, zeros)]
        packed = dequantise(parts[0], parts[1], parts[2], self.bits, self.group)
        recent = repeat_kv(self.recent_keys.entries(), m.n_heads)
        scores = torch.cat(
            (torch.matmul(q, packed), torch.matmul(q, recent.transpose(2, 3))), dim=-1
        )
        scores = scores / m.head_dim**0.5
        older = scores.shape[-1] - 1 - self._held(self.n_tokens)
        if self.limit is not None:
            scores[..., : older + (self.n_tokens >= self.limit)] = -torch.inf
        weights = softmax_fp32(scores)[..., older:]
        first, oldest = self._oldest_packed, self._oldest
        in_order = [torch.cat((x.entries(first), x.entries(0, first)), dim=2) for x in self.values]
        words, scales, zeros = (repeat_kv(x, m.n_heads).contiguous() for x in in_order)
        values = dequantise(words, scales, zeros, self.bits, self.group)
        ring = self.recent_values
        full = torch.cat((ring.entries(oldest), ring.entries(0, oldest), v), dim=2)
        n_packed = values.shape[2]
        out = torch.matmul(weights[..., :n_packed], values)
        out += torch.matmul(weights[..., n_packed:], repeat_kv(full, m.n_heads))
        return out.reshape(queries.shape[:3] + out.shape[-1:])

    def _scores(self, queries: Tensor) -> Tensor:
        """Scaled scores [B, K, G, keys] of packed and recent keys, the new one included."""
        r, n_packed = self.residual, self.keys.length * self.residual
        queries = queries * self.mixer.head_dim**-0.5
        scores = queries.new_empty(*queries.shape[:3], n_packed + self.recent_keys.length)
        for start, stop in self.key_pieces():
            piece = torch.matmul(queries.unsqueeze(2), self.dequantised_keys(start, stop))
            part = scores[..., start * r : stop * r].unflatten(-1, (stop - start, r))
            part.copy_(piece.transpose(2, 3))
        recent = self.recent_keys.entries().transpose(-1, -2)
        scores[..., n_packed:] = torch.matmul(queries, recent)
        return scores

    def _weighted_sum(self, weights: Tensor, v: Tensor) -> Tensor:
        """Sum [B, K, G, H] of packed values, the ring and the new one, each from its oldest on."""
        n_packed, first, oldest = self.values.length, self._oldest_packed, self._oldest
        out = torch.matmul(weights[..., -1:], v)
        for start, stop in self.value_pieces():
            at = start - first if start >= first else n_packed - first + start
            part = weights[..., at : at + stop - start]
            out += torch.matmul(part, self.dequantised_values(start, stop))
        turn = n_packed + self.ring - oldest
        out += torch.matmul(weights[..., n_packed:turn], self.recent_values.entries(oldest))
        if oldest:
            out += torch.matmul(weights[..., turn:-1], self.recent_values.entries(0, oldest))
        return out

    def key_pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of key blocks that are unpacked together."""
        return self._pieces(self.keys.length, self.residual)

    def value_pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of value tokens that are unpacked together; none spans a ring's seam."""
        yield from self._pieces(self._oldest_packed, 1)
        rest = self.values.length - self._oldest_packed
        for start, stop in self._pieces(rest, 1):
            yield start + self._oldest_packed, stop + self._oldest_packed

    def dequantised_keys(self, start: int, stop: int) -> Tensor:
        """Blocks of keys as [B, K, blocks, H, R]."""
        return self._dequantised(self.keys, start, stop)

    def dequantised_values(self, start: int, stop: int) -> Tensor:
        """Values of a range of tokens as [B, K, tokens, H]."""
        return self._dequantised(self.values, start, stop)

    def _dequantised(self, packed: _Packed, start: int, stop: int) -> Tensor:
        words, scales, zeros = (buffer.entries(start, stop) for buffer in packed)
        return dequantise(words, scales, zeros, self.bits, self.group)

    def replace_oldest_value(self, v: Tensor) -> None:
        """Quantise the value that leaves the ring and put the new one in its place."""
        if self.limit is None or self.n_tokens < self.limit:
            self.values.append(self._leaving_value())
        elif self.values.length:  # a window longer than the residual: the ring of packed values
            self.values.write(self._oldest_packed, self._leaving_value())
            self._oldest_packed = (self._oldest_packed + 1) % self.values.length
        self.recent_values.write(self._oldest, v)
        self._oldest = (self._oldest + 1) % self.ring

    def _leaving_value(self) -> tuple[Tensor, Tensor, Tensor]:
        leaving = self.recent_values.entries(self._oldest, self._oldest + 1)
        return quantise(leaving, self.bits, self.group)

    def pack_full_block(self) -> None:
        """Quantise the R recent keys as one block."""
        block = self.recent_keys.entries().unsqueeze(2).transpose(-1, -2)
        self.keys.append(quantise(block, self.bits, self.group))
        self.recent_keys.clear(release=self._exact)

    def _pieces(self, n_entries: int, tokens_per_entry: int) -> Iterator[tuple[int, int]]:
        """Ranges of entries of about ``piece_elements`` over the whole batch."""
        per_token = self.batch * self.mixer.n_kv_heads * self.mixer.head_dim
        step = max(1, piece_elements(self.device) // (per_token * tokens_per_entry))
        for start in range(0, n_entries, step):
            yield start, min(start + step, n_entries)

    def snapshot(self) -> _Snapshot:
        """Lengths, and copies of the residuals (a step may empty or overwrite them)."""
        return _Snapshot(
            self.n_tokens,
            self.keys.length,
            self.values.length,
            self.recent_keys.entries().clone(),
            self.recent_values.entries().clone(),
            self._oldest,
            self._oldest_packed,
            # in a window a step drops or overwrites what was packed
            None
            if self.limit is None
            else [b.entries().clone() for b in (*self.keys, *self.values)],
        )

    def restore(self, snapshot: _Snapshot) -> None:
        """Drop what the step packed and put the residuals back."""
        self.n_tokens, self._oldest = snapshot.n_tokens, snapshot.oldest
        self._oldest_packed = snapshot.oldest_packed
        if snapshot.packed is not None:
            for buffer, entries in zip((*self.keys, *self.values), snapshot.packed, strict=True):
                buffer.clear()
                buffer.append(entries)
        self.keys.truncate(snapshot.key_blocks)
        self.values.truncate(snapshot.values)
        for buffer, entries in (
            (self.recent_keys, snapshot.recent_keys),
            (self.recent_values, snapshot.recent_values),
        ):
            buffer.clear()
            buffer.append(entries)
        self.reset_steps()

"""KVQuant run for real: keys packed before rotation by tables per channel, values per token.

Every key channel has a table of 2^bits values, found by k-means on a calibration sample (random
here, as costs do not depend on it); every value token has a scale and an offset that stretch one
table of 2^bits normal quantiles. The most extreme elements of a token, over all heads, are kept as
they are: of keys relative to their channel's table. A step unpacks pieces, puts the exact elements
back, turns the keys to their positions and multiplies.

``reference`` holds what the published kernels read: outliers as fp32 values with int32 indices, an
fp32 table for every token's values, fp32 tables with thresholds and zero point for every channel.
A step unpacks all of it to fp32 and multiplies in fp32; the kernels that do so in registers exist
in CUDA alone.
"""

import functools
import math
from collections.abc import Iterator
from typing import ClassVar, final

import torch
from torch import Tensor

from costmodel.methods.base import AbstractMethod
from costmodel.methods.kvquant import KvQuant
from measure.methods.base import Realisation
from measure.methods.buffers import GrowingBuffer
from measure.methods.eager import softmax_fp32
from measure.methods.packing import pack_words, unpack_words
from measure.methods.token_packed import Side, TokenPackedCache

#: Tokens of the random calibration sample, and rounds of k-means over it.
_SAMPLE_TOKENS, _ROUNDS = 256, 8
#: What a channel's published table holds besides its values: two thresholds and the zero point.
_THRESHOLDS = 3


@final
class KvQuantCache(TokenPackedCache):
    """Codes and exact elements of every token, scales of the values, tables of the keys."""

    NAME: ClassVar[str] = "kvquant"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "the deployed layout (fp32 and int32 outliers, fp32 tables) and products in fp32; the "
        "fused CUDA kernels as a dense fp32 copy. The new token is attended before it is packed, "
        "and its outliers found on the device (upstream: after, and on the host)"
    )
    ROTATES = True

    def _configure(self, method: AbstractMethod) -> None:
        assert isinstance(method, KvQuant)
        self.method, self.bits = method, method.bits
        # published: in fp32, with both thresholds and the zero point
        dtype, entries = self.dtype, 1 << self.bits
        if self.is_reference:
            dtype, entries = torch.float32, entries + _THRESHOLDS
        self.codebook = GrowingBuffer(1, self.mixer.n_kv_heads, (entries,), dtype, self.device)
        channels = self.mixer.n_kv_heads * self.mixer.head_dim
        self._set_tables(_random_tables(channels, 1 << self.bits, self.device))

    def calibrate(self, sample: Tensor) -> None:
        """Set the keys' tables from unrotated keys [n, K H]; nothing may be cached yet."""
        self._set_tables(kmeans(sample.float(), 1 << self.bits))

    def _set_tables(self, tables: Tensor) -> None:
        self.codebook.clear(release=True)
        if self.is_reference:
            low, high = tables[:, :1], tables[:, -1:]
            tables = torch.cat((tables, high, low, (low + high) / 2), dim=-1)
        self.codebook.append(tables.unflatten(0, (self.mixer.n_kv_heads, -1)).unsqueeze(0))
        # decisions are made against the tables as they are stored
        self.tables = self.codebook.entries()[0].flatten(0, 1)[:, : 1 << self.bits]

    def _parts(self, size: int, *, is_values: bool) -> tuple[GrowingBuffer, ...]:
        n_outliers = self.method.outliers_of(self.mixer.n_kv_heads * size)
        published = self.is_reference
        exact, index = (torch.float32, torch.int32) if published else (self.dtype, torch.int16)
        parts = (
            self._buffer((-(-size * self.bits // 32),), torch.int32),
            self._buffer((n_outliers,), exact, heads=1),
            self._buffer((n_outliers,), index, heads=1),
        )
        # a value's scale and offset, or the table that they make
        entry = (1 << self.bits if published else 2,)
        return (*parts, self._buffer(entry, exact, heads=1)) if is_values else parts

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from self._token_buffers()
        yield self.codebook

    def clear(self) -> None:
        """Forget the tokens; the tables stay."""
        self.n_tokens = 0
        for buffer in self._token_buffers():
            buffer.clear()

    def _pack(self, x: Tensor, side: Side) -> tuple[Tensor, ...]:
        rows = x.transpose(1, 2).flatten(2)  # [B, n, K H]
        exact = rows.float()
        if side is self.keys:
            tables = self.tables.float()
            low, high = tables[:, 0], tables[:, -1]
            index = self._most_extreme((exact - (low + high) / 2) / (high - low), side)
            codes = _nearest(exact, tables)
            scales: tuple[Tensor, ...] = ()
        else:
            index = self._most_extreme(exact, side)
            scale = self._stretch(exact, index)
            levels = _normal_levels(self.bits, exact.device)
            step = torch.where(scale[..., :1] == 0, 1.0, scale[..., :1].float())
            codes = _nearest((exact - scale[..., 1:].float()) / step, levels)
            if self.is_reference:
                scale = levels * scale[..., :1].float() + scale[..., 1:].float()
            scales = (scale.unsqueeze(1),)
        heads = codes.unflatten(-1, (-1, side.size)).transpose(1, 2)
        outliers = rows.gather(-1, index).unsqueeze(1)
        words = pack_words(heads.contiguous(), self.bits)
        index = index.int() if self.is_reference else _to_int16(index)
        return (words, outliers, index.unsqueeze(1), *scales)

    def _most_extreme(self, x: Tensor, side: Side) -> Tensor:
        """Indices [B, n, o] of the o/2 largest and smallest of x [B, n, d]."""
        n_outliers = self.method.outliers_of(x.shape[-1])
        if n_outliers == x.shape[-1]:
            return torch.arange(n_outliers, device=x.device).expand(*x.shape[:-1], -1)
        half = n_outliers // 2
        ends = [x.topk(half, dim=-1, largest=largest).indices for largest in (True, False)]
        return torch.cat(ends, dim=-1)

    def _stretch(self, x: Tensor, outliers: Tensor) -> Tensor:
        """Half the range and the middle [B, n, 2] of x [B, n, d] without its outliers."""
        low = x.scatter(-1, outliers, torch.inf).amin(-1)
        high = x.scatter(-1, outliers, -torch.inf).amax(-1)
        none = high < low  # every element is an outlier
        pair = torch.stack(((high - low) / 2, (high + low) / 2), dim=-1)
        return pair.masked_fill(none.unsqueeze(-1), 0.0).to(self.dtype)

    def _unpack(self, parts: tuple[Tensor, ...], side: Side) -> Tensor:
        words, outliers, index, *scales = parts
        codes = unpack_words(words, self.bits, side.size)  # [B, K, n, H]
        if side is self.keys:
            values = self._looked_up(codes)
        elif self.is_reference:  # [B, 1, n, levels]: a table a token for all heads
            values = scales[0].expand(-1, codes.shape[1], -1, -1).gather(3, codes.long())
        else:
            levels = _normal_levels(self.bits, codes.device).to(self.dtype)
            values = levels.index_select(0, codes.flatten().int()).view(codes.shape)
            values = values.mul_(scales[0][..., :1]).add_(scales[0][..., 1:])
        n, size = values.shape[2:]
        position = index.squeeze(1).long()
        position = position if self.is_reference else position & 0xFFFF
        head, channel = position // size, position % size
        token = torch.arange(n, device=values.device).view(1, n, 1)
        flat = ((head * n + token) * size + channel).flatten(1)
        values.flatten(1).scatter_(1, flat, outliers.flatten(1))
        return values

    def _looked_up(self, codes: Tensor) -> Tensor:
        channels = torch.arange(len(self.tables), device=codes.device, dtype=torch.int32)
        first = (channels << self.bits).view(codes.shape[1], 1, -1)
        index = first + codes
        return self.tables.flatten().index_select(0, index.flatten()).view(codes.shape)

    def _reference_step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``QuantK`` and ``QuantV.forward_fused_sparse``: fp32 products over everything, the scores
        halved in between.
        """
        position = torch.tensor([self.n_tokens], device=q.device)
        keys = [self._positioned_keys(*part) for part in self._entries()]
        keys.append(self.turned(k.float(), position))
        queries = self.fold(self.turned(q.float(), position))
        scores = torch.matmul(queries, torch.cat(keys, dim=2).transpose(-1, -2))
        weights = softmax_fp32(scores.to(q.dtype) / q.shape[-1] ** 0.5)
        values = [self.unpacked(self.values, *part) for part in self._entries()]
        out = torch.matmul(weights.float(), torch.cat((*values, v.float()), dim=2))
        self._add(k, v)
        return self.unfold(out.to(q.dtype))


@functools.lru_cache(maxsize=8)
def _random_tables(channels: int, n_levels: int, device: torch.device) -> Tensor:
    """Tables for normal keys: a stand-in for a calibration set, the same for every layer."""
    generator = torch.Generator(device=device).manual_seed(0)
    sample = torch.randn(_SAMPLE_TOKENS, channels, generator=generator, device=device)
    return kmeans(sample, n_levels)


def kmeans(sample: Tensor, n_levels: int) -> Tensor:
    """Sorted tables [channels, n_levels] of one-dimensional k-means over sample [n, channels]."""
    at = (torch.arange(n_levels, device=sample.device) + 0.5) / n_levels
    tables = sample.quantile(at, dim=0).T.contiguous()
    columns = sample.T.contiguous()
    for _ in range(_ROUNDS):
        nearest = torch.searchsorted((tables[:, 1:] + tables[:, :-1]) / 2, columns)
        counts = torch.zeros_like(tables).scatter_add_(1, nearest, torch.ones_like(columns))
        sums = torch.zeros_like(tables).scatter_add_(1, nearest, columns)
        tables = torch.where(counts > 0, sums / counts.clamp(min=1), tables)
    return tables.sort(dim=1).values


def _nearest(x: Tensor, tables: Tensor) -> Tensor:
    """Codes of the nearest of sorted ``tables`` [..., levels], a byte each, shape of x."""
    middles = (tables[..., 1:] + tables[..., :-1]) / 2
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for j in range(middles.shape[-1]):
        codes += x > middles[..., j]
    return codes


@functools.cache
def _normal_levels(bits: int, device: torch.device) -> Tensor:
    """Quantiles of the normal distribution, stretched to -1 .. 1: the values' common table."""
    n = 1 << bits
    at = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    levels = torch.erfinv(2 * at - 1) * math.sqrt(2)
    return (levels / levels[-1]).float().to(device)


def _to_int16(index: Tensor) -> Tensor:
    """Indices up to 65,535 in two bytes."""
    return torch.where(index > 32767, index - 65536, index).to(torch.int16)

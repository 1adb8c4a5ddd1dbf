"""FP8 cache run for real: e4m3 elements, and one fp32 scale each for a layer's keys and values.

The prompt's largest magnitude becomes 448, the largest e4m3 value; later tokens use the same scale
and saturate. A CPU has no attention over fp8: pieces are widened into a copy and multiplied.
"""

from collections.abc import Iterator
from typing import ClassVar, final

import torch
from torch import Tensor

from costmodel.methods.base import AbstractMethod
from measure.methods.base import Realisation
from measure.methods.buffers import GrowingBuffer
from measure.methods.kept_tokens import attend_all
from measure.methods.token_packed import Side, TokenPackedCache

#: Largest finite e4m3 value.
E4M3_MAX = 448.0


@final
class Fp8KvCache(TokenPackedCache):
    """Elements in e4m3 and two scales."""

    NAME: ClassVar[str] = "fp8_kv"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "transformers' fp8 layer: `torch.cat`, the whole layer dequantised through fp32 every "
        "step, fused attention over the copy"
    )

    def _configure(self, method: AbstractMethod) -> None:
        self.scales = GrowingBuffer(1, 1, (), torch.float32, self.device)
        self.kernel_bits = 8

    def _parts(self, size: int, *, is_values: bool) -> tuple[GrowingBuffer, ...]:
        return (self._buffer((size,), torch.float8_e4m3fn),)

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from self._token_buffers()
        yield self.scales

    def reserve(self, n_tokens: int) -> None:
        """Room for ``n_tokens`` tokens and the scales."""
        if self.is_reference:
            return  # it grows by torch.cat
        super().reserve(n_tokens)
        self.scales.reserve(2)

    def _prepare(self, k: Tensor, v: Tensor) -> None:
        largest = torch.stack([x.abs().max().float() for x in (k, v)])
        # A prompt of zeros is stored as it is.
        scales = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
        self.scales.append(scales.view(1, 1, 2))

    def _scale(self, side: Side) -> Tensor:
        return self.scales.entries()[0, 0, 0 if side is self.keys else 1]

    def kernel_scales(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One number each."""
        scales = self.scales.entries()[0, 0]
        return (scales[0:1],), (scales[1:2],)

    def _pack(self, x: Tensor, side: Side) -> tuple[Tensor, ...]:
        scaled = (x.float() / self._scale(side)).clamp_(-E4M3_MAX, E4M3_MAX)
        return (scaled.to(torch.float8_e4m3fn),)

    def _attend_copy(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Fused attention over the dequantised copy, as transformers' fp8 cache is attended."""
        return attend_all(self, q, keys, values)

    def _unpack(self, parts: tuple[Tensor, ...], side: Side) -> Tensor:
        if self.is_reference:
            return (parts[0].float() * self._scale(side)).to(self.dtype)
        return parts[0].to(self.dtype) * self._scale(side).to(self.dtype)

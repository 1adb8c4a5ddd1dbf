"""FlexGen's cache compression run for real: every token in groups of min/max codes along the head.

Heads are padded with zeros to whole groups, and the padding is stored, as in
FMInference/FlexLLMGen ``flexllmgen/compression.py``. Pieces are unpacked into a copy and
multiplied; the new token is attended as it is and packed after use.
"""

from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from costmodel.methods.base import AbstractMethod
from costmodel.methods.flexgen import FlexGen
from measure.methods.base import Realisation
from measure.methods.buffers import GrowingBuffer
from measure.methods.eager import eager_step
from measure.methods.packing import dequantise, quantise_bytes
from measure.methods.token_packed import Side, TokenPackedCache


@final
class FlexGenCache(TokenPackedCache):
    """Packed codes, scales and minima of every token."""

    NAME: ClassVar[str] = "flexgen"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "the whole layer unpacked, permuted to heads x tokens in copies, attended eagerly"
    )

    def _configure(self, method: AbstractMethod) -> None:
        assert isinstance(method, FlexGen)
        self.bits, self.group = method.bits, method.group
        size, power = self.mixer.head_dim, self.group & (self.group - 1) == 0
        whole = size % self.group == 0 and self.group * self.bits % 16 == 0
        if self.bits < 8 and whole and power and size * self.bits >= 256:
            self.kernel_bits, self.kernel_group = self.bits, self.group

    def _parts(self, size: int, *, is_values: bool) -> tuple[GrowingBuffer, ...]:
        n_groups = -(-size // self.group)
        return (
            self._buffer((n_groups * self.group * self.bits // 8,), torch.uint8),
            self._buffer((n_groups,), self.dtype),
            self._buffer((n_groups,), self.dtype),
        )

    def _pack(self, x: Tensor, side: Side) -> tuple[Tensor, ...]:
        return quantise_bytes(pad(x, (0, -side.size % self.group)), self.bits, self.group)

    def _attend_copy(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``mha_gen``: permuted to heads x tokens in copies, then eager."""
        keys, values = (
            x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3).contiguous()
            for x in (keys, values)
        )
        return eager_step(q, keys, values)[0]

    def _unpack(self, parts: tuple[Tensor, ...], side: Side) -> Tensor:
        codes, scales, zeros = parts
        return dequantise(codes, scales, zeros, self.bits, self.group)[..., : side.size]

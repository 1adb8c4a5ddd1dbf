"""Weights in 8 or 4 bits: packed once, unpacked a few rows at a time into the compute type.

    int8   one fp32 scale per output channel, symmetric (arXiv 2208.07339, weights only)
    int4   groups of 128 inputs with an fp16 scale and a 4-bit zero (GPTQ, AWQ)

What is packed is what the cost model stores so (``Linear.quantisable``): the matrices of mixers and
MLPs, not embeddings, head, norms or routers.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import pad

from costmodel.errors import NotApplicableError
from measure.methods.packing import pack_nibbles, unpack_nibbles
from measure.parts import piece_elements
from measure.points import PACKED_WEIGHT_DTYPES

GROUP = 128


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedMatrix:
    """A matrix [..., n_out, n_in]; leading axes are experts.

    codes   int8 [..., n_out, n_in], or nibbles uint8 [..., n_out, ceil(n_in / 2)]
    scales  fp32 [..., n_out, 1], or fp16 [..., n_out, groups]
    zeros   nibbles uint8 [..., ceil(n_out groups / 2)] of int4; None
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    n_in: int

    @property
    def n_out(self) -> int:
        """Rows."""
        return self.scales.shape[-2]

    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return tuple(x for x in (self.codes, self.scales, self.zeros) if x is not None)

    def __getitem__(self, expert: int) -> "PackedMatrix":
        return replace(
            self,
            codes=self.codes[expert],
            scales=self.scales[expert],
            zeros=None if self.zeros is None else self.zeros[expert],
        )

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of one matrix [rows, n_in]."""
        stop = self.n_out if stop is None else stop
        scales = self.scales[start:stop].to(dtype)
        if self.zeros is None:
            return self.codes[start:stop].to(dtype).mul_(scales)
        groups = scales.shape[-1]
        zeros = unpack_nibbles(self.zeros, torch.uint8)[: self.n_out * groups].view(-1, groups)
        codes = unpack_nibbles(self.codes[start:stop], dtype)[..., : self.n_in]
        codes = pad(codes, (0, groups * GROUP - self.n_in)).unflatten(-1, (groups, GROUP))
        shifted = codes - zeros[start:stop].to(dtype).unsqueeze(-1)
        return shifted.mul_(scales.unsqueeze(-1)).flatten(-2)[..., : self.n_in]


def packed(matrix: Tensor, weight_dtype: str) -> PackedMatrix:
    """Pack [..., n_out, n_in]: the nearest codes of the range of every channel or group."""
    x, n_in = matrix.float(), matrix.shape[-1]
    if weight_dtype == "int8":
        scales = x.abs().amax(dim=-1, keepdim=True) / 127
        codes = (x / torch.where(scales == 0, 1.0, scales)).round_().to(torch.int8)
        return PackedMatrix(codes=codes, scales=scales, zeros=None, n_in=n_in)
    if weight_dtype != "int4":
        raise NotApplicableError(
            f"weight dtype: can be run in {', '.join(PACKED_WEIGHT_DTYPES)}, got {weight_dtype!r}"
        )
    groups = pad(x, (0, -n_in % GROUP)).unflatten(-1, (-1, GROUP))
    # zero is a code, so the range has to hold it
    low, high = groups.amin(-1).clamp_(max=0.0), groups.amax(-1).clamp_(min=0.0)
    scales = ((high - low) / 15).half()
    step = torch.where(scales == 0, 1.0, scales.float())
    zeros = (-low / step).round_().clamp_(0, 15)
    codes = (groups / step.unsqueeze(-1) + zeros.unsqueeze(-1)).round_().clamp_(0, 15)
    flat = codes.flatten(-2)[..., :n_in].to(torch.uint8)
    return PackedMatrix(
        codes=pack_nibbles(flat),
        scales=scales,
        zeros=pack_nibbles(zeros.flatten(-2).to(torch.uint8)),
        n_in=n_in,
    )


def linear(x: Tensor, w: Any, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` for a tensor, or for a packed matrix a few rows at a time."""
    if not isinstance(w, PackedMatrix):
        return functional.linear(x, w, bias)
    step = max(1, piece_elements(x.device) // w.n_in)
    pieces = [
        functional.linear(x, w.dense(x.dtype, start, min(start + step, w.n_out)))
        for start in range(0, w.n_out, step)
    ]
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
    return out if bias is None else out + bias


def dense(w: Any, dtype: torch.dtype) -> Tensor:
    """The matrix itself, unpacked where it is packed."""
    return w.dense(dtype) if isinstance(w, PackedMatrix) else w

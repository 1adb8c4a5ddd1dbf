"""Min/max quantisation in groups, and packing of 2-, 4- and 8-bit codes into words.

    scale = (max - min) / (2^bits - 1),  zero = min   per group, both kept in the data's type
    code  = round((x - zero) / scale),   x ~ code * scale + zero

Code j of a word sits at bits ``bits * j``. Words are handled as bytes, so the host must be
little-endian (every platform PyTorch supports is). Unpacking looks each byte up in a table of its
8 / bits values: on a CPU that is 3 to 8 times faster than shifting and masking.
"""

import functools

import torch
from torch import Tensor

#: A table row viewed as one element, by its size in bytes, so that one gather moves a whole row.
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def quantise(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """[..., n] -> words [..., n bits / 32] int32, scales and zeros [..., n / group] in x's type.

    Codes are rounded against the scale and zero as stored, so the error stays within half a scale
    (plus the rounding of scale and zero themselves in a 16-bit type).
    """
    codes, scale, zero = quantise_bytes(x, bits, group)
    return codes.view(torch.int32), scale, zero


def quantise_bytes(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``quantise``, the codes as bytes [..., n bits / 8] for any n that fills whole ones."""
    levels = 2**bits - 1
    groups = x.unflatten(-1, (-1, group)).float()
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    zero = low.to(x.dtype)
    scale = ((high - low) / levels).to(x.dtype)
    # A constant group has scale 0: every code is 0 and the value is its zero point.
    step = torch.where(scale == 0, 1.0, scale.float())
    # The first operation makes the copy that the others change: x may be fp32 already.
    codes = (groups - zero).div_(step).round_().clamp_(0, levels).to(torch.uint8)
    return _pack(codes.flatten(-2), bits), scale.squeeze(-1), zero.squeeze(-1)


def dequantise(words: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int) -> Tensor:
    """Invert ``quantise`` or ``quantise_bytes``: [..., n] in the type of the scales."""
    codes = _unpack(words, bits, scale.dtype).unflatten(-1, (-1, group))
    return codes.mul_(scale.unsqueeze(-1)).add_(zero.unsqueeze(-1)).flatten(-2)


def _pack(codes: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    parts = codes.unflatten(-1, (-1, per_byte)).unbind(-1)
    packed = parts[0].clone(memory_format=torch.contiguous_format)
    for j, part in enumerate(parts[1:], start=1):
        packed |= part << (bits * j)
    return packed


def _unpack(words: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    table = _table(bits, dtype, words.device)
    indices = words.view(torch.uint8).to(torch.int32)
    values = torch.index_select(table, 0, indices.flatten()).view(dtype)
    return values.view(*words.shape[:-1], indices.shape[-1] * (8 // bits))


@functools.cache
def _table(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Tabulate the 8 / bits values of every byte, one wide element a row."""
    byte = torch.arange(256, device=device)
    columns = [(byte >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    rows = torch.stack(columns, dim=-1).to(dtype)
    return rows.view(_WIDE[rows.shape[-1] * rows.element_size()]).flatten()

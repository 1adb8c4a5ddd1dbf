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
from torch.nn.functional import pad

#: A table row viewed as one element, by its size in bytes, so that one gather moves a whole row.
_WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


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


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes of 4 bits [..., n], a byte each, as bytes [..., ceil(n / 2)]."""
    return _pack(pad(codes, (0, codes.shape[-1] % 2)), 4)


def unpack_nibbles(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Invert ``pack_nibbles``, in ``dtype``; an odd count comes back one longer."""
    return _unpack_bytes(data, 4, dtype)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n], a byte each, as int32 words [..., ceil(n bits / 32)].

    Eight codes of 3 bits fill three bytes.
    """
    n = codes.shape[-1]
    n_words = -(-n * bits // 32)
    per_unit = 8 if bits == 3 else 8 // bits
    codes = pad(codes, (0, -n % per_unit))
    if bits == 3:
        eight = codes.unflatten(-1, (-1, 8)).int()
        word = sum(eight[..., j] << (3 * j) for j in range(8))
        packed = torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], dim=-1)
        packed = packed.to(torch.uint8).flatten(-2)
    else:
        packed = _pack(codes, bits)
    packed = pad(packed, (0, max(0, 4 * n_words - packed.shape[-1])))[..., : 4 * n_words]
    return packed.contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """Invert ``pack_words``: ``n`` codes, a byte each."""
    data = words.view(torch.uint8)
    if bits != 3:
        return _unpack_bytes(data, bits, torch.uint8)[..., :n]
    triples = pad(data, (0, -data.shape[-1] % 3)).unflatten(-1, (-1, 3)).int()
    low = triples[..., 0] | (triples[..., 1] & 15) << 8
    high = triples[..., 1] >> 4 | triples[..., 2] << 4
    table = _table_of_twelve(words.device)
    indices = torch.stack((low, high), dim=-1)
    rows = torch.index_select(table, 0, indices.flatten()).view(torch.uint8)
    return rows.view(*words.shape[:-1], -1)[..., :n]


def _pack(codes: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    parts = codes.unflatten(-1, (-1, per_byte)).unbind(-1)
    packed = parts[0].clone(memory_format=torch.contiguous_format)
    for j, part in enumerate(parts[1:], start=1):
        packed |= part << (bits * j)
    return packed


def _unpack(words: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return _unpack_bytes(words.view(torch.uint8), bits, dtype)


def _unpack_bytes(data: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    table = _table(bits, dtype, data.device)
    indices = data.to(torch.int32)
    values = torch.index_select(table, 0, indices.flatten()).view(dtype)
    return values.view(*data.shape[:-1], indices.shape[-1] * (8 // bits))


@functools.cache
def _table(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Tabulate the 8 / bits values of every byte, one wide element a row."""
    byte = torch.arange(256, device=device)
    columns = [(byte >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    rows = torch.stack(columns, dim=-1).to(dtype)
    return rows.view(_WIDE[rows.shape[-1] * rows.element_size()]).flatten()


@functools.cache
def _table_of_twelve(device: torch.device) -> Tensor:
    """Tabulate the four 3-bit codes of every 12 bits, one int32 a row."""
    value = torch.arange(4096, device=device)
    columns = [(value >> shift) & 7 for shift in (0, 3, 6, 9)]
    return torch.stack(columns, dim=-1).to(torch.uint8).view(torch.int32).flatten()

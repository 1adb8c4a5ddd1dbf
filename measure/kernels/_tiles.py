"""Small choices that the decode kernels share."""

import math

import torch
import triton
import triton.language as tl

from costmodel.errors import NotApplicableError
from measure.kernels import interpreted

#: Head sizes that the kernels of dropping methods are built for: a tile's side.
_LEAST_SIZE, _MOST_SIZE = 16, 256


def dot_type(dtype: torch.dtype) -> tuple[tl.dtype, bool]:
    """Type that packed caches are multiplied in, and whether codes are extracted by PTX.

    Halves hold codes, and products of 16-bit queries and scales, with 11 bits; fp32 caches are for
    checking and are multiplied in fp32.
    """
    if dtype == torch.float32:
        return tl.float32, False
    return tl.float16, not interpreted()


def sizes_fit(*sizes: int) -> bool:
    """Whether tiles hold heads of these sizes: powers of two from 16 to 256."""
    return all(_LEAST_SIZE <= n <= _MOST_SIZE and not n & (n - 1) for n in sizes)


def check_heads(n_heads: int, n_kv_heads: int, *sizes: int) -> None:
    """Raise ``NotApplicableError`` where no kernel is built for such heads."""
    if n_heads % n_kv_heads:
        raise NotApplicableError(
            f"expected query heads in groups of one size, got {n_heads} over {n_kv_heads} KV heads"
        )
    if not sizes_fit(*sizes):
        raise NotApplicableError(
            f"the kernels take heads of 16, 32, 64, 128 or 256 elements, got "
            f"{' and '.join(map(str, sorted(set(sizes))))}; --engine torch takes any"
        )


def log2_scale(head_dim: int) -> float:
    """1 / sqrt(H) in units of log2, so that the softmax takes exp2."""
    return math.log2(math.e) / math.sqrt(head_dim)


def padded_group(group: int, least: int = 1) -> int:
    """Query heads of a KV head as a power of two, at least ``least``."""
    return max(triton.next_power_of_2(group), least)


def warps_for(head_dim: int) -> int:
    """Warps of a program: one, which needs no barriers, where its registers hold the sums."""
    return 1 if head_dim <= 128 else 4

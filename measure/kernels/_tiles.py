"""Small choices that the decode kernels share."""

import math

import torch
import triton
import triton.language as tl

from measure.kernels import interpreted


def dot_type(dtype: torch.dtype) -> tuple[tl.dtype, bool]:
    """Type that packed caches are multiplied in, and whether codes are extracted by PTX.

    Halves hold codes, and products of 16-bit queries and scales, with 11 bits; fp32 caches are for
    checking and are multiplied in fp32.
    """
    if dtype == torch.float32:
        return tl.float32, False
    return tl.float16, not interpreted()


def log2_scale(head_dim: int) -> float:
    """1 / sqrt(H) in units of log2, so that the softmax takes exp2."""
    return math.log2(math.e) / math.sqrt(head_dim)


def padded_group(group: int, least: int = 1) -> int:
    """Query heads of a KV head as a power of two, at least ``least``."""
    return max(triton.next_power_of_2(group), least)


def warps_for(head_dim: int) -> int:
    """Warps of a program: one, which needs no barriers, where its registers hold the sums."""
    return 1 if head_dim <= 128 else 4

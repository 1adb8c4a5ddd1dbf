"""What a pass really multiplies, counted by torch's flop counter while it runs.

The counter knows matmuls; it counts PyTorch's CPU flash-attention call as nothing, and all pairs of
causal CUDA calls, so those calls are mapped here: 2 (Hk + Hv) per query, key and head, of a causal
call only the pairs that exist. Nor does it know grouped matmuls of experts: 2 k n a row. Triton
kernels it cannot see at all: who launches one says what it multiplies (``count_launch``).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from costmodel.errors import MeasurementError


class _Launches:
    """FLOPs of all kernels launched so far in this process."""

    flops = 0


def count_launch(flops: int) -> None:
    """Say what a kernel multiplies that torch does not see."""
    _Launches.flops += flops


def count_flops(call: Callable[[], object], *, square: bool = False) -> int:
    """Run ``call`` once and return the FLOPs of its matmuls and attention calls.

    ``square`` counts a causal call as the whole square, as torch's counter does on a GPU and level
    ``reference`` of the cost model says.
    """
    aten = torch.ops.aten
    flash = functools.partial(_flash_flops, square=square)
    biased = functools.partial(_biased_flops, square=square)
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: flash,
        aten._scaled_dot_product_flash_attention: flash,
        aten._scaled_dot_product_efficient_attention: biased,
        aten._scaled_dot_product_cudnn_attention: biased,
        aten._grouped_mm: _grouped_flops,
    }
    before = _Launches.flops
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return int(counter.get_total_flops()) + _Launches.flops - before


def _flash_flops(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *_: Any,
    square: bool,
    **__: Any,
) -> int:
    """Shapes [B, N, S, Hk], [B, K, T, Hk], [B, K, T, Hv]."""
    b, n, s, hk = q
    pairs = s * (s + 1) // 2 if is_causal and not square else s * k[2]
    return 2 * b * n * pairs * (hk + v[3])


def _grouped_flops(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Rows [m, k] by experts [E, k, n], every row with one of them (or [E, m, k] with its own)."""
    if len(b) != 3:
        raise MeasurementError(f"grouped matmul: expected experts [E, k, n], got {list(b)}")
    return 2 * math.prod(a) * b[-1]


def _biased_flops(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    bias: Any = None,
    compute_log_sumexp: bool = False,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *_: Any,
    square: bool,
    **__: Any,
) -> int:
    """The same, with the bias and the flag that these kernels take before the dropout."""
    return _flash_flops(q, k, v, dropout_p, is_causal, square=square)

"""Add up what the programs of a split-KV kernel left.

    M = max_s m_s,  out = sum_s 2^(m_s - M) acc_s / sum_s 2^(m_s - M) l_s

A split without keys has m = -inf and l = 0. Moves rows x splits x (H + 2) x 4 bytes in and
rows x H x b out: at 32 splits of an 8B model's 32 heads half a megabyte per sequence, about what
130 tokens of a layer's bf16 cache take, so it is bound by its launch. Many splits are read side by
side: one after another they would wait for memory each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from measure.kernels._compile import CompileCase
from measure.kernels._splits import Partials


def reference(partials: Partials) -> tuple[Tensor, Tensor]:
    """Merged rows [rows, H] in fp32, and log2 of the summed exponentials [rows]."""
    largest = partials.m.amax(dim=1, keepdim=True)
    weights = torch.where(partials.l > 0, torch.exp2(partials.m - largest), 0.0)
    total = (weights * partials.l).sum(dim=1)
    out = (weights.unsqueeze(-1) * partials.acc).sum(dim=1) / total.unsqueeze(-1)
    return out, largest.squeeze(1) + total.log2()


@triton.jit
def _kernel(
    acc_ptr, m_ptr, l_ptr, out_ptr, lse_ptr,
    SPLITS: tl.constexpr, PADDED: tl.constexpr, H: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """One row; grid (rows)."""
    AT_ONCE: tl.constexpr = min(PADDED, 16)
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, H)
    splits = tl.arange(0, PADDED)
    place = row * SPLITS + splits
    top = tl.load(m_ptr + place, mask=splits < SPLITS, other=float("-inf"))
    part = tl.load(l_ptr + place, mask=splits < SPLITS, other=0.0)
    largest = tl.max(top, 0)
    total = tl.sum(tl.where(part > 0, tl.exp2(top - largest), 0.0) * part, 0)
    out = tl.zeros((H,), tl.float32)
    for first in range(0, SPLITS, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        at = row * SPLITS + split
        # An empty split may have left nothing at all behind.
        left = tl.load(l_ptr + at, mask=split < SPLITS, other=0.0) > 0
        weight = tl.exp2(tl.load(m_ptr + at, mask=left, other=float("-inf")) - largest)
        acc = tl.load(acc_ptr + at[:, None] * H + h[None, :], mask=left[:, None], other=0.0)
        out += tl.sum(weight[:, None] * acc, 0)
    tl.store(out_ptr + row * H + h, (out / total).to(out_ptr.dtype.element_ty))
    if LSE:
        tl.store(lse_ptr + row, largest + tl.log2(total))


def merge_splits(partials: Partials, out: Tensor, lse: Tensor | None = None) -> Tensor:
    """Write the merged rows to ``out`` [..., H] (contiguous, any float type); ``lse`` [rows]."""
    rows, splits, size = partials.acc.shape
    _kernel[(rows,)](
        partials.acc, partials.m, partials.l, out, partials.m if lse is None else lse,
        SPLITS=splits, PADDED=triton.next_power_of_2(splits), H=size, LSE=lse is not None,
        num_warps=4,
    )  # fmt: skip
    return out


COMPILE_CASES = (
    CompileCase(
        name="merge of an 8B model's splits, bf16 out",
        kernel=_kernel,
        signature={
            **dict.fromkeys(("acc_ptr", "m_ptr", "l_ptr", "lse_ptr"), "*fp32"),
            "out_ptr": "*bf16",
        },
        constants={"SPLITS": 131, "PADDED": 256, "H": 128, "LSE": False},
    ),
)

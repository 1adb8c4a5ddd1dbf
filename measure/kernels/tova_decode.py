"""A step of TOVA: attend, score what was attended, overwrite the least; three launches.

The first two are ``_scoring``'s, which leave what every token received from its KV head's group. In
the third the token that all heads together attended to least makes room in all of them, unless the
new one received less.

Bytes of a kept token and KV head, D = 128 in 16 bits, G query heads: K and V 4 D = 512; weights
written and read 2 * 2 G; what it received written and read 8: 24 bytes at G = 4, 4.7 % over plain
decode if all of it went to memory; it normally stays in L2. Ceiling: memory bandwidth, as for H2O.
"""

import triton
import triton.language as tl
from torch import Tensor

from measure.kernels._compile import CompileCase, typed
from measure.kernels._scoring import ScoringWorkspace, attend_and_score, attend_reference
from measure.kernels._softmax import replace_token, rows_of
from measure.kernels.h2o_decode import merge_case


@triton.jit
def evict_least_kernel(
    k, v, length, keys, values, received, new_scores, capacity,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token all heads together attended to least makes room in all; grid (batch)."""
    batch = tl.program_id(0).to(tl.int64)
    n = tl.load(length).to(tl.int32)
    inner = tl.arange(0, BLOCK)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    slot = inner
    new = 0.0
    for head in range(HEADS):
        new += tl.load(new_scores + batch * HEADS + head)
    for start in range(0, n, BLOCK):
        tokens = start + inner
        summed = tl.zeros((BLOCK,), tl.float32)
        for head in range(HEADS):
            at = (batch * HEADS + head) * capacity + tokens
            summed += tl.load(received + at, mask=tokens < n, other=float("inf"))
        lighter = summed < least
        least = tl.where(lighter, summed, least)
        slot = tl.where(lighter, tokens, slot)
    lightest = tl.min(least, 0)
    chosen = tl.min(tl.where(least == lightest, slot, 2147483647), 0).to(tl.int64)
    # a new token attended to less than any held one is not kept
    if new >= lightest:
        for head in range(HEADS):
            unit = batch * HEADS + head
            replace_token(k, v, keys, values, unit, chosen, key_batch, key_head, key_token,
                          value_batch, value_head, value_token, HEADS, D, DV)  # fmt: skip


def tova_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    workspace: ScoringWorkspace,
) -> Tensor:
    """One step of TOVA with all slots in use; shapes as for ``h2o_decode``."""
    received = workspace.received.view(*keys.shape[:2], -1)
    out = attend_and_score(q, k, v, keys, values, received, None, length, length, 0, workspace,
                            heavy=False)  # fmt: skip
    evict_least_kernel[(keys.shape[0],)](
        k.contiguous(), v.contiguous(), length, keys, values, received, workspace.new_scores,
        received.stride(1), *rows_of(keys), *rows_of(values),
        HEADS=keys.shape[1], D=keys.shape[-1], DV=values.shape[-1], BLOCK=512, num_warps=4,
    )  # fmt: skip
    return out


def tova_decode_reference(
    q: Tensor, k: Tensor, v: Tensor, *, keys: Tensor, values: Tensor
) -> Tensor:
    """What :func:`tova_decode` does, in fp32 and plain torch, with all slots in use."""
    out, received = attend_reference(q, k, v, keys, values)
    for b, least in enumerate(received.sum(dim=1).argmin(dim=-1).tolist()):
        if least < keys.shape[2]:
            keys[b, :, least], values[b, :, least] = k[b, :, 0], v[b, :, 0]
    return out


_STRIDES = "key_batch key_head key_token value_batch value_head value_token"

COMPILE_CASES = (
    merge_case("merge and scores, TOVA", heavy=False),
    CompileCase(
        name="eviction, TOVA",
        kernel=evict_least_kernel,
        signature=typed(
            {
                "*bf16": "k v keys values",
                "*fp32": "received new_scores",
                "*i64": "length",
                "i32": f"capacity {_STRIDES}",
            }
        ),
        constants={"HEADS": 8, "D": 128, "DV": 128, "BLOCK": 512},
        aligned=tuple(_STRIDES.split()),
    ),
)

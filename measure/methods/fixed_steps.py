"""Attention of a step whose shapes do not change: over all room; the device knows what is held.

An eager step attends exactly the T + 1 tokens it holds, so every step has another shape. A captured
one attends the whole room instead and reads on the device how much of it counts: on a GPU by
FlashAttention's variable-length form, which leaves out what is beyond (the room is a few tokens
more than the prompt), elsewhere by a mask.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from measure.methods.base import AbstractLayerCache
from measure.methods.buffers import GrowingBuffer
from measure.parts import attend

NO_ROOM = "there is no room for further tokens: the storage would grow"
#: Largest head of FlashAttention-2.
_FLASH_HEAD = 256


def has_room(buffer: GrowingBuffer) -> bool:
    """Whether another entry can be added in place."""
    return buffer.capacity > buffer.length


def still_grows(n_tokens: int, budget: int) -> str:
    """Say that a cache of a fixed budget is not full yet; "" where it is."""
    if n_tokens >= budget:
        return ""
    return f"the cache holds {n_tokens} of at most {budget} tokens: it still grows"


def add_token(
    cache: AbstractLayerCache,
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    buffers: tuple[GrowingBuffer, GrowingBuffer],
) -> Tensor:
    """Append one token and attend it to all held ones and itself; the twin counts it."""
    n = cache.now()
    for buffer, x in zip(buffers, kv, strict=True):
        buffer.put(n, x)
        buffer.length += 1
    return attend_held(cache, q, buffers[0].whole, buffers[1].whole, n + 1)


def attend_held(
    cache: AbstractLayerCache,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    n_held: Tensor,
    *,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query [B, N, 1, H] over the first ``n_held`` [1] entries of [B, K, room, H].

    cap, sinks  as of ``measure.parts.attend``; sinks [N]
    """
    plain = cap is None and sinks is None
    if plain and _flash_fits(q, values) and (varlen := _variable_length()) is not None:
        return _by_lengths(varlen, q, keys, values, n_held)
    seen = torch.arange(keys.shape[2], device=keys.device) < n_held
    per_query = None if sinks is None else sinks.view(cache.mixer.n_kv_heads, -1)
    return cache.unfold(
        attend(cache.fold(q), keys, values, mask=seen[None], cap=cap, sinks=per_query)
    )


def _flash_fits(q: Tensor, values: Tensor) -> bool:
    size = q.shape[-1]
    return (
        q.device.type == "cuda"
        and q.itemsize == 2
        and size == values.shape[-1]
        and size <= _FLASH_HEAD
        and size % 8 == 0
    )


def _variable_length() -> Callable[..., Any] | None:
    """PyTorch's variable-length attention, where this version has it with ``seqused_k``."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    code = getattr(varlen_attn, "__code__", None)
    return varlen_attn if code is None or "seqused_k" in code.co_varnames else None


def _by_lengths(
    varlen: Callable[..., Any], q: Tensor, keys: Tensor, values: Tensor, n_held: Tensor
) -> Tensor:
    """Sequence b of the packed form starts at row b K room: rows are tokens, and heads lie a room
    apart, so that [B, K, room, H] is read where it is.
    """
    batch, n_kv, room, size = keys.shape
    rows = (batch - 1) * n_kv * room + room

    def packed(x: Tensor) -> Tensor:
        return x.as_strided((rows, n_kv, size), (size, room * size, 1), x.storage_offset())

    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out: Tensor = varlen(
        q[:, :, 0],
        packed(keys),
        packed(values),
        starts,
        starts * (n_kv * room),
        1,
        room,
        enable_gqa=True,
        seqused_k=n_held.to(torch.int32).expand(batch).contiguous(),
    )
    return out.unsqueeze(2)

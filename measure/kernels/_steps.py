"""A decode step of a twin by kernels: attend, then quantise and append, nothing read by the host.

    lengths (device) -> attention over what the cache holds and the new token -> merge
                     -> append, which advances the lengths

The host keeps its own count for the twin's buffers. A captured step can be replayed: it reads and
advances the lengths on the device; ``restore`` of the twin puts both counts back.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from costmodel.mixers import Attention
from measure.flops import count_launch
from measure.kernels._splits import Partials, sm_count, split_count

if TYPE_CHECKING:
    from measure.methods.base import AbstractLayerCache
    from measure.methods.buffers import GrowingBuffer
    from measure.methods.full import FullCache
    from measure.methods.kivi import KiviCache
    from measure.methods.token_packed import TokenPackedCache

#: Head sizes and most query heads of a KV head that the decode kernels are built for.
HEAD_SIZES, MAX_GROUP = (64, 128, 256), 16
#: Smallest group of packed elements that a scale may have: a word's codes belong to one group.
LEAST_GROUP = 16
#: Programs of one warp that an SM holds: its registers, 8 KIVI programs of 255 each.
_BLOCKS_PER_SM = 8


class StepState:
    """Beside the cache: tokens cached per sequence, arrivals, and room for partial results."""

    def __init__(self, cache: "AbstractLayerCache", extra: int, capacity: int, block: int) -> None:
        mixer, device = cache.mixer, cache.device
        units = cache.batch * mixer.n_kv_heads
        splits = split_count(units, capacity, block, sm_count(device), blocks_per_sm=_BLOCKS_PER_SM)
        rows = cache.batch * mixer.n_heads
        self.capacity = capacity
        self.partials = Partials.empty(rows, splits + extra, mixer.head_dim, device)
        self.lengths = torch.zeros(cache.batch, dtype=torch.int64, device=device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self._host_tokens = 0

    def set(self, n_tokens: int) -> None:
        """Have the device hold the host's count."""
        if n_tokens != self._host_tokens:
            self.lengths.fill_(n_tokens)
            self._host_tokens = n_tokens

    def reset(self, n_tokens: int) -> None:
        """The same, whatever replayed graphs made of the count."""
        self.lengths.fill_(n_tokens)
        self._host_tokens = n_tokens

    def advanced(self) -> None:
        """Follow what the append did on the device."""
        self._host_tokens += 1


def fits(mixer: Attention) -> bool:
    """Whether the decode kernels are built for this attention: its heads, and no window."""
    return (
        mixer.head_dim in HEAD_SIZES
        and mixer.v_head_dim == mixer.head_dim
        and mixer.n_heads // mixer.n_kv_heads <= MAX_GROUP
        and mixer.max_kv_tokens() is None
    )


def sizes_fit(*sizes: int) -> bool:
    """Whether tiles hold blocks and groups of these sizes: powers of two that are not too small."""
    return all(n >= LEAST_GROUP and not n & (n - 1) for n in sizes)


def room(buffer: "GrowingBuffer") -> Tensor:
    """All entries of a buffer, in use or not."""
    return buffer.entries(0, buffer.capacity)


def count_attention(cache: "AbstractLayerCache", attended: int) -> None:
    """Count scores and weighted sum of one new token over ``attended`` tokens."""
    mixer = cache.mixer
    width = mixer.head_dim + mixer.v_head_dim
    count_launch(2 * cache.batch * mixer.n_heads * attended * width)


def kivi_step(cache: "KiviCache", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One step of a KIVI cache."""
    from measure.kernels.kivi_decode import EXTRA_PARTS, kivi_decode
    from measure.kernels.quantise_append import kivi_append

    n, r = cache.n_tokens, cache.residual
    after = n + 1
    lacks = (
        cache.keys.words.capacity < after // r
        or cache.values.words.capacity < after - r
        or cache.recent_keys.capacity < min(after, r)
    )
    if lacks:
        cache.reserve(after)
    held = cache.keys.words.capacity * r + r
    state = _state(cache, EXTRA_PARTS, held, r)
    ring_start = (n - cache.oldest) % r if n >= r else 0
    new = q.contiguous(), k.contiguous(), v.contiguous()
    keys = room(cache.keys.words), room(cache.keys.scales), room(cache.keys.zeros)
    values = room(cache.values.words), room(cache.values.scales), room(cache.values.zeros)
    recent = room(cache.recent_keys), room(cache.recent_values)
    form = {
        "bits": cache.bits,
        "group": cache.group,
        "residual": r,
        "ring_start": ring_start,
    }
    out = kivi_decode(*new, keys, values, *recent, state.lengths, state.partials, **form)
    count_attention(cache, after)
    kivi_append(*new[1:], keys, values, *recent, state.lengths, state.arrived, **form)
    state.advanced()
    cache.now_holds(after)
    return out


def token_step(
    cache: "TokenPackedCache | FullCache",
    new: tuple[Tensor, Tensor, Tensor],
    buffers: tuple[tuple["GrowingBuffer", ...], tuple["GrowingBuffer", ...]],
    scales: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = ((), ()),
    *,
    bits: int,
    group: int = 0,
) -> Tensor:
    """One step of a cache whose entries are tokens; ``new`` is q, k, v."""
    from measure.kernels.quantise_append import token_append
    from measure.kernels.token_decode import BLOCK_TOKENS, EXTRA_PARTS, token_decode

    after = cache.n_tokens + 1
    if buffers[0][0].capacity < after:
        cache.reserve(after)
    state = _state(cache, EXTRA_PARTS, buffers[0][0].capacity, BLOCK_TOKENS[bits])
    q, k, v = (x.contiguous() for x in new)
    keys, values = (
        (*map(room, parts), *extra) for parts, extra in zip(buffers, scales, strict=True)
    )
    counts = state.lengths, state.partials
    out = token_decode(q, k, v, keys, values, *counts, bits=bits, group=group)
    count_attention(cache, after)
    token_append(k, v, keys, values, state.lengths, state.arrived, bits=bits, group=group)
    state.advanced()
    for buffer in (*buffers[0], *buffers[1]):
        buffer.length = after
    cache.n_tokens = after
    return out


def _state(cache: Any, extra: int, capacity: int, block: int) -> StepState:
    """The cache's state, made when the first step is run or its room has changed."""
    state: StepState | None = cache.step_state
    if state is None or state.capacity != capacity:
        state = cache.step_state = StepState(cache, extra, capacity, block)
    state.set(cache.n_tokens)
    return state

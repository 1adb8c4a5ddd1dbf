"""Decode steps of the twins that drop or choose tokens, by kernels; nothing is read by the host.

The host keeps the twin's counts; the kernels read theirs on the device and advance it there, so a
captured step can be replayed. ``forget`` (after a restore) has the host's count written again.
"""

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from costmodel.mixers import Attention
from measure.kernels._splits import Partials, sm_count, split_count

if TYPE_CHECKING:
    from measure.methods.buffers import GrowingBuffer
    from measure.methods.h2o import H2OCache
    from measure.methods.quest import QuestCache
    from measure.methods.streaming_llm import StreamingCache
    from measure.methods.tova import TovaCache

#: Workspaces whose size grows with the cache: one for all layers, as long as one of them lives.
_shared: "WeakValueDictionary[tuple[Any, ...], Any]" = WeakValueDictionary()


class StepRoom:
    """Count of tokens on the device, and room for what the launches of a step leave each other."""

    def __init__(self, cache: Any, capacity: int, block: int) -> None:
        mixer, device = cache.mixer, cache.device
        units, rows = cache.batch * mixer.n_kv_heads, cache.batch * mixer.n_heads
        self.splits = split_count(units, capacity, block, sm_count(device))
        self.partials = Partials.empty(rows, self.splits, mixer.v_head_dim, device)
        self.n_tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self.length = torch.full((1,), capacity, dtype=torch.int64, device=device)
        self.capacity = capacity
        self.scoring: Any = None
        self.rope: Any = None
        self._host_tokens: int | None = 0

    def set(self, n_tokens: int) -> None:
        """Have the device hold the host's count."""
        if n_tokens != self._host_tokens:
            self.n_tokens.fill_(n_tokens)
            self._host_tokens = n_tokens

    def advance(self) -> None:
        """One token more, on the device and here."""
        self.n_tokens.add_(1)
        assert self._host_tokens is not None
        self._host_tokens += 1

    def forget(self) -> None:
        """The device's count may be anything: a captured step was replayed."""
        self._host_tokens = None


def heads_fit(mixer: Attention) -> bool:
    """Whether the kernels are built for heads of these sizes."""
    from measure.kernels._tiles import sizes_fit

    return sizes_fit(mixer.head_dim, mixer.v_head_dim)


def _room(cache: Any, capacity: int) -> StepRoom:
    from measure.kernels._softmax import tile_tokens

    room: StepRoom | None = cache.step_room
    if room is None or room.capacity != capacity:
        block = tile_tokens(max(cache.mixer.head_dim, cache.mixer.v_head_dim))
        room = cache.step_room = StepRoom(cache, capacity, block)
    return room


def _scoring(cache: Any, room: StepRoom) -> Any:
    from measure.kernels._scoring import ScoringWorkspace

    if room.scoring is None:
        keys, values = cache.keys.entries(), cache.values.entries()
        group = cache.mixer.n_heads // cache.mixer.n_kv_heads
        key = (keys.shape, values.shape, keys.dtype, keys.device, group, room.splits)
        room.scoring = _shared.get(key)
        if room.scoring is None:
            room.scoring = ScoringWorkspace.make(keys, values, group, room.splits)
            _shared[key] = room.scoring
    return room.scoring


def h2o_step(cache: "H2OCache", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One step with all slots in use: attend, score, overwrite the lightest."""
    from measure.kernels.h2o_decode import h2o_decode

    room = _room(cache, cache.keys.length)
    room.set(cache.n_tokens)
    out = h2o_decode(
        q, k, v,
        keys=cache.keys.entries(), values=cache.values.entries(), scores=cache.scores.entries(),
        positions=cache.positions.entries(), length=room.length, n_tokens=room.n_tokens,
        recent=cache.recent, workspace=_scoring(cache, room),
    )  # fmt: skip
    room.advance()
    cache.n_tokens += 1
    return out


def tova_step(cache: "TovaCache", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One step with all slots in use, which needs no count: the twin keeps it."""
    from measure.kernels.tova_decode import tova_decode

    room = _room(cache, cache.keys.length)
    return tova_decode(
        q, k, v, keys=cache.keys.entries(), values=cache.values.entries(), length=room.length,
        workspace=_scoring(cache, room),
    )  # fmt: skip


def ring_step(cache: "StreamingCache", q: Tensor, k: Tensor, v: Tensor, oldest: int) -> Tensor:
    """One step with a full ring whose entry ``oldest`` leaves; counts stay with the twin."""
    from measure.kernels.ring_decode import RingRope, ring_decode

    room = _room(cache, cache.keys.length)
    room.set(cache.n_tokens)
    if room.rope is None:
        room.rope = RingRope.make(cache.rope, cache.mixer.head_dim, cache.device)
    out = ring_decode(
        q, k, v, keys=cache.keys.entries(), values=cache.values.entries(),
        n_tokens=room.n_tokens, sinks=cache.sinks, window=cache.window,
        ring_start=cache.n_tokens - oldest, rope=room.rope, partials=room.partials,
        hide_oldest=cache.method.positions == "fixed",
    )  # fmt: skip
    room.advance()
    return out


def quest_step(cache: "QuestCache", q: Tensor, k: Tensor, v: Tensor, n_chosen: int) -> Tensor:
    """One step that chooses pages; appends and counts."""
    from measure.kernels.quest_decode import PageCache, quest_decode

    after = cache.n_tokens + 1
    n_pages = -(-after // cache.page)
    for buffer, n in ((cache.keys, after), (cache.values, after), (cache.low, n_pages),
                      (cache.high, n_pages)):  # fmt: skip
        if buffer.capacity < n:
            buffer.reserve(n)
    room = _room(cache, cache.keys.capacity)
    room.set(cache.n_tokens)
    pages = PageCache(
        keys=_all(cache.keys), values=_all(cache.values), low=_all(cache.low),
        high=_all(cache.high), page_tokens=cache.page,
    )  # fmt: skip
    out = quest_decode(
        q, k, v, cache=pages, n_tokens=room.n_tokens, n_chosen=n_chosen, partials=room.partials
    )
    room.advance()
    cache.keys.length = cache.values.length = cache.n_tokens = after
    cache.low.length = cache.high.length = n_pages
    return out


def _all(buffer: "GrowingBuffer") -> Tensor:
    return buffer.entries(0, buffer.capacity)

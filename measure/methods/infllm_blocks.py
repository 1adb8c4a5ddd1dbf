"""InfLLM's blocks: on the host, in a cache on the device, and in the buffer that is attended.

    representatives (device) -> scores, top-k (device) -> ids, 8 bytes each -> host
    host: least recently used places -> missing blocks, on a stream of their own -> block cache
    block cache -> attention buffer, by places (device)

One thing waits: the host, for the ids of the chosen blocks, because it owns the blocks that may be
missing and starts their copies. It waits behind everything else of the step that was asked for by
then, so the GPU has work meanwhile; where the blocks in the buffer are chosen again, which is usual
from one step to the next, nothing else happens, and where all chosen ones are in the block cache
nothing crosses the link but their places. A layer's next ids are asked for only after these were
read, and the places' upload is behind them on the same stream: one pinned buffer of each is enough.
That the host decides is why no such step is captured as a graph.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from costmodel.methods.infllm import InfLLM
from measure.methods.buffers import GrowingBuffer
from measure.methods.host_copies import start_copies
from measure.methods.kept_tokens import gather_tokens

#: Representatives there is room for at first; the room doubles.
FIRST_ROOM = 16


class Lookup(NamedTuple):
    """Blocks chosen [B, k], ascending; on the host once ``event`` has come (None: already)."""

    ids: Tensor
    event: Any = None


class Places(NamedTuple):
    """Where blocks are: by sequence the place of each, least recently used first, and what the
    attention buffer holds.
    """

    of: list[dict[int, int]]
    loaded: list[list[int]] | None

    def copy(self) -> "Places":
        """For a snapshot."""
        return Places([dict(x) for x in self.of], self.loaded)


class BlockStore:
    """The blocks of one layer.

    host             K and V, one entry a block, so that a block is one piece of memory
    representatives  [B, N, blocks, H]; cached, buffer  K and V [B, K, tokens, H]
    """

    def __init__(
        self,
        method: InfLLM,
        heads: tuple[int, int],
        sizes: tuple[int, int],
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``heads`` are those of queries and of keys, ``sizes`` of keys and of values."""
        self.method, self.batch, self.device = method, batch, device
        self.block = method.block_tokens
        self.n_kv_heads = heads[1]
        self._on_gpu = device.type == "cuda"
        self.buffer, self.cached = (
            tuple(GrowingBuffer(batch, heads[1], (size,), dtype, device) for size in sizes)
            for _ in range(2)
        )
        self.host = tuple(
            GrowingBuffer(
                *(batch, 1, (heads[1], self.block, size), dtype, torch.device("cpu")),
                pinned=self._on_gpu,
            )
            for size in sizes
        )
        self.representatives = GrowingBuffer(batch, heads[0], (sizes[0],), dtype, device)
        self._ids = self._places_up = torch.empty(0, dtype=torch.int64)
        self.set_budget(0, 0)
        self.forget()

    def buffers(self) -> Iterator[GrowingBuffer]:
        """What is on the device."""
        yield from (*self.buffer, *self.cached, self.representatives)

    def set_budget(self, topk: int, n_cached: int) -> None:
        """Blocks that are looked up, and that the device keeps."""
        self.topk, self.n_cached = topk, n_cached

    def forget(self) -> None:
        """There are no blocks; the room stays."""
        self.n_blocks = 0
        self.places = Places([{} for _ in range(self.batch)], None)
        for buffer in self.host:
            buffer.clear()

    def make_room(self, buffer_tokens: int) -> None:
        """Buffer, block cache and representatives have their full size from now on."""
        for pair, size in ((self.buffer, buffer_tokens), (self.cached, self.n_cached * self.block)):
            for buffer in pair:
                buffer.extend_to(size)
        self.representatives.extend_to(FIRST_ROOM)

    # Blocks come -----------------------------------------------------------------------------

    def send(self, k: Tensor, v: Tensor, scores: Tensor) -> None:
        """Cut K and V [B, K, n p, H] into blocks on the host; scores [B, N, n p] of the keys choose
        what represents them.
        """
        for host, x in zip(self.host, (k, v), strict=True):
            self._to_host(host, x.unflatten(2, (-1, self.block)).transpose(1, 2).unsqueeze(1))
        for start in range(0, k.shape[2], self.block):
            part = slice(start, start + self.block)
            self._represent(k[:, :, part], scores[:, :, part])

    def _to_host(self, host: GrowingBuffer, blocks: Tensor) -> None:
        """Append blocks [B, 1, n, K, p, H]: into pinned room a piece for every sequence, and nobody
        waits; a step that fetches them is behind their copy (``start_copies``).
        """
        n = host.length + blocks.shape[2]
        if not self._on_gpu or n > host.capacity:
            if self._on_gpu:
                torch.cuda.synchronize(self.device)  # what grows is copied by the host
            host.append(blocks)
            return
        start, host.length = host.length, n
        for target, block in zip(host.entries(start, n), blocks.contiguous(), strict=True):
            target.copy_(block, non_blocking=True)

    def _represent(self, k: Tensor, scores: Tensor) -> None:
        """Add the representative of a block of keys [B, K, p, H] with scores [B, N, p]."""
        n_best = min(self.method.repr_topk, k.shape[2])
        best = scores.topk(n_best, dim=-1).indices.unflatten(1, (k.shape[1], -1)).flatten(2)
        keys = gather_tokens(k, best).unflatten(2, (-1, n_best))  # [B, K, G, n, H]
        mean = keys.mean(dim=3).flatten(1, 2).unsqueeze(2)
        if self.n_blocks == self.representatives.length:
            self.representatives.extend_to(2 * self.n_blocks)
        self.representatives.write(self.n_blocks, mean)
        self.n_blocks += 1

    # Blocks are looked up --------------------------------------------------------------------

    def look_up(self, q: Tensor) -> Lookup:
        """Top-k blocks of every sequence by the mean of its queries [B, N, n, H] over all heads;
        the host does not wait for them here.
        """
        if self.n_blocks <= self.topk:
            return Lookup(torch.arange(self.n_blocks).expand(self.batch, -1))
        mean = q.mean(dim=2).flatten(1).unsqueeze(1)  # [B, 1, N H]
        held = self.representatives.entries(0, self.n_blocks).transpose(1, 2).flatten(2)
        scores = torch.matmul(mean, held.transpose(1, 2)).squeeze(1)
        chosen = scores.topk(self.topk, dim=-1).indices.sort(dim=-1).values
        if not self._on_gpu:
            return Lookup(chosen)
        if self._ids.shape != chosen.shape:
            self._ids, self._places_up = (
                torch.empty(chosen.shape, dtype=torch.int64, pin_memory=True) for _ in range(2)
            )
        self._ids.copy_(chosen, non_blocking=True)
        return Lookup(self._ids, torch.cuda.current_stream(self.device).record_event())

    def arrived(self, found: Lookup, start: int) -> tuple[Tensor, Tensor]:
        """K and V of the blocks that were looked up, in the attention buffer from ``start`` on."""
        if found.event is not None:
            found.event.synchronize()
        chosen: list[list[int]] = found.ids.tolist()
        if chosen != self.places.loaded:
            self.bring(chosen, after=found.event)
            self.gather(chosen, start)
        n = len(chosen[0]) * self.block
        return self.buffer[0].entries(start, start + n), self.buffer[1].entries(start, start + n)

    def bring(self, chosen: Sequence[Sequence[int]], after: Any = None) -> None:
        """Have ``chosen`` blocks of every sequence in the block cache; the current stream waits for
        those that were missing, the host does not. Their copies begin ``after`` that event, beside
        what was asked for since.
        """
        p = self.block
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for b, wanted in enumerate(chosen):
            places = self.places.of[b]
            missing = [x for x in wanted if x not in places]
            for block in wanted:
                if block in places:
                    places[block] = places.pop(block)  # now the most recently used
            for block in missing:
                place = len(places)
                if place == self.n_cached:
                    place = places.pop(next(iter(places)))
                places[block] = place
                for cache, host in zip(self.cached, self.host, strict=True):
                    targets.append(cache.entries(place * p, place * p + p)[b])
                    sources.append(host.entries(block, block + 1)[b, 0, 0])
        if targets:
            start_copies(targets, sources, after)()

    def gather(self, chosen: list[list[int]], start: int) -> None:
        """From the block cache into the buffer."""
        p = self.block
        at = self._on_device([[self.places.of[b][x] for x in row] for b, row in enumerate(chosen)])
        index = (at.unsqueeze(-1) * p + torch.arange(p, device=self.device)).flatten(1)
        index = index.unsqueeze(1).expand(-1, self.n_kv_heads, -1)
        for buffer, cache in zip(self.buffer, self.cached, strict=True):
            target = buffer.entries(start, start + index.shape[-1])
            target.copy_(gather_tokens(cache.entries(), index))
        self.places = self.places._replace(loaded=chosen)

    def _on_device(self, places: list[list[int]]) -> Tensor:
        """Places [B, k] on the device, where they are asked for and not before."""
        at = torch.tensor(places, dtype=torch.int64).view(self.batch, -1)
        if not self._on_gpu or self._places_up.shape != at.shape:
            return at.to(self.device)
        self._places_up.copy_(at)
        return self._places_up.to(self.device, non_blocking=True)


def room_for(n_blocks: int) -> int:
    """Representatives there is room for with ``n_blocks``."""
    room = FIRST_ROOM
    while room < n_blocks:
        room *= 2
    return room

"""InfLLM run for real: a window, first tokens and the remainder on the device, blocks on the host.

As long as first tokens, window and top-k blocks hold the cache a layer is plain attention. Beyond,
the last W tokens lie in a ring, turned to their positions; everything older is attended at one
fixed distance, so it is kept unturned: the first I tokens, the remainder (which overlaps the
window), and blocks of p tokens that went to the host. A block is represented, for every query head,
by the mean of its keys with the largest local scores. A chunk of queries (one token in a step)
looks up its top-k blocks by its mean query, all heads together; they pass through a cache of blocks
on the device (the least recently used leaves) into the attention buffer. Scores of window, first
tokens, blocks and remainder share one softmax (thunlp/InfLLM merges them with running maxima, and
computes local scores a second time). A step starts the copies of its missing blocks, whole pieces
of pinned memory on a stream of their own, and waits for them behind the scores of everything else.
Where a cache leaves plain attention during decoding no scores are known yet: keys of its blocks are
averaged as they come.

``reference`` is ``infllm_published``; its window holds keys unturned.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from costmodel.methods.base import AbstractMethod
from costmodel.methods.infllm import InfLLM
from measure.methods.base import AbstractLayerCache, Realisation
from measure.methods.buffers import GrowingBuffer
from measure.methods.host_copies import Wait, start_copies
from measure.methods.infllm_published import published_prompt, published_step
from measure.methods.kept_tokens import attend_all, gather_tokens
from measure.parts import QUERY_BLOCK

#: Representatives there is room for at first; the room doubles.
_FIRST_ROOM = 16


class _Coming(NamedTuple):
    """Blocks chosen for each sequence, and the wait for what is copied; None: nothing changed."""

    chosen: list[list[int]]
    wait: Wait | None


class _Snapshot(NamedTuple):
    n_tokens: int
    n_blocks: int
    entries: list[Tensor]
    places: list[dict[int, int]]
    loaded: list[list[int]] | None


@final
class InfLLMCache(AbstractLayerCache):
    """One layer's window, first tokens, remainder, representatives, block cache and host blocks."""

    NAME: ClassVar[str] = "infllm"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "the authors' torch attention in two stages: window rotated anew in fp32, first tokens and "
        "remainder copied into the attention buffer, scores of a chunk in memory. Views of "
        "concatenated tensors are trimmed to what is used"
    )
    ROTATES = True

    def _build(self, method: AbstractMethod) -> None:
        assert isinstance(method, InfLLM)
        self.method = method
        m = self.mixer

        def pair(device: torch.device) -> tuple[GrowingBuffer, GrowingBuffer]:
            k, v = (
                GrowingBuffer(self.batch, m.n_kv_heads, (size,), self.dtype, device)
                for size in (m.head_dim, m.v_head_dim)
            )
            return k, v

        self.window, self.first, self.rest, self.buffer, self.cached = (
            pair(self.device) for _ in range(5)
        )
        #: one entry a block, so that it is one piece of memory
        self.host = tuple(
            GrowingBuffer(
                *(self.batch, 1, (m.n_kv_heads, method.block_tokens, size), self.dtype),
                torch.device("cpu"),
                pinned=self.device.type == "cuda",
            )
            for size in (m.head_dim, m.v_head_dim)
        )
        per_head = (self.batch, m.n_heads)
        self.representatives = GrowingBuffer(*per_head, (m.head_dim,), self.dtype, self.device)
        self.scores = GrowingBuffer(*per_head, (), self.dtype, self.device)
        self._reserved = False
        self._set_budget(0)
        self._forget()

    def _buffers(self) -> Iterator[GrowingBuffer]:
        for pair in (self.window, self.first, self.rest, self.buffer, self.cached):
            yield from pair
        yield from (self.representatives, self.scores)

    def _forget(self) -> None:
        self.n_blocks = 0
        #: per sequence: block -> place in the block cache, least recently used first
        self._places: list[dict[int, int]] = [{} for _ in range(self.batch)]
        self._loaded: list[list[int]] | None = None  # blocks in the attention buffer

    def _set_budget(self, n_prompt: int) -> None:
        budget = self.method.budget(float(n_prompt))
        self.init, self.local = int(budget.init), int(budget.local)
        self.topk, self.n_cached = int(budget.topk), int(budget.cached)
        self.block, self.chunk = self.method.block_tokens, self.method.chunk_tokens

    @property
    def _plain_tokens(self) -> int:
        """Most tokens that are held and attended plainly."""
        return self.init + self.local + self.topk * self.block

    def _blocks_of(self, n_tokens: int) -> int:
        return max(0, (n_tokens - self.init - self.local) // self.block)

    def reserve(self, n_tokens: int) -> None:
        """Room for a sequence of ``n_tokens``, plain or not."""
        self._reserved = True
        self._set_budget(n_tokens)
        plain = n_tokens <= self._plain_tokens
        n_blocks = 0 if plain else self._blocks_of(n_tokens)
        rooms = {
            # the token too many is added before the rest are dealt out
            self.window: n_tokens if plain else self._plain_tokens + 1,
            self.first: 0 if plain else self.init,
            self.rest: 0 if plain else self.local + self.block,
            self.buffer: 0 if plain else self._buffer_tokens,
            self.cached: 0 if plain else self.n_cached * self.block,
            self.host: n_blocks,
        }
        for pair, room in rooms.items():
            for buffer in pair:
                buffer.reserve(room)
        self.representatives.reserve(0 if plain else _room(n_blocks))
        self.scores.reserve(0 if plain else self.local + self.block)

    @property
    def _buffer_tokens(self) -> int:
        return self.topk * self.block + self.chunk + self.block + self.init

    @property
    def host_bytes(self) -> int:
        """Bytes of the blocks on the host."""
        return sum(x.held_bytes for x in self.host)

    def clear(self) -> None:
        """Empty everything."""
        super().clear()
        for buffer in self.host:
            buffer.clear()
        self._forget()

    # Prompt ----------------------------------------------------------------------------------

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend chunk after chunk, sending blocks to the host in between."""
        self._set_budget(k.shape[2])
        if k.shape[2] <= self._plain_tokens:
            out = self.attend_prompt(q, k, v)
            self.store(k, v)
            return out
        return published_prompt(self, q, k, v) if self.is_reference else self._prompt(q, k, v)

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep a prompt without queries: no key has local scores."""
        self._set_budget(k.shape[2])
        turned = k
        if not self.is_reference:
            turned = self.turned(k, torch.arange(k.shape[2], device=k.device))
        if k.shape[2] <= self._plain_tokens:
            self.window[0].append(turned)
            self.window[1].append(v)
            self.n_tokens = k.shape[2]
            return
        received = torch.zeros(
            self.batch, self.mixer.n_heads, k.shape[2], dtype=self.dtype, device=k.device
        )
        self.take_full_size()
        self.send_blocks(k, v, received, k.shape[2])
        self.settle(turned, k, v, received)

    def take_full_size(self) -> None:
        """Block cache, attention buffer and representatives have their full size from now on."""
        for pair, size in (
            (self.buffer, self._buffer_tokens),
            (self.cached, self.n_cached * self.block),
        ):
            for buffer in pair:
                buffer.extend_to(size)
        self.representatives.extend_to(_FIRST_ROOM)

    def _prompt(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = k.shape[2]
        positions = torch.arange(s, device=k.device)
        turned = self.turned(k, positions)
        near = self.turned(q, positions)
        far = self._at_fixed_distance(q)
        received = torch.zeros(self.batch, self.mixer.n_heads, s, device=k.device)
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        self.take_full_size()
        for start in range(0, s, self.chunk):
            stop = min(s, start + self.chunk)
            blocks = self.fetched(far[:, :, start:stop])
            for low in range(start, stop, QUERY_BLOCK):
                high = min(stop, low + QUERY_BLOCK)
                out[:, :, low:high] = self._attend_block(
                    near, far, (turned, k, v), blocks, received, low, high
                )
            self.send_blocks(k, v, received, stop)
        self.settle(turned, k, v, received.to(self.dtype))
        return out

    def _attend_block(
        self,
        near: Tensor,
        far: Tensor,
        kv: tuple[Tensor, Tensor, Tensor],
        blocks: tuple[Tensor, Tensor],
        received: Tensor,
        low: int,
        high: int,
    ) -> Tensor:
        """Queries ``low`` to ``high``; adds what the window's keys received."""
        turned, k, v = kv
        left = max(0, low - self.local + 1)
        outside = max(0, high - self.local)  # tokens that some of the queries see from afar
        first, rest = min(self.init, outside), self.init + self.n_blocks * self.block
        rest_end = max(rest, outside)
        rows = torch.arange(low, high, device=k.device)[:, None]
        window = torch.arange(left, high, device=k.device)
        away = torch.cat(
            [torch.arange(*x, device=k.device) for x in ((0, first), (rest, rest_end))]
        )
        n_blocks = blocks[0].shape[2]
        keys = [k[:, :, :first], k[:, :, rest:rest_end], blocks[0]]
        scores = torch.cat(
            [
                self._scores(near[:, :, low:high], turned[:, :, left:high]),
                *(self._scores(far[:, :, low:high], x) for x in keys),
            ],
            dim=-1,
        )
        seen = torch.cat(
            (
                (window <= rows) & (window > rows - self.local),
                away <= rows - self.local,
                torch.ones(high - low, n_blocks, dtype=torch.bool, device=k.device),
            ),
            dim=-1,
        )
        weights = scores.masked_fill_(~seen, -torch.inf).softmax(dim=-1, dtype=torch.float32)
        n_window = high - left
        received[..., left:high] += weights[..., :n_window].sum(dim=3).flatten(1, 2)
        used = weights.to(v.dtype).flatten(2, 3)
        values = (v[:, :, left:high], v[:, :, :first], v[:, :, rest:rest_end], blocks[1])
        parts = used.split([x.shape[2] for x in values], dim=-1)
        out = sum(torch.matmul(part, x) for part, x in zip(parts, values, strict=True))
        assert isinstance(out, Tensor)
        return out.reshape(self.batch, self.mixer.n_heads, high - low, -1)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled scores [B, K, G, queries, keys] of q [B, N, queries, H] over k [B, K, keys, H]."""
        n = q.shape[2]
        queries = (q * q.shape[-1] ** -0.5).reshape(self.batch, k.shape[1], -1, q.shape[-1])
        return torch.matmul(queries, k.transpose(-1, -2)).unflatten(2, (-1, n))

    def _at_fixed_distance(self, q: Tensor) -> Tensor:
        return self.turned(q, torch.tensor([self.local], device=q.device))

    def send_blocks(self, k: Tensor, v: Tensor, received: Tensor, n_seen: int) -> None:
        """Cut what is too far behind ``n_seen`` tokens of a prompt into blocks on the host."""
        n_blocks = self._blocks_of(n_seen)
        first = self.init + self.n_blocks * self.block
        last = self.init + n_blocks * self.block
        if last == first:
            return
        for buffer, x in zip(self.host, (k, v), strict=True):
            buffer.append(self._as_blocks(x[:, :, first:last]))
        for start in range(first, last, self.block):
            part = slice(start, start + self.block)
            self._represent(k[:, :, part], received[:, :, part])

    def _as_blocks(self, x: Tensor) -> Tensor:
        """[B, K, n p, H] -> n blocks [B, 1, n, K, p, H]."""
        return x.unflatten(2, (-1, self.block)).transpose(1, 2).unsqueeze(1)

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

    def settle(self, turned: Tensor, k: Tensor, v: Tensor, received: Tensor) -> None:
        """Keep window, first tokens and remainder of a prompt whose blocks are on the host."""
        self.n_tokens = s = k.shape[2]
        rest = self.init + self.n_blocks * self.block
        for buffer, x in zip(self.window, (turned, v), strict=True):
            buffer.append(x[:, :, s - self.local :].roll(s % self.local, dims=2))
        for pair, part in ((self.first, slice(0, self.init)), (self.rest, slice(rest, s))):
            pair[0].append(k[:, :, part])
            pair[1].append(v[:, :, part])
        self.scores.append(received[:, :, rest:])

    # Lookup ----------------------------------------------------------------------------------

    def fetched(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of the blocks for queries [B, N, n, H], in the attention buffer."""
        return self._arrived(self._on_their_way(q))

    def _on_their_way(self, q: Tensor) -> _Coming:
        """Choose the blocks for queries [B, N, n, H], and start to copy those that are missing."""
        if self.n_blocks <= self.topk:
            chosen = [list(range(self.n_blocks)) for _ in range(self.batch)]
        else:
            chosen = self.chosen_blocks(q)
        return _Coming(chosen, None if chosen == self._loaded else self._load(chosen))

    def _arrived(self, coming: _Coming) -> tuple[Tensor, Tensor]:
        """Wait for blocks, put them into the attention buffer; their K and V there."""
        if coming.wait is not None:
            coming.wait()
            self._gather(coming.chosen)
        start, n = self.init, len(coming.chosen[0]) * self.block
        return self.buffer[0].entries(start, start + n), self.buffer[1].entries(start, start + n)

    def chosen_blocks(self, q: Tensor) -> list[list[int]]:
        """Top-k blocks of every sequence by its mean query over all heads."""
        mean = q.mean(dim=2).flatten(1).unsqueeze(1)  # [B, 1, N H]
        held = self.representatives.entries(0, self.n_blocks).transpose(1, 2).flatten(2)
        scores = torch.matmul(mean, held.transpose(1, 2)).squeeze(1)
        indices: list[list[int]] = scores.topk(self.topk, dim=-1).indices.tolist()
        return [sorted(row) for row in indices]

    def _load(self, chosen: list[list[int]]) -> Wait:
        """Start to bring ``chosen`` blocks into the block cache."""
        p = self.block
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for b, wanted in enumerate(chosen):
            places = self._places[b]
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
        return start_copies(targets, sources) if targets else lambda: None

    def _gather(self, chosen: list[list[int]]) -> None:
        """From the block cache into the buffer."""
        p = self.block
        inside = torch.arange(p, device=self.device)
        places_of = [[self._places[b][x] for x in row] for b, row in enumerate(chosen)]
        index = torch.tensor(places_of, dtype=torch.int64, device=self.device).view(self.batch, -1)
        index = (index.unsqueeze(-1) * p + inside).flatten(1)
        index = index.unsqueeze(1).expand(-1, self.mixer.n_kv_heads, -1)
        for buffer, cache in zip(self.buffer, self.cached, strict=True):
            target = buffer.entries(self.init, self.init + index.shape[-1])
            target.copy_(gather_tokens(cache.entries(), index))
        self._loaded = chosen

    # Step ------------------------------------------------------------------------------------

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend window, first tokens, remainder and the blocks looked up."""
        t = self.n_tokens
        if self.is_reference and t > self._plain_tokens:
            return published_step(self, q, k, v)
        position = torch.tensor([t], device=q.device)
        turned, near = self.turned(k, position), self.turned(q, position)
        if t <= self._plain_tokens:
            self.window[0].append(k if self.is_reference else turned)
            self.window[1].append(v)
            self.n_tokens += 1
            keys = self.window[0].entries()
            if self.is_reference:
                keys = self.turned(keys, torch.arange(self.n_tokens, device=k.device))
            out = attend_all(self, near, keys, self.window[1].entries())
            if self.n_tokens > self._plain_tokens:
                self._leave_plain()
            return out
        far = self._at_fixed_distance(q)
        coming = self._on_their_way(far)
        slot, n_away = t % self.local, self.rest[0].length - self.local + 1
        # the window from its oldest token on, without the one whose place the new one takes
        ranges = ((slot + 1, self.local), (0, slot))
        windows = [[x.entries(*r) for r in ranges] for x in self.window]
        parts_of_scores = [
            *(self._scores(near, x) for x in (*windows[0], turned)),
            self._scores(far, self.first[0].entries()),
            self._scores(far, self.rest[0].entries(0, n_away)),
        ]
        blocks = self._arrived(coming)
        parts_of_scores.append(self._scores(far, blocks[0]))
        scores = torch.cat(parts_of_scores, dim=-1).squeeze(3)
        weights = scores.softmax(dim=-1, dtype=torch.float32)
        values = (
            *windows[1],
            v,
            self.first[1].entries(),
            self.rest[1].entries(0, n_away),
            blocks[1],
        )
        parts = weights.to(v.dtype).split([x.shape[2] for x in values], dim=-1)
        out = sum(torch.matmul(part, x) for part, x in zip(parts, values, strict=True))
        assert isinstance(out, Tensor)
        self.take(turned, k, v, weights[..., : self.local].flatten(1, 2).to(self.dtype))
        return self.unfold(out)

    def take(self, in_window: Tensor, k: Tensor, v: Tensor, received: Tensor) -> None:
        """Add a token that was attended: ``in_window`` is what the window keeps of its key, and
        ``received`` [B, N, W] what its query gave to the window's keys, its own last.
        """
        n_away = self.rest[0].length - self.local + 1
        self.scores.entries(n_away).add_(received[..., :-1])
        self.scores.append(received[..., -1:])
        for buffer, x in zip(self.rest, (k, v), strict=True):
            buffer.append(x)
        for buffer, x in zip(self.window, (in_window, v), strict=True):
            buffer.write(self.n_tokens % self.local, x)
        self.n_tokens += 1
        if self._blocks_of(self.n_tokens) > self.n_blocks:
            self._send_oldest()

    def _send_oldest(self) -> None:
        """The first p tokens of the remainder become a block."""
        p = self.block
        self._represent(self.rest[0].entries(0, p), self.scores.entries(0, p))
        for buffer, host in zip(self.rest, self.host, strict=True):
            host.append(self._as_blocks(buffer.entries(0, p)))
        for buffer in (*self.rest, self.scores):
            buffer.drop_oldest(p, release=self._is_exact)

    @property
    def _is_exact(self) -> bool:
        """Whether storage grows exactly with what is held."""
        return not self._reserved

    def _leave_plain(self) -> None:
        """The plain cache outgrew its budget: turn its keys back and deal them out."""
        keys, values = (x.entries().clone() for x in self.window)
        unturned = keys
        if not self.is_reference:
            unturned = self.turned_back(keys, torch.arange(self.n_tokens, device=keys.device))
        for buffer in self.window:
            buffer.clear(release=self._is_exact)
        received = torch.zeros(
            self.batch, self.mixer.n_heads, self.n_tokens, dtype=self.dtype, device=keys.device
        )
        self.take_full_size()
        self.send_blocks(unturned, values, received, self.n_tokens)
        self.settle(keys, unturned, values, received)

    # Undo ------------------------------------------------------------------------------------

    def snapshot(self) -> Any:
        """Copies of everything on the device; blocks on the host only grow."""
        return _Snapshot(
            self.n_tokens,
            self.n_blocks,
            [x.entries().clone() for x in self._buffers()],
            [dict(x) for x in self._places],
            self._loaded,
        )

    def restore(self, snapshot: Any) -> None:
        """Put the copies back."""
        self.n_tokens, self.n_blocks, entries, places, self._loaded = snapshot
        self._places = [dict(x) for x in places]
        for buffer, kept in zip(self._buffers(), entries, strict=True):
            buffer.clear()
            buffer.append(kept)
        for buffer in self.host:
            buffer.length = self.n_blocks


def _room(n_blocks: int) -> int:
    """Representatives there is room for with ``n_blocks``."""
    room = _FIRST_ROOM
    while room < n_blocks:
        room *= 2
    return room

"""InfLLM run for real: a window, first tokens and the remainder on the device, blocks on the host.

As long as first tokens, window and top-k blocks hold the cache a layer is plain attention. Beyond,
the last W tokens lie in a ring, turned to their positions; everything older is attended at one
fixed distance, so it is kept unturned: the first I tokens, the remainder (which overlaps the
window), and blocks of p tokens that went to the host. A block is represented, for every query head,
by the mean of its keys with the largest local scores. A chunk of queries (one token in a step)
looks up its top-k blocks by its mean query, all heads together; they pass through a cache of blocks
on the device (the least recently used leaves) into the attention buffer: ``infllm_blocks``. Scores
of window, first tokens, blocks and remainder share one softmax (thunlp/InfLLM merges them with
running maxima, and computes local scores a second time). A step asks for its blocks first and for
their scores last. Where a cache leaves plain attention during decoding no scores are known yet:
keys of its blocks are averaged as they come.

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
from measure.methods.infllm_blocks import BlockStore, Places, room_for
from measure.methods.infllm_published import published_prompt, published_step
from measure.methods.kept_tokens import attend_all
from measure.parts import QUERY_BLOCK


class _Snapshot(NamedTuple):
    n_tokens: int
    n_blocks: int
    entries: list[Tensor]
    places: Places


@final
class InfLLMCache(AbstractLayerCache):
    """One layer's window, first tokens, remainder, and blocks."""

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

        self.window, self.first, self.rest = (pair(self.device) for _ in range(3))
        self.scores = GrowingBuffer(self.batch, m.n_heads, (), self.dtype, self.device)
        self.blocks = BlockStore(
            method,
            (m.n_heads, m.n_kv_heads),
            (m.head_dim, m.v_head_dim),
            batch=self.batch,
            dtype=self.dtype,
            device=self.device,
        )
        self._reserved = False
        self._set_budget(0)

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from (*self.window, *self.first, *self.rest, *self.blocks.buffers(), self.scores)

    def _set_budget(self, n_prompt: int) -> None:
        budget = self.method.budget(float(n_prompt))
        self.init, self.local = int(budget.init), int(budget.local)
        self.topk = int(budget.topk)
        self.blocks.set_budget(self.topk, int(budget.cached))
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
            self.blocks.buffer: 0 if plain else self._buffer_tokens,
            self.blocks.cached: 0 if plain else self.blocks.n_cached * self.block,
            self.blocks.host: n_blocks,
        }
        for pair, room in rooms.items():
            for buffer in pair:
                buffer.reserve(room)
        self.blocks.representatives.reserve(0 if plain else room_for(n_blocks))
        self.scores.reserve(0 if plain else self.local + self.block)

    @property
    def _buffer_tokens(self) -> int:
        return self.topk * self.block + self.chunk + self.block + self.init

    @property
    def host_bytes(self) -> int:
        """Bytes of the blocks on the host."""
        return sum(x.held_bytes for x in self.blocks.host)

    def clear(self) -> None:
        """Empty everything."""
        super().clear()
        self.blocks.forget()

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
            turned = self.turned(k, torch.arange(k.shape[2], device=k.device), k.shape[2])
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
        self.blocks.make_room(self._buffer_tokens)

    def fetched(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of the blocks for queries [B, N, n, H], in the attention buffer."""
        return self.blocks.arrived(self.blocks.look_up(q), self.init)

    def _prompt(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = k.shape[2]
        positions = torch.arange(s, device=k.device)
        turned, near = (self.turned(x, positions, s) for x in (k, q))
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
        first, rest = min(self.init, outside), self.init + self.blocks.n_blocks * self.block
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
        distance = torch.full((1,), self.local, dtype=torch.int64, device=q.device)
        return self.turned(q, distance, self.local + 1)

    def send_blocks(self, k: Tensor, v: Tensor, received: Tensor, n_seen: int) -> None:
        """Cut what is too far behind ``n_seen`` tokens of a prompt into blocks on the host."""
        n_blocks = self._blocks_of(n_seen)
        first = self.init + self.blocks.n_blocks * self.block
        last = self.init + n_blocks * self.block
        if last > first:
            self.blocks.send(*(x[:, :, first:last] for x in (k, v, received)))

    def settle(self, turned: Tensor, k: Tensor, v: Tensor, received: Tensor) -> None:
        """Keep window, first tokens and remainder of a prompt whose blocks are on the host."""
        self.n_tokens = s = k.shape[2]
        rest = self.init + self.blocks.n_blocks * self.block
        for buffer, x in zip(self.window, (turned, v), strict=True):
            buffer.append(x[:, :, s - self.local :].roll(s % self.local, dims=2))
        for pair, part in ((self.first, slice(0, self.init)), (self.rest, slice(rest, s))):
            pair[0].append(k[:, :, part])
            pair[1].append(v[:, :, part])
        self.scores.append(received[:, :, rest:])

    # Step ------------------------------------------------------------------------------------

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend window, first tokens, remainder and the blocks looked up."""
        t = self.n_tokens
        if self.is_reference and t > self._plain_tokens:
            return published_step(self, q, k, v)
        turned, near = (self.turned(x, self.now(), t + 1) for x in (k, q))
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
        found = self.blocks.look_up(far)
        slot, n_away = t % self.local, self.rest[0].length - self.local + 1
        # the window from its oldest token on, without the one whose place the new one takes
        ranges = ((slot + 1, self.local), (0, slot))
        windows = [[x.entries(*r) for r in ranges] for x in self.window]
        parts_of_scores = [
            *(self._scores(near, x) for x in (*windows[0], turned)),
            self._scores(far, self.first[0].entries()),
            self._scores(far, self.rest[0].entries(0, n_away)),
        ]
        blocks = self.blocks.arrived(found, self.init)
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
        if self._blocks_of(self.n_tokens) > self.blocks.n_blocks:
            self._send_oldest()

    def _send_oldest(self) -> None:
        """The first p tokens of the remainder become a block."""
        p = self.block
        self.blocks.send(*(x.entries(0, p) for x in (*self.rest, self.scores)))
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
            positions = torch.arange(self.n_tokens, device=keys.device)
            unturned = self.turned_back(keys, positions, self.n_tokens)
        for buffer in self.window:
            buffer.clear(release=self._is_exact)
        received = torch.zeros(
            self.batch, self.mixer.n_heads, self.n_tokens, dtype=self.dtype, device=keys.device
        )
        self.take_full_size()
        self.send_blocks(unturned, values, received, self.n_tokens)
        self.settle(keys, unturned, values, received)

    def _why_shapes_change(self) -> str:
        return "the host reads which blocks were chosen and starts the copies of the missing ones"

    # Undo ------------------------------------------------------------------------------------

    def snapshot(self) -> Any:
        """Copies of everything on the device; blocks on the host only grow."""
        return _Snapshot(
            self.n_tokens,
            self.blocks.n_blocks,
            [x.entries().clone() for x in self._buffers()],
            self.blocks.places.copy(),
        )

    def restore(self, snapshot: Any) -> None:
        """Put the copies back."""
        self.n_tokens, self.blocks.n_blocks, entries, places = snapshot
        self.blocks.places = places.copy()
        for buffer, kept in zip(self._buffers(), entries, strict=True):
            buffer.restore(kept)
        for buffer in self.blocks.host:
            buffer.length = self.blocks.n_blocks

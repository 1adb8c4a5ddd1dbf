"""Full attention: every K and V a token may still see, preallocated, written in place.

With a window or chunk of W tokens the buffers are rings: token t lies in slot t mod W, so min(T, W)
tokens are held. What a query sees are then all slots, or, of a chunk, those up to its own.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from costmodel.methods.base import AbstractMethod
from measure.kernels._steps import fits, token_step
from measure.methods.base import AbstractLayerCache, Realisation
from measure.methods.buffers import GrowingBuffer
from measure.methods.fixed_steps import NO_ROOM, attend_held, has_room
from measure.parts import QUERY_BLOCK, attend, attend_prompt


@final
class FullCache(AbstractLayerCache):
    """K and V of every token, or of the last W.

    softcap, sinks  of the layer's scores, set by whoever runs it; sinks [N]
    """

    NAME: ClassVar[str] = "full"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = "the same: published code calls the same fused attention"

    def _build(self, method: AbstractMethod) -> None:
        shape = (self.batch, self.mixer.n_kv_heads)
        self.keys, self.values = (
            GrowingBuffer(*shape, (size,), self.dtype, self.device)
            for size in (self.mixer.head_dim, self.mixer.v_head_dim)
        )
        self.limit = self.mixer.max_kv_tokens()
        self.softcap: float | None = None
        self.sinks: Tensor | None = None

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield self.keys
        yield self.values

    def reserve(self, n_tokens: int) -> None:
        """Room for K and V of ``n_tokens``, or of the window."""
        for buffer in self._buffers():
            buffer.reserve(n_tokens if self.limit is None else min(n_tokens, self.limit))

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend the prompt with what the layer's mask lets it see, and store it."""
        if self.prompt_attention is not None:
            out = self.prompt_attention.attend(q, k, v)
        else:
            out = attend_prompt(
                q,
                k,
                v,
                window=self.mixer.window_tokens,
                chunk=self.mixer.chunk_tokens,
                cap=self.softcap,
                sinks=self.sinks,
                block=q.shape[2] if self.is_reference else QUERY_BLOCK,
            )
        self.store(k, v)
        return out

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep everything, or the last W tokens in their slots."""
        n = k.shape[2]
        if self.limit is not None and n > self.limit:
            k, v = (x[:, :, -self.limit :].roll(n % self.limit, dims=2) for x in (k, v))
        self.keys.append(k)
        self.values.append(v)
        self.n_tokens += n

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append, then one attention call over all tokens; the group is the query length.

        With one query per head the CPU kernel of PyTorch 2.13 leaves most of the bandwidth unused.
        """
        plain = self.softcap is None and self.sinks is None and self.dtype.itemsize == 2
        if self.fused and plain and fits(self.mixer):
            return token_step(self, (q, k, v), ((self.keys,), (self.values,)), bits=16)
        if self.fixed_shapes:
            return self._fixed_step(q, k, v)
        seen = None
        if self.limit is None or self.keys.length < self.limit:
            self.store(k, v)
        else:
            slot = self.n_tokens % self.limit
            self.keys.write(slot, k)
            self.values.write(slot, v)
            self.n_tokens += 1
        if self.mixer.chunk_tokens:
            seen = (self.n_tokens - 1) % self.mixer.chunk_tokens + 1
        sinks = None if self.sinks is None else self.sinks.view(self.mixer.n_kv_heads, -1)
        keys, values = self.keys.entries(0, seen), self.values.entries(0, seen)
        return self.unfold(attend(self.fold(q), keys, values, cap=self.softcap, sinks=sinks))

    def _fixed_step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same over the whole room, told by the device which slots count."""
        n, chunk = self.now(), self.mixer.chunk_tokens
        slot = n if self.limit is None else n % self.limit
        for buffer, x in zip(self._buffers(), (k, v), strict=True):
            buffer.put(slot, x)
            buffer.length = min(self.n_tokens + 1, buffer.capacity)
        self.n_tokens += 1
        seen = (n % chunk if chunk else n) + 1
        keys, values = self.keys.whole, self.values.whole
        return attend_held(self, q, keys, values, seen, cap=self.softcap, sinks=self.sinks)

    def _why_shapes_change(self) -> str:
        is_full_ring = self.limit is not None and self.keys.length >= self.limit
        return "" if is_full_ring or has_room(self.keys) else NO_ROOM

    def snapshot(self) -> Any:
        """Remember the number of tokens, and what the next one overwrites in a full ring."""
        if self.limit is None or self.keys.length < self.limit:
            return self.n_tokens, None
        slot = self.n_tokens % self.limit
        return self.n_tokens, [b.entries(slot, slot + 1).clone() for b in self._buffers()]

    def restore(self, snapshot: Any) -> None:
        """Forget the tokens after it, and put back what they overwrote."""
        self.n_tokens, overwritten = snapshot
        if overwritten is None:
            self.keys.length = self.values.length = self.n_tokens
            self.reset_steps()
            return
        assert self.limit is not None
        for buffer, entry in zip(self._buffers(), overwritten, strict=True):
            buffer.write(self.n_tokens % self.limit, entry)

    def fill(self, n_tokens: int, seed: int = 0) -> None:
        """Empty the cache, then store a random prompt; only what a window keeps is drawn."""
        self.clear()
        held = n_tokens if self.limit is None else min(n_tokens, self.limit)
        generator = torch.Generator(device=self.device).manual_seed(seed)
        k, v = (
            torch.empty(
                (self.batch, self.mixer.n_kv_heads, held, size),
                dtype=self.dtype,
                device=self.device,
            ).normal_(generator=generator)
            for size in (self.mixer.head_dim, self.mixer.v_head_dim)
        )
        self.store(k, v)
        self.n_tokens = n_tokens

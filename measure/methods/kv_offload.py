"""KV offload run for real: every layer's cache in host memory, copied to the device for its step.

The first ``resident_layers`` caches own the slots in which a layer's cache stays between steps; the
others pass through a buffer that lives for one step. Only the new token goes back. On a GPU the
host side is pinned, and a layer's copy begins while the layer before it computes. On a CPU device
both sides are the same memory, and the copies are real. With a window of W tokens every buffer is a
ring: token t lies in entry t mod W.

``reference`` is transformers' offloaded cache: a layer is in one place at a time. A step brings it
to the device, concatenates the new token and sends the whole layer back to pageable host memory;
the first ``resident_layers`` are already there and come back at once for the next step.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from costmodel.errors import NotApplicableError
from costmodel.methods.base import AbstractMethod
from costmodel.methods.kv_offload import KvOffload
from measure.methods.base import Realisation
from measure.methods.buffers import GrowingBuffer
from measure.methods.host_copies import Wait, start_copies
from measure.methods.kept_tokens import KeptTokensCache, attend_all


@final
class KvOffloadCache(KeptTokensCache):
    """K and V on the host; on the device as well where the layer owns a slot."""

    NAME: ClassVar[str] = "kv_offload"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "transformers' offloaded DynamicLayer: whole layers both ways over pageable memory and "
        "`torch.cat`, without its stream (transfers queue). Windows are offloaded too (upstream "
        "keeps them on the device)"
    )

    def _build(self, method: AbstractMethod) -> None:
        assert isinstance(method, KvOffload)
        if self.mixer.chunk_tokens:
            raise NotApplicableError("kv_offload: chunked attention is run with full only")
        self.resident_layers = method.resident_layers
        self.limit = self.mixer.max_kv_tokens()
        self.pinned = method.pinned
        self.slots = self._kv_buffers()
        #: copies run beside the GPU's work
        self.is_asynchronous = self.device.type == "cuda"
        self._incoming: tuple[list[Tensor], Wait] | None = None
        self.host = tuple(
            GrowingBuffer(
                *(self.batch, self.mixer.n_kv_heads, (size,), self.dtype, torch.device("cpu")),
                pinned=self.pinned and self.is_asynchronous and not self.is_reference,
            )
            for size in (self.mixer.head_dim, self.mixer.v_head_dim)
        )

    @property
    def _is_resident(self) -> bool:
        return self.layer < self.resident_layers

    @property
    def _is_plain(self) -> bool:
        """Every layer has a slot, so that nothing is on the host."""
        return self.resident_layers >= self.n_kv_layers

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from self.slots

    def place(self, layer: int, n_kv_layers: int, rope: object = None) -> None:
        """A cache without a slot has no room on the device, a plain one none on the host."""
        room = self.slots[0].capacity
        super().place(layer, n_kv_layers)
        for buffer in self.slots if not self._is_resident else self.host if self._is_plain else ():
            buffer.clear(release=True)
        self.reserve(room)

    def reserve(self, n_tokens: int) -> None:
        """Room on the host, and on the device where there is a slot."""
        if self.is_reference and not self._is_plain:
            return  # it grows by torch.cat
        room = n_tokens if self.limit is None else min(n_tokens, self.limit)
        for buffer in self._held_by():
            buffer.reserve(room)

    def _held_by(self) -> tuple[GrowingBuffer, ...]:
        """Buffers that keep the cache between steps."""
        if self.is_reference:
            return self.slots if self._is_resident else self.host
        return (
            *(() if self._is_plain else self.host),
            *(self.slots if self._is_resident else ()),
        )

    @property
    def _overwritten(self) -> int | None:
        """Entry that the next token takes, None where it is added."""
        if self.limit is None or self.n_tokens < self.limit:
            return None
        return self.n_tokens % self.limit

    @property
    def host_bytes(self) -> int:
        """Bytes in use on the host."""
        return sum(x.held_bytes for x in self.host)

    def clear(self) -> None:
        """Empty both sides."""
        super().clear()
        self._incoming = None
        for buffer in self.host:
            buffer.clear()

    def store(self, k: Tensor, v: Tensor) -> None:
        """To the host, and into the slot."""
        self.n_tokens = n = k.shape[2]
        if self.limit is not None and n > self.limit:
            k, v = (x[:, :, -self.limit :].roll(n % self.limit, dims=2) for x in (k, v))
        for slot, host, x in zip(self.slots, self.host, (k, v), strict=True):
            if not self._is_plain and not (self.is_reference and self._is_resident):
                host.append(x)
            if self._is_resident:
                slot.append(x)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fetch the layer, attend it with the new token, write that back."""
        if self.is_reference and not self._is_plain:
            return self._reference_step(q, k, v)
        if self._can_prefetch:
            held = self._arrived(k, v)
        else:
            held = [
                self._fetched(slot, host, x)
                for slot, host, x in zip(self.slots, self.host, (k, v), strict=True)
            ]
        self.n_tokens += 1
        return attend_all(self, q, *held)

    def _reference_step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``Cache.update``: prefetch, concatenate, offload; then the next step's prefetch."""
        entry, held = self._overwritten, []
        for buffer, x in zip(self._held_by(), (k, v), strict=True):
            layer = buffer.entries().to(self.device)
            if entry is None:
                layer = torch.cat((layer, x), dim=2)
            else:
                layer = layer.clone()
                layer[:, :, entry] = x[:, :, 0]
            on_host = layer.to("cpu", copy=True)
            back = self._is_resident
            buffer.hold(on_host.to(self.device, copy=True) if back else on_host)
            held.append(layer)
        self.n_tokens += 1
        return attend_all(self, q, *held)

    @property
    def _can_prefetch(self) -> bool:
        """There is a copy to make, and room for the new token in what is copied."""
        has_room = self._overwritten is not None or self.host[0].capacity > self.host[0].length
        return self.is_asynchronous and not self._is_plain and has_room

    def prefetch(self) -> None:
        """Begin copying the layer to the device."""
        if self._incoming is not None or not self._can_prefetch:
            return
        targets = [
            slot.whole if self._is_resident else torch.empty_like(host.whole, device=self.device)
            for slot, host in zip(self.slots, self.host, strict=True)
        ]
        self._incoming = targets, start_copies(targets, [host.whole for host in self.host])

    def _arrived(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """K and V on the device once their copy is there, the new token in its place; the next
        layer's copy has begun by then.
        """
        self.prefetch()
        assert self._incoming is not None
        (targets, wait), self._incoming = self._incoming, None
        wait()
        if isinstance(self.successor, KvOffloadCache):
            self.successor.prefetch()
        entry, n = self._overwritten, self.host[0].length
        for slot, host, target, x in zip(self.slots, self.host, targets, (k, v), strict=True):
            target[:, :, n if entry is None else entry].copy_(x[:, :, 0])
            _put(host, entry, x)
            if self._is_resident and entry is None:
                slot.length = n + 1
        return [target[:, :, : n if entry is not None else n + 1] for target in targets]

    def _fetched(self, slot: GrowingBuffer, host: GrowingBuffer, x: Tensor) -> Tensor:
        """K or V of the layer on the device, the new token ``x`` in its place."""
        entry = self._overwritten
        if self._is_plain:
            _put(slot, entry, x)
            return slot.entries()
        n = host.length
        if self._is_resident:
            _put(slot, entry, x)
            device = slot.entries()
        else:
            room = n if entry is not None else n + 1
            device = torch.empty(*x.shape[:2], room, x.shape[-1], dtype=x.dtype, device=self.device)
        device[:, :, :n].copy_(host.entries())
        device[:, :, n if entry is None else entry].copy_(x[:, :, 0])
        _put(host, entry, x)
        return device

    def _why_shapes_change(self) -> str:
        return "the host names the place in its memory that the new token goes to"

    def snapshot(self) -> Any:
        """Remember the number of tokens, and what the next one overwrites in a full ring."""
        entry = self._overwritten
        if entry is None:
            return self.n_tokens, None
        return self.n_tokens, [b.entries(entry, entry + 1).clone() for b in self._held_by()]

    def restore(self, snapshot: Any) -> None:
        """Forget the tokens after it, and put back what they overwrote."""
        self.n_tokens, overwritten = snapshot
        if overwritten is None:
            for buffer in self._held_by():
                buffer.length = self.n_tokens
            return
        entry = self._overwritten
        assert entry is not None
        for buffer, kept in zip(self._held_by(), overwritten, strict=True):
            buffer.write(entry, kept)


def _put(buffer: GrowingBuffer, entry: int | None, x: Tensor) -> None:
    if entry is None:
        buffer.append(x)
    else:
        buffer.write(entry, x)

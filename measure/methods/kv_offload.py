"""KV offload run for real: every layer's cache in host memory, copied to the device for its step.

The first ``resident_layers`` caches own the slots in which a layer's cache stays between steps; the
others pass through a buffer that lives for one step. Only the new token goes back. On a CPU device
both sides are the same memory, and the copies are real.
"""

from collections.abc import Iterator
from typing import ClassVar, final

import torch
from torch import Tensor

from costmodel.methods.base import AbstractMethod
from costmodel.methods.kv_offload import KvOffload
from measure.methods.buffers import GrowingBuffer
from measure.methods.kept_tokens import KeptTokensCache, attend_all


@final
class KvOffloadCache(KeptTokensCache):
    """K and V on the host; on the device as well where the layer owns a slot."""

    NAME: ClassVar[str] = "kv_offload"

    def _build(self, method: AbstractMethod) -> None:
        assert isinstance(method, KvOffload)
        self.resident_layers = method.resident_layers
        self.pinned = method.pinned
        self.slots = self._kv_buffers()
        self.host = tuple(
            GrowingBuffer(
                self.batch, self.mixer.n_kv_heads, (size,), self.dtype, torch.device("cpu")
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
        for buffer in () if self._is_plain else self.host:
            buffer.reserve(n_tokens)
        for buffer in self.slots if self._is_resident else ():
            buffer.reserve(n_tokens)

    @property
    def host_bytes(self) -> int:
        """Bytes in use on the host."""
        return sum(x.held_bytes for x in self.host)

    def clear(self) -> None:
        """Empty both sides."""
        super().clear()
        for buffer in self.host:
            buffer.clear()

    def store(self, k: Tensor, v: Tensor) -> None:
        """To the host, and into the slot."""
        self.n_tokens += k.shape[2]
        for slot, host, x in zip(self.slots, self.host, (k, v), strict=True):
            if not self._is_plain:
                host.append(x)
            if self._is_resident:
                slot.append(x)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fetch the layer, attend it with the new token, write that back."""
        held = [
            self._fetched(slot, host, x)
            for slot, host, x in zip(self.slots, self.host, (k, v), strict=True)
        ]
        self.n_tokens += 1
        return attend_all(self, q, *held)

    def _fetched(self, slot: GrowingBuffer, host: GrowingBuffer, x: Tensor) -> Tensor:
        if self._is_plain:
            slot.append(x)
            return slot.entries()
        t = host.length
        if self._is_resident:
            slot.append(x)
            device = slot.entries()
        else:
            device = torch.empty(
                *x.shape[:2], t + 1, x.shape[-1], dtype=x.dtype, device=self.device
            )
            device[:, :, t:] = x
        device[:, :, :t].copy_(host.entries())
        host.append(x)
        return device

    def snapshot(self) -> int:
        """Remember the number of tokens."""
        return self.n_tokens

    def restore(self, snapshot: int) -> None:
        """Forget the tokens after it."""
        self.n_tokens = snapshot
        for buffer in self.slots if self._is_resident else ():
            buffer.length = snapshot
        for buffer in () if self._is_plain else self.host:
            buffer.length = snapshot

"""Tensors that grow along one axis, with an honest count of what they hold."""

import math

import torch
from torch import Tensor

#: The axis that grows: [batch, heads, entries, ...].
_AXIS = 2


class GrowingBuffer:
    """Entries [B, K, n, ...] appended in place; room for ``capacity`` of them, ``length`` in use.

    ``reserve`` makes room beforehand. Without room an append reallocates to exactly what is needed,
    so an unreserved buffer's storage always equals its entries. ``pinned`` host memory can be
    copied to a GPU while the host goes on.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        entry: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        pinned: bool = False,
    ) -> None:
        self._data = torch.empty(batch, heads, 0, *entry, dtype=dtype, device=device)
        self._pinned = pinned
        self.length = 0

    @property
    def capacity(self) -> int:
        """Entries there is room for."""
        return self._data.shape[_AXIS]

    @property
    def whole(self) -> Tensor:
        """The storage as a tensor, room included."""
        return self._data

    @property
    def storage_bytes(self) -> int:
        """Bytes of the storage itself, whatever views of it exist."""
        return self._data.untyped_storage().nbytes()

    @property
    def held_bytes(self) -> int:
        """Bytes of the entries in use; ``storage_bytes`` less the room left."""
        if self.capacity == 0:
            return 0
        return self._data.nbytes // self.capacity * self.length

    def entries(self, start: int = 0, stop: int | None = None) -> Tensor:
        """View the entries in use, or a part of them."""
        stop = self.length if stop is None else stop
        return self._data.narrow(_AXIS, start, stop - start)

    def reserve(self, capacity: int) -> None:
        """Make room for exactly ``capacity`` entries, keeping those in use."""
        b, k, _, *entry = self._data.shape
        data = torch.empty(
            *(b, k, capacity, *entry),
            dtype=self._data.dtype,
            device=self._data.device,
            pin_memory=self._pinned,
        )
        data.narrow(_AXIS, 0, self.length).copy_(self.entries())
        self._data = data

    def fit(self, capacity: int) -> None:
        """Lay the empty buffer out for exactly ``capacity`` entries, in its storage if they fit.

        A cache of fixed size is then contiguous however much room was made: on a CPU, matmuls in
        bf16 over a part of wider rows took 8 times as long (PyTorch 2.13).
        """
        b, k, _, *entry = self._data.shape
        shape = (b, k, capacity, *entry)
        if math.prod(shape) * self._data.itemsize > self.storage_bytes:
            self.reserve(capacity)
        else:
            strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            self._data = self._data.as_strided(shape, strides, 0)

    def hold(self, entries: Tensor) -> None:
        """Have ``entries`` [B, K, n, ...] in use, the tensor itself, as code that builds its cache
        anew with every step does.
        """
        self._data, self.length = entries, entries.shape[_AXIS]

    def extend_to(self, length: int) -> None:
        """Have ``length`` entries in use; those added hold nothing yet."""
        if length > self.capacity:
            self.reserve(length)
        self.length = max(self.length, length)

    def append(self, entries: Tensor) -> None:
        """Copy ``entries`` [B, K, n, ...] behind those in use."""
        length = self.length + entries.shape[_AXIS]
        if length > self.capacity:
            self.reserve(length)
        self._data.narrow(_AXIS, self.length, entries.shape[_AXIS]).copy_(entries)
        self.length = length

    def write(self, index: int, entry: Tensor) -> None:
        """Overwrite one entry [B, K, 1, ...]."""
        self._data.narrow(_AXIS, index, 1).copy_(entry)

    def put(self, index: Tensor, entry: Tensor) -> None:
        """Overwrite the entry at ``index`` [1] of the storage, which the device knows."""
        data, entry = self._data, entry.to(self._data.dtype)
        if data.is_floating_point() and data.itemsize == 1:  # eight-bit floats are only moved
            data, entry = data.view(torch.uint8), entry.view(torch.uint8)
        data.index_copy_(_AXIS, index, entry)

    def zero_room(self) -> None:
        """Have what is not in use be zeros: a step over the whole room multiplies it by nothing."""
        room = self._data.narrow(_AXIS, self.length, self.capacity - self.length)
        (room.view(torch.uint8) if room.itemsize == 1 else room).zero_()

    def drop_oldest(self, n: int, *, release: bool = False) -> None:
        """Forget the first ``n`` entries, the others move up; ``release`` gives their room back."""
        if n <= 0:
            return
        rest = self.entries(n).clone()
        self.length = 0
        if release:
            self.reserve(rest.shape[_AXIS])
        self.append(rest)

    def restore(self, entries: Tensor) -> None:
        """Hold just ``entries``, a copy of what was held; the layout stays as it is."""
        self.length = 0
        self.append(entries)

    def clear(self, *, release: bool = False) -> None:
        """Forget all entries; ``release`` gives the storage back too, else all of it is room."""
        self.length = 0
        if release:
            self.reserve(0)
        elif self._data.nbytes:
            self.fit(self.storage_bytes // (self._data.nbytes // self.capacity))

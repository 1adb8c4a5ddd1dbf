"""Most bytes of tensors alive during a call, counted storage by storage as operations make them.

This sees what PyTorch hands from operation to operation, exactly, on any device; it does not see
what a library allocates inside one operation and frees again. What existed before the call
(weights, caches, inputs) is not counted, it is known already; but where it is freed meanwhile, as
by a cache that is built anew, it makes room.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """While entered, follows every storage that an operation returns until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}
        self._old: dict[int, int] = {}
        #: operations that are not made of others
        self._whole: set[Any] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, then look at its results; one made of others is taken apart."""
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor):  # not made here: it was there before
                key = _key(tensor)
                if key not in self._known and key not in self._old:
                    self._old[key] = tensor.untyped_storage().nbytes()
                    self._forget_when_freed(tensor, self._freed, key)
        if func not in self._whole:
            with self:
                results = func.decompose(*args, **(kwargs or {}))
            if results is not NotImplemented:
                return results
            self._whole.add(func)
        results = func(*args, **(kwargs or {}))
        for tensor in tree_iter(results):
            if isinstance(tensor, torch.Tensor):
                self._made(tensor)
        return results

    def _made(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = _key(tensor)
        if key in self._known or key in self._old or not storage.nbytes():
            return
        self._known[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        self._forget_when_freed(tensor, self._freed, key)

    @staticmethod
    def _forget_when_freed(tensor: torch.Tensor, forget: Callable[[int], object], key: int) -> None:
        weakref.finalize(tensor.untyped_storage(), forget, key).atexit = False

    def _freed(self, key: int) -> None:
        self.live -= self._known.pop(key, 0) + self._old.pop(key, 0)


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def transient_peak_bytes(call: Callable[[], object]) -> int:
    """Run ``call`` once; most bytes alive that were not there before it."""
    with LiveBytes() as counter:
        call()
    return counter.peak

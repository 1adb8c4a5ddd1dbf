"""Bytes of whatever a cache or a module holds between steps, and putting it back after one.

State lives in the attributes of cache layers, and for some recurrent families on the model's own
modules. Keys and values are replaced by an update, never written into (or, where preallocated,
written again by the same step), so they are kept by reference; everything else is copied.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_REPLACED = frozenset({"keys", "values", "_quantized_keys", "_quantized_values"})
_DEEPEST = 6


def tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """All tensors in an object; packed ones by their parts. Scalars and vectors are counters."""
    if isinstance(value, Tensor):
        if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            for name in names:
                yield from tensors(getattr(value, name), depth + 1)
        elif value.dim() > 1:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item, depth + 1)
    elif hasattr(value, "__dict__") and depth < _DEEPEST and not _is_config(value):
        yield from tensors(vars(value), depth + 1)


def _is_config(value: Any) -> bool:
    return "onfig" in type(value).__name__ or isinstance(value, torch.nn.Module | type)


def held(holders: list[Any]) -> tuple[int, int]:
    """(bytes of all tensors, of them on the host); views count by what they show."""
    seen: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    for tensor in tensors(holders):
        seen[tensor.data_ptr(), tuple(tensor.shape)] = tensor
    sizes = [(t.nbytes, t.device.type) for t in seen.values()]
    return sum(n for n, _ in sizes), sum(n for n, kind in sizes if kind == "cpu")


def storage_bytes(holders: list[Any]) -> int:
    """Bytes of the storages behind them, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(holders)}
    return sum(found.values())


class Snapshot:
    """Attributes of some objects at one moment."""

    def __init__(self, holders: list[Any]) -> None:
        self._saved = [(holder, _copied(vars(holder))) for holder in holders]

    def restore(self) -> None:
        """Put copies back; the snapshot stays good."""
        for holder, saved in self._saved:
            vars(holder).update(_copied(saved))


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if name in _REPLACED else _copy(value)
        for name, value in attributes.items()
        if not name.startswith("__")
    }


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


class ModuleState:
    """Tensors that a model's modules keep as plain attributes between steps (RG-LRU)."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = list(model.modules())
        self._before = [_plain(m) for m in self._modules]

    def holders(self) -> list[torch.nn.Module]:
        """Modules that hold something they did not hold at the start."""
        return [
            m
            for m, before in zip(self._modules, self._before, strict=True)
            if any(before.get(k) is not v for k, v in _plain(m).items())
        ]

    def held(self) -> list[Tensor]:
        """What they hold."""
        return [
            value
            for module, before in zip(self._modules, self._before, strict=True)
            for name, value in _plain(module).items()
            if before.get(name) is not value
        ]

    def clear(self) -> None:
        """Back to the start."""
        for module, before in zip(self._modules, self._before, strict=True):
            for name in _plain(module):
                if name not in before:
                    setattr(module, name, None)


class ModuleSnapshot:
    """Copies of what modules hold."""

    def __init__(self, modules: list[torch.nn.Module]) -> None:
        self._saved = [(m, {k: v.clone() for k, v in _plain(m).items()}) for m in modules]

    def restore(self) -> None:
        """Put copies back."""
        for module, saved in self._saved:
            for name, value in saved.items():
                setattr(module, name, value.clone())


def _plain(module: torch.nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}

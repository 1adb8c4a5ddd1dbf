"""Runnable twins of ``costmodel.methods``, one file each, found by walking this package.

``costmodel/methods/<name>.py`` says what a method costs; ``measure/methods/<name>.py`` runs it,
built from the same dataclass. There is no list to edit.
"""

import functools
import importlib
import pkgutil

import torch

from costmodel.errors import NotApplicableError
from costmodel.methods.stack import MethodStack
from costmodel.mixers import AbstractMixer, Attention
from measure.kernels import check_usable
from measure.methods.base import AbstractLayerCache, Realisation

_NOT_METHODS = ("base", "buffers", "kept_tokens", "packing", "token_packed")


@functools.cache
def runnable_names() -> tuple[str, ...]:
    """Names of the methods that have a twin (nothing is imported)."""
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_METHODS)
    )


@functools.cache
def layer_cache_class(name: str) -> type[AbstractLayerCache]:
    """Return the twin of a method; raises ``NotApplicableError`` where there is none."""
    if name not in runnable_names():
        raise NotApplicableError(
            f"{name} is priced but cannot be run here; runnable: {', '.join(runnable_names())}"
        )
    module = importlib.import_module(f"{__name__}.{name}")
    for value in vars(module).values():
        is_twin = isinstance(value, type) and issubclass(value, AbstractLayerCache)
        if is_twin and getattr(value, "NAME", None) == name:
            return value
    raise AssertionError(f"measure/methods/{name}.py defines no twin named {name!r}")


def build_layer_cache(
    stack: MethodStack,
    mixer: AbstractMixer,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    reserve_tokens: int = 0,
    fused: bool = False,
    realisation: Realisation = "best",
) -> AbstractLayerCache:
    """Return one layer's empty cache: the method's where it covers the mixer, else the plain one.

    ``reserve_tokens`` is the room made from the start; 0 keeps the storage exact at every step (it
    is reallocated as it grows), which is for checking bytes, not for timing. ``fused`` lets a twin
    decode with the kernels of ``measure.kernels``; raises ``MissingExtraError`` where they cannot
    run.
    """
    if fused:
        check_usable(device)
    if len(stack.methods) != 1:
        raise NotApplicableError(f"{stack.spec}: compositions cannot be run yet, only priced")
    assert isinstance(mixer, Attention)
    method = stack.methods[0]
    name = method.NAME if method.covers(mixer) else "full"
    cache = layer_cache_class(name)(
        method,
        mixer,
        batch=batch,
        dtype=dtype,
        device=device,
        reserve_tokens=reserve_tokens,
        realisation=realisation,
    )
    cache.fused = fused
    return cache

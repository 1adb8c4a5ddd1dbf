"""Runnable twins of ``costmodel.methods``, one file each, found by walking this package.

``costmodel/methods/<name>.py`` says what a method costs; ``measure/methods/<name>.py`` runs it,
built from the same dataclass. There is no list to edit.
"""

import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from costmodel.errors import NotApplicableError
from costmodel.methods.base import AbstractMethod
from costmodel.methods.full import Full
from costmodel.methods.llmlingua2 import LLMLingua2
from costmodel.methods.stack import MethodStack
from costmodel.mixers import AbstractMixer, Attention
from measure.encoder_files import split_encoder
from measure.kernels import check_usable
from measure.methods.base import AbstractLayerCache, AbstractPromptAttention, Realisation
from measure.methods.evicting import EvictingCache
from measure.runnable import runnable_names

if TYPE_CHECKING:
    from measure.methods.llmlingua2 import LLMLingua2Compressor
    from measure.methods.llmlingua_package import LLMLinguaPackageCompressor


@functools.cache
def layer_cache_class(name: str) -> type[AbstractLayerCache]:
    """Return the cache of a method; raises ``NotApplicableError`` where there is none."""
    found: type[AbstractLayerCache] = _twin(name, AbstractLayerCache)
    return found


@functools.cache
def prompt_attention_class(name: str) -> type[AbstractPromptAttention]:
    """Return what attends the prompt for a method that changes nothing else."""
    found: type[AbstractPromptAttention] = _twin(name, AbstractPromptAttention)
    return found


@functools.cache
def forms_of(name: str) -> tuple[frozenset[Realisation], str]:
    """Return the forms that a runnable method has, and what its ``reference`` runs."""
    twins = [
        value
        for value in vars(_module(name)).values()
        if getattr(value, "NAME", None) == name and hasattr(value, "REALISATIONS")
    ]
    return twins[0].REALISATIONS, twins[0].PUBLISHED_AS


def _module(name: str) -> ModuleType:
    if name not in runnable_names():
        raise NotApplicableError(
            f"{name} is priced but cannot be run here; runnable: {', '.join(runnable_names())}"
        )
    return importlib.import_module(f"{__name__}.{name}")


def _twin(name: str, base: Any) -> Any:
    for value in vars(_module(name)).values():
        is_twin = isinstance(value, type) and issubclass(value, base)
        if is_twin and getattr(value, "NAME", None) == name:
            return value
    raise AssertionError(f"measure/methods/{name}.py defines no {base.__name__} named {name!r}")


def prompt_compressor(
    stack: MethodStack,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    realisation: Realisation = "best",
    encoder: str | None = None,
) -> "LLMLingua2Compressor | LLMLinguaPackageCompressor | None":
    """Return what shortens the prompt before the model sees it, if a method of the stack does;
    ``encoder`` as ``--encoder`` has it.
    """
    for method in stack.methods:
        if isinstance(method, LLMLingua2) and method.kept_rate < 1:
            by_package, folder = split_encoder(encoder or "")
            if by_package:
                from measure.methods.llmlingua_package import LLMLinguaPackageCompressor

                return LLMLinguaPackageCompressor(method, folder, device=device)
            from measure.methods.llmlingua2 import LLMLingua2Compressor

            return LLMLingua2Compressor(
                method,
                dtype=dtype,
                device=device,
                seed=seed,
                checkpoint=None if encoder is None else folder,
                realisation=realisation,
            )
    return None


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
    """Return one layer's empty cache: what the stack's methods make of it where they cover the
    mixer, else the plain one. A method that only evicts hands what it keeps to the one that stores.

    ``reserve_tokens`` is the room made from the start; 0 keeps the storage exact at every step (it
    is reallocated as it grows), which is for checking bytes, not for timing. ``fused`` lets a twin
    decode with the kernels of ``measure.kernels``; raises ``MissingExtraError`` where they cannot
    run.
    """
    if fused:
        check_usable(device)
    if stack.conflict is not None:
        raise NotApplicableError(stack.conflict)
    assert isinstance(mixer, Attention)
    covering = [m for m in stack.methods if m.covers(mixer)]
    holds = next((m for m in covering if "store" in m.STAGES), None)
    evicts = next((m for m in covering if {"evict"} == m.STAGES), None)
    attends = next((m for m in covering if {"prefill"} == m.STAGES), None)

    def built(method: AbstractMethod) -> AbstractLayerCache:
        cache = layer_cache_class(method.NAME)(
            method,
            mixer,
            batch=batch,
            dtype=dtype,
            device=device,
            reserve_tokens=reserve_tokens,
            realisation=realisation,
        )
        cache.fused = fused and realisation == "best"
        return cache

    cache = built(holds or Full()) if evicts is None else built(evicts)
    if isinstance(cache, EvictingCache):
        if holds is not None and evicts is not None:
            cache.hold_in(built(holds))
        cache.inner.fused = cache.fused
    if attends is not None:
        cache.prompt_attention = prompt_attention_class(attends.NAME)(attends, realisation)
    return cache

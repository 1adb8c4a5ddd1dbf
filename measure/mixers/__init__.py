"""Runnable mixers, one file each: a ``costmodel.mixers`` description, with tensors and state."""

from typing import Any

import torch

from costmodel.errors import NotApplicableError
from costmodel.methods.stack import MethodStack
from costmodel.mixers import AbstractMixer, Attention
from costmodel.mixers.delta import DeltaRule
from costmodel.mixers.lightning import Lightning
from costmodel.mixers.mamba import Mamba
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.mla import MLA
from costmodel.mixers.rglru import RGLRU
from costmodel.mixers.rwkv5 import RWKV5
from measure.kernels import check_usable
from measure.methods import build_layer_cache
from measure.methods.base import Realisation
from measure.mixers.attention import AttentionRunner
from measure.mixers.base import AbstractRunner, LayerState, RecurrentRunner
from measure.mixers.delta import DeltaRunner
from measure.mixers.lightning import LightningRunner
from measure.mixers.mamba import MambaRunner
from measure.mixers.mamba2 import Mamba2Runner
from measure.mixers.mla import LatentCache, MLARunner
from measure.mixers.rglru import RGLRURunner
from measure.mixers.rwkv5 import RWKV5Runner
from measure.numerics import Numerics

_RUNNERS: dict[type[AbstractMixer], type[AbstractRunner]] = {
    Attention: AttentionRunner,
    MLA: MLARunner,
    Mamba: MambaRunner,
    Mamba2: Mamba2Runner,
    RGLRU: RGLRURunner,
    DeltaRule: DeltaRunner,
    RWKV5: RWKV5Runner,
    Lightning: LightningRunner,
}


def runner_of(mixer: AbstractMixer, numerics: Numerics) -> AbstractRunner:
    """Return what runs ``mixer``; raises ``NotApplicableError`` saying what it has."""
    kind = _RUNNERS.get(type(mixer))
    if kind is None:
        raise NotApplicableError(f"has a {mixer.KIND} mixer")
    return kind(mixer, numerics)


def build_cache(
    stack: MethodStack,
    mixer: AbstractMixer,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    reserve_tokens: int = 0,
    fused: bool = False,
    realisation: Realisation = "best",
) -> LayerState:
    """Return one layer's empty cache or state; the rest as in ``build_layer_cache``. Latents and
    fixed states have one form.
    """
    options: dict[str, Any] = {"batch": batch, "dtype": dtype, "device": device}
    if isinstance(mixer, Attention):
        return build_layer_cache(
            stack,
            mixer,
            reserve_tokens=reserve_tokens,
            fused=fused,
            realisation=realisation,
            **options,
        )
    if isinstance(mixer, MLA):
        if any(method.covers(mixer) and method.NAME != "full" for method in stack.methods):
            raise NotApplicableError(f"{stack.spec}: latents are held in full only, so far")
        return LatentCache(mixer, reserve_tokens=reserve_tokens, **options)
    runner = runner_of(mixer, Numerics())
    assert isinstance(runner, RecurrentRunner)
    if fused:
        check_usable(device)
    state = runner.cache(**options)
    state.fused = fused
    return state

"""FP8 KV cache: e4m3 elements with one fp32 scale per layer each for K and V.

State per layer: B min(T, W) K (Hk + Hv) + 8 bytes. Multi-head latent attention stores FlashMLA's
layout (656 bytes a token: 512 fp8, 4 fp32 scales, 64 bf16 rope elements; the sparse index 132),
which its mixer knows. Micikevicius et al., arXiv 2209.05433.

``ideal`` reads fp8 in the attention kernel, as vLLM and FlashInfer do. ``reference`` is the fp8
layer of transformers: the cache grows by ``torch.cat`` and is dequantised whole on every step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.fused_kernels import fused_step
from costmodel.methods.base import AbstractMethod, Scope, Stage, State, not_stored
from costmodel.methods.chains import attend_packed, elementwise, reads_copy
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Operations
from costmodel.workload import Point

_LAYER = "transformers 5.23 cache_utils.py Fp8QuantizedLayer"
_SCALE_BYTES = 8.0  # one fp32 scale each for K and V


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Kv(AbstractMethod):
    """8-bit floating point cache."""

    NAME: ClassVar[str] = "fp8_kv"
    TITLE: ClassVar[str] = "FP8 (e4m3) KV cache"
    REFERENCE: ClassVar[str] = "Micikevicius et al., arXiv 2209.05433; vLLM, FlashInfer, FlashMLA"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"store"})
    ACTS: ClassVar[str] = "on every token as it is cached"
    STORES: ClassVar[str] = "fp8"
    SCOPE: ClassVar[Scope] = "cache"
    DOES_NOT_SAVE: ClassVar[str] = "prefill compute, weights, or more than half of the cache."
    ENGINE_FLAGS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vllm": ("--kv-cache-dtype", "fp8"),
        "sglang": ("--kv-cache-dtype", "fp8_e4m3"),
    }
    REALISED_BY: ClassVar[tuple[str, ...]] = (
        "vLLM",
        "SGLang",
        "TensorRT-LLM",
        "FlashInfer",
        "transformers (dequantises the whole cache every step)",
    )
    STATE_FORMULA: ClassVar[str] = "B min(T, W) K (Hk + Hv) + 8 (two fp32 scales) per layer"

    def state(self, group: MixerGroup, point: Point) -> State:
        """One byte per element and the scales; latent caches as their mixer lays them out."""
        size = group.mixer.state_bytes(_fp8(point))
        scales = _SCALE_BYTES if isinstance(group.mixer, Attention) else 0.0
        return State(group.n_layers * (size + scales))

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Exact attention; what is cached is written in fp8 afterwards."""
        if not isinstance(group.mixer, Attention):
            return group.mixer.prefill(_fp8(point))
        return not_stored(attention, point)

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Scale and cast; upstream also finds the scale: abs, amax, to fp32, divide, cast."""
        mixer = group.mixer
        if not isinstance(mixer, Attention):
            return ()
        b = point.element_bytes
        elements = mixer.state_bytes(_fp8(point.at(point.prompt_tokens)))
        reference = point.level == "reference"
        return (
            elementwise(
                "quantise_fp8",
                vector_flops=2 * elements,
                state_bytes=elements + _SCALE_BYTES,
                workspace_bytes=elements * (4 * b + 16) if reference else 0.0,
                activation_bytes=0.0 if reference else elements * b,
                transient_bytes=elements * (b + (8 if reference else 0)),
                launches=10 if reference else 1,
                source=f"{_LAYER}._quantize" if reference else "",
                formula="abs (b, b), amax (b), to fp32 (b, 4), divide (4, 4), cast (4, 1)"
                if reference
                else "1 byte per element written",
            ),
        )

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """The mixer's own step over fp8 bytes, or the dequantising chain."""
        mixer = group.mixer
        if point.level == "reference" and isinstance(mixer, Attention):
            return self._reference_decode(mixer, point)
        operations = mixer.decode(_fp8(point))
        if not isinstance(mixer, Attention):
            return operations
        elements = point.batch * np.minimum(point.cached_tokens, mixer.limit_tokens)
        elements = elements * mixer.kv_elements_per_token()
        attention, *rest = operations
        attend = attend_packed(
            point,
            attention,
            packed=elements,
            elements=elements,
            bits=8,
            name="dequantise_fp8",
            unfitted="",
        )
        if mixer.max_kv_tokens() is None:
            attend = fused_step(point, "attention8", *attend)
        return (*attend, *rest)

    def _reference_decode(self, mixer: Attention, point: Point) -> Operations:
        b = point.element_bytes
        elements = mixer.state_bytes(_fp8(point))
        new = point.batch * mixer.kv_elements_per_token()
        attention = decode_attention(
            mixer,
            point,
            read_tokens=np.minimum(point.cached_tokens, mixer.limit_tokens),
            executed_tokens=np.minimum(point.cached_tokens + 1, mixer.limit_tokens),
            read_bytes=0.0,
            written_bytes=new,
            transient_bytes=elements * b,
            source="torch scaled_dot_product_attention over the dequantised copy",
            formula="reads B T K (Hk + Hv) b of the copy",
        )
        return (
            elementwise(
                "cache_cat",
                state_bytes=elements + _SCALE_BYTES,
                workspace_bytes=elements,
                transient_bytes=elements,
                launches=2,
                source=f"{_LAYER}.update torch.cat",
                formula="fp8 K and V read and written",
            ),
            elementwise(
                "dequantise",
                vector_flops=elements,
                workspace_bytes=elements * (1 + 4 + 4 + 4 + 4 + b),
                transient_bytes=elements * (8 + b),
                launches=6,
                source=f"{_LAYER}._dequantize",
                formula="to fp32 (1, 4), multiply (4, 4), cast (4, b)",
            ),
            reads_copy(attention, elements * b),
        )


def _fp8(point: Point) -> Point:
    return replace(point, kv_dtype="fp8")

"""KIVI: 2- or 4-bit KV cache, keys per channel and values per token, a 16-bit residual.

Liu et al., arXiv 2402.02750; code jy-yuan/KIVI. Prefill attends exactly, then quantises: keys in
whole blocks of R tokens (T - T mod R of them), values all but the last R. Decode appends in 16
bits; a full block of R keys is quantised at once (a sawtooth of 0..R-1), of the values always the
oldest. The new token is attended in 16 bits.

State per layer, e = bits/8 + 2 scale_bytes / group bytes per quantised element:
    B K [ Nk Hk e + Rk Hk b  +  Nv Hv e + Rv Hv b ],   Rk = T mod R, Rv = min(T, R), N = T - R
A window W keeps whole key blocks: the fewest that still cover min(T, W) tokens.

``ideal`` reads the packed state once in one fused kernel, which also packs the oldest tokens.
``reference`` is the upstream chain: codes, scales and zeros repeated to all query heads (GQA), made
contiguous before each kernel, packed values re-concatenated every step, scores materialised.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import Architecture, MixerGroup
from costmodel.errors import ConfigError
from costmodel.fused_kernels import fused_step
from costmodel.methods.base import (
    AbstractMethod,
    Stage,
    State,
    attention_of,
    check_at_least,
    layer_bytes,
    not_stored,
)
from costmodel.methods.chains import attend_packed, elementwise, of_elements, reads_copy
from costmodel.methods.eager import softmax_chain_bytes
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Array, Operations
from costmodel.workload import Point

_ATTENTION = "jy-yuan/KIVI models/mistral_kivi.py"
_MATMUL = "jy-yuan/KIVI quant/matmul.py cuda_bmm_fA_qB_outer"
_PACK = "jy-yuan/KIVI quant/new_pack.py triton_quantize_and_pack_along_last_dim"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Kivi(AbstractMethod):
    """KIVI with its paper's defaults."""

    NAME: ClassVar[str] = "kivi"
    TITLE: ClassVar[str] = "KIVI: 2/4-bit KV cache with a 16-bit residual"
    REFERENCE: ClassVar[str] = "Liu et al., arXiv 2402.02750; github.com/jy-yuan/KIVI"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"store"})
    ACTS: ClassVar[str] = "after prefill, layer by layer, and on every decoded token"
    STORES: ClassVar[str] = "int{bits}"
    DOES_NOT_SAVE: ClassVar[str] = (
        "prefill compute or the prefill peak: the prompt is attended exactly, then quantised."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = ("KIVI repository (CUDA)", "LMDeploy (KV int4, close)")
    PARAMETERS: ClassVar[dict[str, str]] = {
        "bits": "bits per stored element, 2 or 4; fewer is smaller",
        "group": "elements that share a scale and a zero point; larger is smaller",
        "residual_tokens": "latest tokens kept in 16 bits; more is larger and more exact",
    }
    STATE_FORMULA: ClassVar[str] = (
        "B K [Nk Hk e + Rk Hk b + Nv Hv e + Rv Hv b], e = bits/8 + 2 b/group, "
        "Rk = T mod R, Rv = min(T, R), N = T - R"
    )

    bits: int = 2
    group: int = 32
    residual_tokens: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise ConfigError(f"kivi: expected bits of 2 or 4, got {self.bits}")
        check_at_least("kivi", 1, group=self.group, residual_tokens=self.residual_tokens)
        per_word = 32 // self.bits
        for unit, what in ((self.group, f"group ({self.group})"), (per_word, f"{per_word}")):
            if self.residual_tokens % unit:
                raise ConfigError(
                    f"kivi: expected residual_tokens to be a multiple of {what}, "
                    f"got {self.residual_tokens}"
                )

    def refusal(self, architecture: Architecture) -> str | None:
        """Also refuses head sizes that do not divide into groups and 32-bit words."""
        for mixer in (g.mixer for g in architecture.mixer_groups):
            if isinstance(mixer, Attention) and self.covers(mixer):
                for unit in (self.group, 32 // self.bits):
                    if mixer.v_head_dim % unit:
                        return (
                            f"kivi packs values in groups of {unit} along the head, and "
                            f"{architecture.name} has heads of {mixer.v_head_dim}"
                        )
        # super() does not see through the class that slots=True makes
        return AbstractMethod.refusal(self, architecture)

    @property
    def _has_kernel(self) -> bool:
        """Whether our kernel's tiles hold such blocks and groups: powers of two from 16 on."""
        return all(n >= 16 and not n & (n - 1) for n in (self.residual_tokens, self.group))

    def element_bytes(self, point: Point) -> float:
        """Bytes of a quantised element with its share of scale and zero point."""
        return self.bits / 8 + 2 * point.element_bytes / self.group

    def counts(self, mixer: Attention, tokens: Array) -> tuple[Array, Array, Array, Array]:
        """(quantised keys, residual keys, quantised values, residual values) in tokens."""
        t = np.asarray(tokens, dtype=np.float64)
        r = float(self.residual_tokens)
        rk = t - r * np.floor(t / r)  # exact for whole numbers, and faster than a remainder
        if np.isinf(mixer.limit_tokens):
            rv = np.minimum(t, r)
            return t - rk, rk, t - rv, rv
        held = np.minimum(t, mixer.limit_tokens)
        nk = np.minimum(t - rk, np.ceil(np.maximum(held - rk, 0.0) / r) * r)
        rv = np.minimum(held, r)
        return nk, rk, held - rv, rv

    def packed_bytes(self, mixer: Attention, point: Point) -> tuple[Array, Array, Array]:
        """(packed keys, packed values, 16-bit residual) of one layer, whole batch."""
        return self._bytes(mixer, point, self.counts(mixer, point.cached_tokens))

    def _room(self, mixer: Attention, tokens: Array) -> tuple[Array, Array, Array, Array]:
        """``counts`` that a cache makes room for: both residuals at their fullest."""
        t, r = np.asarray(tokens, dtype=np.float64), float(self.residual_tokens)
        blocks = np.minimum(np.floor(t / r), np.ceil(mixer.limit_tokens / r) + 1)
        held = np.minimum(t, mixer.limit_tokens)
        ring = np.minimum(r, mixer.limit_tokens)
        packed_values = np.maximum(held - ring, 0.0)
        return blocks * r, np.minimum(t, r), packed_values, np.minimum(t, ring)

    def _bytes(
        self, mixer: Attention, point: Point, counts: tuple[Array, Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        nk, rk, nv, rv = counts
        b = point.kv_element_bytes
        hk, hv = mixer.head_dim, mixer.v_head_dim
        heads = point.batch * mixer.n_kv_heads

        def packed(elements: Array) -> Array:
            # whole groups: exact also where a group is no power of two
            return elements * (self.bits / 8) + elements / self.group * (2 * point.element_bytes)

        residual = rk * (hk * b) + rv * (hv * b)
        return packed(heads * nk * hk), packed(heads * nv * hv), heads * residual

    def state(self, group: MixerGroup, point: Point) -> State:
        """Exact packed bytes; preallocated, with room for both residuals at their fullest."""
        mixer = attention_of(group)
        keys, values, residual = self.packed_bytes(mixer, point)
        size = keys + values + residual
        if point.engine.kv_growth != "preallocated" or point.level == "reference":
            return State(group.n_layers * size)
        room = sum(self._bytes(mixer, point, self._room(mixer, point.reserved_tokens)))
        return State(group.n_layers * size, allocated=group.n_layers * np.maximum(size, room))

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Exact; the 16-bit K and V of the prompt live for one layer only."""
        return not_stored(attention, point)

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Quantise and pack K, then V.

        Upstream, b-byte passes over an element: contiguous copy (read and write), min and max (one
        read), subtract, divide, clamp, round (read and write each), cast to int32 (read b, write
        4), pack (read 4).
        """
        mixer = attention_of(group)
        at_end = point.at(point.prompt_tokens)
        keys, values, residual = self.packed_bytes(mixer, at_end)
        nk, _, nv, _ = self.counts(mixer, point.prompt_tokens)
        heads = point.batch * mixer.n_kv_heads
        elements = heads * (nk * mixer.head_dim + nv * mixer.v_head_dim)
        largest = heads * np.maximum(nk * mixer.head_dim, nv * mixer.v_head_dim)
        b = point.element_bytes
        reference = point.level == "reference"
        quantise = elementwise(
            "quantise",
            vector_flops=6 * elements,
            state_bytes=keys + values + residual,
            workspace_bytes=elements * (12 * b + 8) if reference else 0.0,
            activation_bytes=0.0 if reference else elements * b,
            transient_bytes=layer_bytes(mixer, point, point.prompt_tokens)
            + (largest * (2 * b + 4) if reference else 0.0),
            launches=20 if reference else 1,
            source=_PACK if reference else "",
            formula="(12 b + 8) bytes per element" if reference else "K and V packed once",
        )
        return (of_elements(quantise, point, elements, self.bits),)

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Attention over packed and residual tokens; the flush every R steps at 1/R of its cost."""
        mixer = attention_of(group)
        keys, values, residual = self.packed_bytes(mixer, point)
        nk, rk, nv, rv = self.counts(mixer, point.cached_tokens)
        heads = point.batch * mixer.n_kv_heads
        ratio = mixer.n_heads / mixer.n_kv_heads
        dequantised = heads * (nk * mixer.head_dim + nv * mixer.v_head_dim)
        reference = point.level == "reference"
        packed = keys + values
        attention = decode_attention(
            mixer,
            point,
            read_tokens=np.minimum(point.cached_tokens, mixer.limit_tokens),
            executed_tokens=(nk + rk + nv + rv) / 2 + 1,
            read_bytes=packed + residual,
            written_bytes=layer_bytes(mixer, point, 1.0),
            vector_flops=2 * dequantised * (ratio if reference else 1.0),
            launches=4 if reference else 1,
            source=_MATMUL if reference else "",
            formula="packed and residual state read once",
        )
        new = heads * (mixer.head_dim + mixer.v_head_dim)
        b, e = point.kv_element_bytes, self.element_bytes(point)
        flush = elementwise(
            "quantise_append",
            vector_flops=6 * new,
            state_bytes=new * (b + e),
            workspace_bytes=new * (12 * b + 8) if reference else 0.0,
            launches=20 * (1 + 1 / self.residual_tokens) if reference else 0,
            source=_PACK if reference else "",
            formula="one value token a step and R key tokens every R steps: b read, e written",
        )
        flush = of_elements(flush, point, new, self.bits)
        if not reference:
            attend = attend_packed(
                point, attention, packed=packed, elements=dequantised, bits=self.bits
            )
            if mixer.max_kv_tokens() is None and self._has_kernel:
                shape = {**attend[0].shape, "residual_tokens": float(self.residual_tokens)}
                attend = (replace(attend[0], shape=shape), *attend[1:])
                return fused_step(point, f"kivi{self.bits}", *attend, flush)
            return (*attend, flush)
        return (
            *self._reference_copies(mixer, point, packed, ratio),
            *self._reference_unpacking(point, packed * ratio, dequantised * ratio),
            reads_copy(attention, packed * ratio, repeated=ratio > 1),
            *self._reference_rest(mixer, point, keys, values, residual),
            flush,
        )

    def _reference_copies(
        self, mixer: Attention, point: Point, packed: Array, ratio: float
    ) -> Operations:
        """What happens to the packed state before a kernel reads it."""
        copy = elementwise(
            "make_packed_contiguous",
            workspace_bytes=packed * (1.0 if ratio == 1 else 2 * ratio),
            transient_bytes=packed * ratio,
            launches=6,
            source=f"{_MATMUL} .transpose(1, 2).contiguous() of codes, scales, zeros",
            formula="G times the packed state, read and written",
        )
        if ratio == 1:
            return (copy,)
        repeat = elementwise(
            "repeat_packed",
            workspace_bytes=packed * ratio,
            transient_bytes=2 * packed * ratio,
            launches=6,
            source=f"{_ATTENTION} repeat_kv_quant of codes, scales and zeros",
            formula="G times the packed state written",
        )
        return repeat, copy

    def _reference_unpacking(self, point: Point, packed: Array, elements: Array) -> Operations:
        """What plain torch does in the place of upstream's kernels: keys and values of all query
        heads unpacked whole, both alive until the step is attended.
        """
        if point.engine.fused_dequantise:
            return ()
        b = point.element_bytes
        unpack = elementwise(
            "dequantise",
            vector_flops=2 * elements,
            workspace_bytes=packed + 2 * elements * b,
            # the values' codes as 32-bit indices
            transient_bytes=packed + elements * (b + self.bits / 4),
            launches=16,
            source="measure/methods/kivi.py",
            formula="G times the packed state read, as many elements of b bytes written and read",
        )
        return (of_elements(unpack, point, elements, self.bits),)

    def _reference_rest(
        self, mixer: Attention, point: Point, keys: Array, values: Array, residual: Array
    ) -> Operations:
        """Concatenations and materialised scores."""
        held = np.minimum(point.cached_tokens, mixer.limit_tokens)
        scores = point.batch * mixer.n_heads * (held + 1)
        b = point.element_bytes
        return (
            elementwise(
                "cache_cat",
                workspace_bytes=2 * values + 2 * keys / self.residual_tokens,
                transient_bytes=values,
                launches=3 * (1 + 1 / self.residual_tokens),
                source=f"{_ATTENTION} torch.cat of codes, scales and zeros",
                formula="packed values read and written every step, packed keys every R steps",
            ),
            elementwise(
                "residual_cat",
                workspace_bytes=2 * residual,
                transient_bytes=residual,
                launches=3,
                source=f"{_ATTENTION} torch.cat of key_states_full, value_states_full",
                formula="the 16-bit residual read and written",
            ),
            elementwise(
                "scores_softmax",
                vector_flops=6 * scores,
                workspace_bytes=scores * (softmax_chain_bytes(b) + 4 * b),
                transient_bytes=scores * (2 * b + 4),
                launches=6,
                source=f"{_ATTENTION} torch.cat of scores, softmax in float32",
                formula="B N T (10 b + 8): cat, scale, mask, softmax, cast, and the kernels' ends",
            ),
        )

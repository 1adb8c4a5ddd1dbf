"""KIVI: 2- or 4-bit KV cache, keys per channel and values per token, a 16-bit residual.

Liu et al., arXiv 2402.02750; code jy-yuan/KIVI (``quant/new_pack.py``, ``quant/matmul.py``,
``models/llama_kivi.py``). Prefill attends exactly, then quantises: keys in whole blocks of R tokens
(T - T mod R of them), values all but the last R. Decode appends in 16 bits; a full block of R keys
is quantised at once (a sawtooth of 0..R-1), of the values always the oldest one.

State per layer, e = bits/8 + 2 * scale_bytes / group bytes per quantised element:
    B K [ Nk Hk e + Rk Hk b  +  Nv Hv e + Rv Hv b ],   Rk = T mod R, Rv = min(T, R), N = T - R
A window W keeps whole key blocks: the fewest that still cover min(T, W) tokens.

``ideal`` reads the packed state once in one fused kernel. ``reference`` is the upstream chain:
scales, zeros and codes repeated to all query heads (GQA) and made contiguous before each kernel,
packed values and their scales re-concatenated every step, scores materialised.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.errors import ConfigError
from costmodel.methods.base import AbstractMethod, Stage, State, attention_of, not_stored
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Point


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Kivi(AbstractMethod):
    """KIVI with its paper's defaults."""

    NAME: ClassVar[str] = "kivi"
    TITLE: ClassVar[str] = "KIVI: 2/4-bit KV cache with a 16-bit residual"
    REFERENCE: ClassVar[str] = "arXiv 2402.02750; github.com/jy-yuan/KIVI"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"store"})
    ACTS: ClassVar[str] = "after prefill, layer by layer, and on every decoded token"
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
            raise ConfigError(f"kivi: bits must be 2 or 4, got {self.bits}")
        if self.group < 1 or self.residual_tokens < 1 or self.residual_tokens % self.group:
            raise ConfigError(
                f"kivi: residual_tokens ({self.residual_tokens}) must be a multiple of group "
                f"({self.group})"
            )

    def counts(self, mixer: Attention, tokens: Array) -> tuple[Array, Array, Array, Array]:
        """(quantised keys, residual keys, quantised values, residual values) in tokens."""
        t = np.asarray(tokens, dtype=np.float64)
        r = float(self.residual_tokens)
        held = np.minimum(t, mixer.limit_tokens)
        rk = np.mod(t, r)
        nk = np.minimum(t - rk, np.ceil(np.maximum(held - rk, 0.0) / r) * r)
        rv = np.minimum(held, r)
        return nk, rk, held - rv, rv

    def packed_bytes(self, mixer: Attention, point: Point) -> tuple[Array, Array]:
        """(packed codes with scales and zeros, 16-bit residual) of one layer, whole batch."""
        nk, rk, nv, rv = self.counts(mixer, point.cached_tokens)
        b = point.kv_element_bytes
        e = self.bits / 8 + 2 * b / self.group
        hk, hv = mixer.head_dim, mixer.v_head_dim
        heads = point.batch * mixer.n_kv_heads
        return heads * (nk * hk + nv * hv) * e, heads * (rk * hk + rv * hv) * b

    def state(self, group: MixerGroup, point: Point) -> State:
        """Exact packed bytes."""
        mixer = attention_of(group)
        packed, residual = self.packed_bytes(mixer, point)
        return State(group.n_layers * (packed + residual))

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Exact; the 16-bit K and V of the prompt live for one layer only."""
        return not_stored(attention, point)

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Quantise and pack one of K and V at a time."""
        mixer = attention_of(group)
        at_end = point.at(point.prompt_tokens)
        packed, residual = self.packed_bytes(mixer, at_end)
        elements = point.batch * point.prompt_tokens * mixer.kv_elements_per_token()
        b = point.kv_element_bytes
        quantise = Operation(
            name="quantise",
            kind="elementwise",
            vector_flops=6 * elements,
            state_bytes=packed + residual,
            # upstream: transposed copy, (x - min) copy, int32 codes
            workspace_bytes=elements * (b if point.level == "ideal" else 26.0),
            transient_bytes=elements * (b if point.level == "ideal" else 12.0),
            launches=1 if point.level == "ideal" else 24,
            dtype=point.dtype,
            shape={"elements": elements, "bits": float(self.bits)},
            source="" if point.level == "ideal" else "jy-yuan/KIVI quant/new_pack.py",
            formula="read K and V once, write e bytes per element",
        )
        return (quantise,)

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Attention over packed and residual tokens; the flush every R steps at 1/R of its cost."""
        mixer = attention_of(group)
        packed, residual = self.packed_bytes(mixer, point)
        nk, rk, nv, rv = self.counts(mixer, point.cached_tokens)
        b = point.kv_element_bytes
        heads = point.batch * mixer.n_kv_heads
        new_token = heads * (mixer.head_dim + mixer.v_head_dim) * b
        dequantised = heads * (nk * mixer.head_dim + nv * mixer.v_head_dim)
        ratio = mixer.n_heads / mixer.n_kv_heads
        held = np.minimum(point.cached_tokens, mixer.limit_tokens)
        reference = point.level == "reference"
        if not (reference or point.engine.fused_dequantise):
            return self._unfused_decode(mixer, point)
        attention = decode_attention(
            mixer,
            point,
            read_tokens=held,
            executed_tokens=(nk + rk + nv + rv) / 2 + 1,
            read_bytes=packed + residual,
            written_bytes=new_token,
            vector_flops=2 * dequantised * (ratio if reference else 1.0),
            launches=4 if reference else 1,
            source="jy-yuan/KIVI quant/matmul.py cuda_bmm_fA_qB_outer" if reference else "",
            formula="packed and residual state read once",
        )
        flush = self._quantise_append(mixer, point, launches=2 if reference else 1)
        if not reference:
            return attention, flush
        # MHA: transpose().contiguous() of codes, scales and zeros (read and write);
        # GQA: first repeat them to all query heads (read 1, write G), then copy (2 G), then read G.
        extra = 2.0 * packed if ratio == 1 else (4.0 * ratio) * packed
        repeat = Operation(
            name="repeat_and_copy_packed",
            kind="elementwise",
            workspace_bytes=extra,
            transient_bytes=2 * ratio * packed,
            launches=12,
            source="jy-yuan/KIVI quant/matmul.py repeat_kv_quant, .transpose().contiguous()",
            formula="packed * 4 G (GQA) or packed * 2 (MHA)",
        )
        v_packed = heads * nv * mixer.v_head_dim * (self.bits / 8 + 2 * b / self.group)
        cat = Operation(
            name="cache_cat",
            kind="elementwise",
            workspace_bytes=2 * v_packed,
            transient_bytes=v_packed,
            launches=3,
            source="jy-yuan/KIVI models/llama_kivi.py torch.cat of value codes, scales, zeros",
            formula="read and write the packed values every step",
        )
        scores = Operation(
            name="scores",
            kind="elementwise",
            workspace_bytes=point.batch * mixer.n_heads * held * (2 + 4) * 2,
            transient_bytes=point.batch * mixer.n_heads * held * 6,
            launches=4,
            source="jy-yuan/KIVI models/llama_kivi.py softmax in float32",
            formula="B N T (2 + 4) bytes written and read",
        )
        return attention, repeat, cat, scores, flush

    def _quantise_append(self, mixer: Attention, point: Point, *, launches: float) -> Operation:
        """Quantise what leaves the residual: on average one token per step."""
        elements = point.batch * (mixer.n_kv_heads * (mixer.head_dim + mixer.v_head_dim))
        return Operation(
            name="quantise_append",
            kind="elementwise",
            vector_flops=6 * elements,
            state_bytes=elements * (point.kv_element_bytes + self.bits / 8),
            launches=launches,
            dtype=point.dtype,
            shape={"elements": elements, "bits": float(self.bits)},
            formula="one value token per step, a block of R key tokens every R steps",
        )

    def _unfused_decode(self, mixer: Attention, point: Point) -> Operations:
        """Without a fused kernel: unpack to the compute type, then attend copy and residual.

        The copy is written and read once; it is made piece by piece, so it is never alive whole.
        """
        packed, residual = self.packed_bytes(mixer, point)
        nk, rk, nv, rv = self.counts(mixer, point.cached_tokens)
        heads = point.batch * mixer.n_kv_heads
        elements = heads * (nk * mixer.head_dim + nv * mixer.v_head_dim)
        new_token = heads * (mixer.head_dim + mixer.v_head_dim) * point.kv_element_bytes
        dequantise = Operation(
            name="dequantise",
            kind="elementwise",
            vector_flops=2 * elements,
            state_bytes=packed,
            workspace_bytes=2 * elements * point.element_bytes,
            launches=10,
            dtype=point.dtype,
            shape={"elements": elements, "bits": float(self.bits)},
            formula="codes, scales and zeros read; a copy of b bytes per element written and read",
        )
        attention = decode_attention(
            mixer,
            point,
            name="dequantised_attention",
            read_tokens=np.minimum(point.cached_tokens, mixer.limit_tokens),
            executed_tokens=(nk + rk + nv + rv) / 2 + 1,
            read_bytes=residual,
            written_bytes=new_token,
            launches=8,
            formula="scores and weighted sum over the copy, and over the residual",
        )
        return dequantise, attention, self._quantise_append(mixer, point, launches=16)

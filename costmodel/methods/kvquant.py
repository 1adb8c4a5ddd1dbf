"""KVQuant: non-uniform quantisation, keys per channel before rotation, with sparse outliers.

Hooper et al., arXiv 2401.18079; code SqueezeAILab/KVQuant (``deployment``). Keys use a calibrated
table of 2^bits values per channel, values a table per token. Per token and tensor the
2 (floor(f/2 d) + 1) most extreme of its d = K H elements are stored exactly: 42 of 4096 at 1 %.

Bytes per layer and sequence, d_k = K Hk, d_v = K Hv, o = number of outliers:
    T [K ceil(Hk bits/32) 4 + K ceil(Hv bits/32) 4 + (o_k + o_v) (value + index) + table]
      ideal      outlier b + 2 bytes, table as scale and offset (2 b)
      reference  outlier 4 + 4 bytes, table of 2^bits fp32 (3776 bytes a token: Llama-7B, 3 bits)
and once per layer the keys' tables: d_k 2^bits b (ideal) or d_k (2^bits + 3) 4 (reference:
thresholds and zero point as well). A window holds min(T, W) tokens.

``ideal`` reads the packed state once and rotates keys in the kernel. ``reference`` finds the
outliers of each new key on the host, and runs fp32 matrix-vector kernels (batch 1, no GQA
upstream).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.errors import ConfigError
from costmodel.methods.base import (
    AbstractMethod,
    Stage,
    State,
    attention_of,
    check_fraction,
    layer_bytes,
    not_stored,
)
from costmodel.methods.chains import attend_packed, elementwise, host_link, reads_copy, select
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Point

_MODEL = "SqueezeAILab/KVQuant deployment/transformers models/llama/modeling_llama.py"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KvQuant(AbstractMethod):
    """nuqX with 1 % outliers."""

    NAME: ClassVar[str] = "kvquant"
    TITLE: ClassVar[str] = "KVQuant: non-uniform 2/3/4-bit cache with sparse outliers"
    REFERENCE: ClassVar[str] = "Hooper et al., arXiv 2401.18079; github.com/SqueezeAILab/KVQuant"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"store"})
    ACTS: ClassVar[str] = "after prefill, layer by layer, and on every decoded token"
    STORES: ClassVar[str] = "int{bits}"
    DOES_NOT_SAVE: ClassVar[str] = (
        "prefill compute; it needs a calibration, and its outliers cost about a fifth of the cache."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = ("KVQuant repository (CUDA, batch 1, no GQA)",)
    PARAMETERS: ClassVar[dict[str, str]] = {
        "bits": "bits per dense element, 2, 3 or 4; fewer is smaller",
        "outlier_fraction": "share of elements stored exactly; less is smaller",
    }
    STATE_FORMULA: ClassVar[str] = (
        "B T [K (Hk + Hv) bits/8 + outliers (value + index) + table] + K Hk 2^bits b"
    )

    bits: int = 3
    outlier_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise ConfigError(f"kvquant: expected bits of 2, 3 or 4, got {self.bits}")
        check_fraction("kvquant", outlier_fraction=self.outlier_fraction)

    def outliers_of(self, elements: int) -> int:
        """Of ``elements`` of one token's keys or values, those stored exactly."""
        if self.outlier_fraction == 0:
            return 0
        return min(2 * (int(self.outlier_fraction / 2 * elements) + 1), elements)

    def outliers(self, mixer: Attention) -> int:
        """Elements of one token stored exactly, K and V together."""
        sizes = (mixer.head_dim, mixer.v_head_dim)
        return sum(self.outliers_of(mixer.n_kv_heads * size) for size in sizes)

    def token_bytes(self, mixer: Attention, point: Point) -> float:
        """Bytes of one token in one layer."""
        words = -(-mixer.head_dim * self.bits // 32) + -(-mixer.v_head_dim * self.bits // 32)
        if point.level == "reference":
            outlier, table = 8.0, 4.0 * (1 << self.bits)
        else:
            outlier, table = point.element_bytes + 2.0, 2 * point.element_bytes
        return mixer.n_kv_heads * words * 4.0 + self.outliers(mixer) * outlier + table

    def codebook_bytes(self, mixer: Attention, point: Point) -> float:
        """The keys' tables of one layer, shared by the batch."""
        channels = mixer.n_kv_heads * mixer.head_dim
        if point.level == "reference":
            return channels * ((1 << self.bits) + 3) * 4.0
        return channels * (1 << self.bits) * point.element_bytes

    def state(self, group: MixerGroup, point: Point) -> State:
        """Codes, outliers and tables."""
        mixer = attention_of(group)
        tokens = point.batch * mixer.held_tokens(point) * self.token_bytes(mixer, point)
        return State(group.n_layers * (tokens + self.codebook_bytes(mixer, point)))

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Exact; the 16-bit K and V of the prompt live for one layer only."""
        return not_stored(attention, point)

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Find the outliers, look every element up, pack."""
        mixer = attention_of(group)
        tokens = np.minimum(point.prompt_tokens, mixer.limit_tokens)
        elements = point.batch * tokens * mixer.kv_elements_per_token()
        b = point.element_bytes
        reference = point.level == "reference"
        source = f"{_MODEL} QuantK.parallel_pack" if reference else ""
        return (
            select(
                "find_outliers",
                rows=2 * point.batch * tokens,
                length=float(mixer.n_kv_heads * mixer.head_dim),
                keep=self.outliers(mixer) / 2,
                workspace_bytes=elements * (8 + 16) if reference else 0.0,
                transient_bytes=elements * 8 if reference else 0.0,
                launches=8 if reference else 1,
                source=source,
                formula="two top-k passes (4 each) over transposed fp32 copies (8, 8)",
            ),
            elementwise(
                "quantise_codebook",
                vector_flops=(2 + (1 << self.bits)) * elements,
                state_bytes=point.batch * tokens * self.token_bytes(mixer, point),
                workspace_bytes=elements * (b + 4 + 8 + 8) if reference else 0.0,
                activation_bytes=0.0 if reference else elements * b,
                transient_bytes=layer_bytes(mixer, point, point.prompt_tokens)
                + (elements * 8 if reference else 0.0),
                launches=8 if reference else 1,
                source=source,
                formula="to fp32 (b, 4), clone (4, 4), nearest of 2^bits values (4, 4), pack",
            ),
        )

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Attention over the packed state; the new token packed."""
        mixer = attention_of(group)
        held = np.minimum(point.cached_tokens, mixer.limit_tokens)
        elements = point.batch * held * mixer.kv_elements_per_token()
        new = point.batch * mixer.kv_elements_per_token()
        token = self.token_bytes(mixer, point)
        packed = point.batch * held * token + self.codebook_bytes(mixer, point)
        reference = point.level == "reference"
        scores = point.batch * mixer.n_heads * (held + 1)
        attention = decode_attention(
            mixer,
            point,
            read_tokens=held,
            executed_tokens=np.minimum(point.cached_tokens + 1, mixer.limit_tokens),
            read_bytes=packed,
            written_bytes=point.batch * token,
            # a table look-up per element, and the rotation of the keys
            vector_flops=elements + 1.5 * elements,
            workspace_bytes=scores * 8.0 if reference else 0.0,
            launches=6 if reference else 1,
            source=f"{_MODEL} QuantK, QuantV.forward_fused_sparse" if reference else "",
            formula="packed state and tables read once",
        )
        if not reference:
            return attend_packed(
                point,
                attention,
                packed=packed,
                elements=elements,
                bits=self.bits,
                name="dequantise_codebook",
                # codes and indices of 32 and 64 bits beside the copy
                piece_bytes=16.0 + 2 * point.element_bytes,
            )
        return (
            *self._reference_append(mixer, point, new),
            *self._reference_attention(point, attention, elements),
            elementwise(
                "softmax",
                vector_flops=6 * scores,
                workspace_bytes=scores * (8 * point.element_bytes + 16),
                transient_bytes=scores * 8,
                launches=7,
                source=_MODEL,
                formula="fp32 scores transposed and halved, scale, mask, softmax in fp32, cast",
            ),
        )

    @staticmethod
    def _reference_attention(point: Point, attention: Operation, elements: Array) -> Operations:
        """The published kernels, or what plain torch does in their place: an fp32 copy of keys and
        values, keys turned.
        """
        if point.engine.fused_dequantise:
            return (attention,)
        copy = elementwise(
            "dequantise_codebook",
            vector_flops=2.5 * elements,
            state_bytes=attention.state_bytes,
            workspace_bytes=elements * (4 + 4 * 4),
            # codes, keys before and after turning, values
            transient_bytes=elements / 2 * (1 + 4 + 4 + 4),
            launches=20,
            source="measure/methods/kvquant.py",
            formula="packed state read; fp32 copies written, keys turned and joined",
        )
        return copy, reads_copy(replace(attention, state_bytes=0.0), 4 * elements)

    def _reference_append(self, mixer: Attention, point: Point, new: Array) -> Operations:
        source = f"{_MODEL} QuantK.forward_fused_sparse"
        return (
            elementwise(
                "quantise_new",
                vector_flops=(2 + (1 << self.bits)) * new,
                workspace_bytes=new * (point.element_bytes + 4 + 8 + 8),
                launches=20,
                source=source,
                formula="one token: to fp32, clone, append kernel, outliers gathered and sorted",
            ),
            host_link(
                "outliers_on_host",
                point.batch
                * (4.0 * mixer.n_kv_heads * mixer.head_dim + 12.0 * self.outliers(mixer) / 2),
                pinned=False,
                messages=3.0,
                source=f"{source} outliers_rescaled.cpu(), torch.topk",
                formula="the new key in fp32 to the host; values and indices of its outliers back",
            ),
        )

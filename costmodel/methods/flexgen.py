"""FlexGen: group-wise 4-bit quantisation of K and V, every token as it is produced.

Sheng et al., arXiv 2303.06865; code FMInference/FlexLLMGen. Asymmetric min/max groups of g elements
along the head of one token, for keys and values alike; no 16-bit residual. Heads are padded to
whole groups. Prefill attends exactly, then compresses; a step attends its new token in 16 bits.

State per layer, e = bits/8 + 2 scale_bytes / group:
    B min(T, W) K [ceil(Hk/g) g + ceil(Hv/g) g] e

``ideal`` reads the packed state once. ``reference`` decompresses the whole layer into a workspace,
permutes it into a copy, attends and compresses the new token; room is made for all tokens at once.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
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
from costmodel.methods.chains import attend_packed, elementwise, reads_copy
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Array, Operations
from costmodel.workload import Point

_COMPRESS = "FMInference/FlexLLMGen flexllmgen/compression.py compress"
_DECOMPRESS = "FMInference/FlexLLMGen flexllmgen/compression.py decompress"
_MHA_GEN = "FMInference/FlexLLMGen flexllmgen/pytorch_backend.py mha_gen"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FlexGen(AbstractMethod):
    """FlexGen's cache compression; the group of 64 is upstream's, the benchmark uses 32."""

    NAME: ClassVar[str] = "flexgen"
    TITLE: ClassVar[str] = "FlexGen: group-wise 4-bit KV cache"
    REFERENCE: ClassVar[str] = "Sheng et al., arXiv 2303.06865; github.com/FMInference/FlexLLMGen"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"store"})
    ACTS: ClassVar[str] = "after prefill, layer by layer, and on every decoded token"
    STORES: ClassVar[str] = "int{bits}"
    DOES_NOT_SAVE: ClassVar[str] = (
        "prefill compute; in its own implementation not the bytes of a decode step either: the "
        "whole layer is decompressed before it is attended."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = ("FlexLLMGen (4 bits, OPT)",)
    PARAMETERS: ClassVar[dict[str, str]] = {
        "bits": "bits per stored element, 2, 4 or 8 (upstream 4); fewer is smaller",
        "group": "elements that share a scale and a minimum; larger is smaller",
    }
    STATE_FORMULA: ClassVar[str] = "B min(T, W) K 2 ceil(H/g) g e, e = bits/8 + 2 b/g"

    bits: int = 4
    group: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ConfigError(f"flexgen: expected bits of 2, 4 or 8, got {self.bits}")
        check_at_least("flexgen", 1, group=self.group)
        if self.group % (8 // self.bits):
            raise ConfigError(
                f"flexgen: expected a group that fills whole bytes (a multiple of "
                f"{8 // self.bits} at {self.bits} bits), got {self.group}"
            )

    def padded(self, mixer: Attention) -> int:
        """Stored elements of one token in one KV head: K and V, each padded to whole groups."""
        g = self.group
        return (-(-mixer.head_dim // g) + -(-mixer.v_head_dim // g)) * g

    def packed_bytes(self, mixer: Attention, point: Point, tokens: Array) -> Array:
        """Codes, scales and minima of ``tokens`` tokens in one layer, whole batch."""
        elements = self.padded(mixer)
        # scales from their own count: a group that is no power of two leaves no rounding behind
        scales = elements // self.group * 2 * point.element_bytes
        return point.batch * tokens * (mixer.n_kv_heads * (elements * self.bits / 8 + scales))

    def state(self, group: MixerGroup, point: Point) -> State:
        """Packed bytes of every cached token."""
        mixer = attention_of(group)
        size = self.packed_bytes(mixer, point, mixer.held_tokens(point))
        allocated = None
        if point.level == "reference":
            room = np.minimum(point.reserved_tokens - 1, mixer.limit_tokens)
            allocated = group.n_layers * np.maximum(size, self.packed_bytes(mixer, point, room))
        return State(group.n_layers * size, allocated=allocated)

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Exact; the 16-bit K and V of the prompt live for one layer only."""
        return not_stored(attention, point)

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Compress K, then V: min, max, subtract, scale, clamp and round, cast, pack nibbles."""
        mixer = attention_of(group)
        tokens = np.minimum(point.prompt_tokens, mixer.limit_tokens)
        elements = point.batch * tokens * (mixer.n_kv_heads * self.padded(mixer))
        b = point.element_bytes
        reference = point.level == "reference"
        return (
            elementwise(
                "compress",
                vector_flops=6 * elements,
                state_bytes=self.packed_bytes(mixer, point, tokens),
                workspace_bytes=elements * (9 * b + 4) if reference else 0.0,
                activation_bytes=0.0 if reference else elements * b,
                transient_bytes=layer_bytes(mixer, point, point.prompt_tokens)
                + (elements * (b + 2) if reference else 0.0),
                launches=20 if reference else 1,
                source=_COMPRESS if reference else "",
                formula="min (b), max (b), subtract, multiply, clamp_.round_ (b, b each), "
                "cast (b, 1), shift and pack (2, 1)"
                if reference
                else "K and V packed once",
            ),
        )

    def _has_kernel(self, mixer: Attention) -> bool:
        """Whether our kernel reads these groups: powers of two in whole words that fill a head."""
        size, group = mixer.head_dim, self.group
        whole = size % group == 0 and group * self.bits % 16 == 0 and size * self.bits >= 256
        unbounded = mixer.max_kv_tokens() is None
        return self.bits < 8 and unbounded and whole and group & (group - 1) == 0

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Attention over packed tokens; the new token is packed after use."""
        mixer = attention_of(group)
        held = np.minimum(point.cached_tokens, mixer.limit_tokens)
        b = point.element_bytes
        packed = self.packed_bytes(mixer, point, held)
        new = self.packed_bytes(mixer, point, 1.0)
        elements = point.batch * held * (mixer.n_kv_heads * self.padded(mixer))
        ratio = mixer.n_heads / mixer.n_kv_heads
        reference = point.level == "reference"
        executed = np.minimum(point.cached_tokens + 1, mixer.limit_tokens)
        attention = decode_attention(
            mixer,
            point,
            read_tokens=held,
            executed_tokens=executed,
            read_bytes=0.0 if reference else packed,
            written_bytes=0.0 if reference else new,
            vector_flops=0.0 if reference else 2 * elements,
            launches=2 if reference else 1,
            source=f"{_MHA_GEN} torch.bmm" if reference else "",
            formula="two bmm over the permuted copy" if reference else "packed state read once",
        )
        if not reference:
            attend = attend_packed(
                point,
                attention,
                packed=packed,
                elements=elements,
                bits=self.bits,
                name="dequantise_groups",
            )
            if self._has_kernel(mixer):
                return fused_step(point, f"flexgen{self.bits}", *attend)
            return attend
        attention = reads_copy(attention, elements * b * ratio, repeated=ratio > 1)
        scores = point.batch * mixer.n_heads * executed
        new_elements = point.batch * (mixer.n_kv_heads * self.padded(mixer))
        return (
            elementwise(
                "unpack",
                state_bytes=packed,
                workspace_bytes=elements * b,
                transient_bytes=elements * b,
                launches=6,
                source=_DECOMPRESS,
                formula="packed state read, b per element written",
            ),
            elementwise(
                "dequantise",
                vector_flops=2 * elements,
                workspace_bytes=elements * 4 * b,
                transient_bytes=elements * b,
                launches=4,
                source=_DECOMPRESS,
                formula="div_ (b, b) by the scale, add_ (b, b) of the minimum",
            ),
            elementwise(
                "permute_copy",
                workspace_bytes=elements * b * (1 + ratio),
                transient_bytes=elements * b * (1 + ratio),
                launches=2,
                source=f"{_MHA_GEN} permute().reshape()",
                formula="(b, b): tokens x heads to heads x tokens",
            ),
            attention,
            elementwise(
                "softmax",
                vector_flops=6 * scores,
                workspace_bytes=scores * (6 * b + 8),
                transient_bytes=scores * (2 * b + 4),
                launches=4,
                source=f"{_MHA_GEN} _attention_weights, softmax in float32",
                formula="B N T (6 b + 8)",
            ),
            elementwise(
                "compress_new",
                vector_flops=6 * new_elements,
                state_bytes=new,
                workspace_bytes=new_elements * (9 * b + 4),
                launches=20,
                source=_COMPRESS,
                formula="one token of K and V",
            ),
        )

"""GEAR: a quantised cache, a low-rank matrix for its error and the largest outliers exactly.

Kang et al., arXiv 2403.05527; code opengear-project/GEAR. Keys are quantised per channel and values
per token (KCVT) within a segment: the prompt, then every n_b decoded tokens, which wait in 16 bits.

Bytes per layer and sequence; per KV head and segment of n tokens, r the rank (2 for decoded ones):
    n (Hk + Hv) bits/8 + 2 b Hk + 2 b n + r b (2 n + Hk + Hv)
and per segment and tensor 2 floor(f n K H / 2) outliers of b + 4 bytes. Segments: S, then
floor((T - S) / n_b) of n_b; the other tokens in 16 bits.

``ideal`` reads this once; ``reference`` decompresses everything, puts the outliers back and adds
the product of the low-rank factors on every step.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.errors import ConfigError
from costmodel.methods.base import (
    AbstractMethod,
    Scope,
    Stage,
    State,
    attention_of,
    check_at_least,
    check_fraction,
    layer_bytes,
    not_stored,
)
from costmodel.methods.chains import attend_packed, elementwise, reads_copy, select
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Point

_CODE = "opengear-project/GEAR GEARLM/TrueCompression models/TrueCompressFunction.py"
_DECODED_RANK = 2.0
_INDEX_BYTES = 4.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Gear(AbstractMethod):
    """GEAR with its paper's settings."""

    NAME: ClassVar[str] = "gear"
    TITLE: ClassVar[str] = "GEAR: 2/4-bit cache, low-rank error, sparse outliers"
    REFERENCE: ClassVar[str] = "Kang et al., arXiv 2403.05527; github.com/opengear-project/GEAR"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"store"})
    ACTS: ClassVar[str] = "after prefill, layer by layer; again every buffer_tokens steps"
    STORES: ClassVar[str] = "int{bits}"
    SCOPE: ClassVar[Scope] = "unbounded"
    DOES_NOT_SAVE: ClassVar[str] = (
        "prefill compute, to which a power iteration and a sort of the whole cache are added."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = ("GEAR repository", "LMDeploy fork (rethink-kv)")
    PARAMETERS: ClassVar[dict[str, str]] = {
        "bits": "bits per element, 2, 4 or 8; fewer is smaller",
        "outlier_fraction": "share of elements stored exactly; less is smaller",
        "rank": "rank of the prompt's error; less is smaller",
        "buffer_tokens": "decoded tokens collected in 16 bits; more is larger and rarer work",
    }
    STATE_FORMULA: ClassVar[str] = (
        "B K [n (Hk + Hv) bits/8 + 2 b (Hk + n) + r b (2 n + Hk + Hv)] + outliers (b + 4)"
    )
    COST_ONLY: ClassVar[bool] = True

    bits: int = 4
    outlier_fraction: float = 0.02
    rank: int = 4
    buffer_tokens: int = 20

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ConfigError(f"gear: expected bits of 2, 4 or 8, got {self.bits}")
        check_fraction("gear", outlier_fraction=self.outlier_fraction)
        check_at_least("gear", 0, rank=self.rank)
        check_at_least("gear", 1, buffer_tokens=self.buffer_tokens)

    def segment_bytes(self, mixer: Attention, point: Point, n: Array, rank: float) -> Array:
        """Bytes of one segment of ``n`` tokens in one layer of one sequence."""
        b = point.element_bytes
        hk, hv, heads = mixer.head_dim, mixer.v_head_dim, mixer.n_kv_heads
        dense = n * (hk + hv) * self.bits / 8 + 2 * b * hk + 2 * b * n
        factors = rank * b * (2 * n + hk + hv)
        outliers = sum(2 * np.floor(self.outlier_fraction * n * (heads * h) / 2) for h in (hk, hv))
        return heads * (dense + factors) + outliers * (b + _INDEX_BYTES)

    def parts(self, mixer: Attention, point: Point) -> tuple[Array, Array]:
        """(compressed bytes of one layer for the whole batch, tokens in 16 bits)."""
        decoded = point.cached_tokens - point.prompt_tokens
        n_b = float(self.buffer_tokens)
        segments = np.floor(decoded / n_b)
        size = self.segment_bytes(mixer, point, point.prompt_tokens, float(self.rank))
        size = size + segments * self.segment_bytes(mixer, point, n_b, _DECODED_RANK)
        return point.batch * size, decoded - segments * n_b

    def state(self, group: MixerGroup, point: Point) -> State:
        """Codes, factors, outliers, buffer."""
        mixer = attention_of(group)
        compressed, buffered = self.parts(mixer, point)
        return State(group.n_layers * (compressed + layer_bytes(mixer, point, buffered)))

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Exact; the prompt's K and V live for one layer only."""
        return not_stored(attention, point)

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Outliers, quantisation, and three matmuls of the power iteration with its QR."""
        mixer = attention_of(group)
        compressed, _ = self.parts(mixer, point.at(point.prompt_tokens))
        elements = point.batch * point.prompt_tokens * mixer.kv_elements_per_token()
        b = point.element_bytes
        reference = point.level == "reference"
        source = _CODE if reference else ""
        return (
            select(
                "find_outliers",
                rows=2 * point.batch,
                length=elements / (2 * point.batch),
                keep=self.outlier_fraction * elements / (2 * point.batch),
                workspace_bytes=elements * 4 * b if reference else 0.0,
                launches=4,
                source=source,
                formula="two top-k passes over all elements of K and of V, zeros put in",
            ),
            elementwise(
                "quantise",
                vector_flops=8 * elements,
                state_bytes=compressed,
                workspace_bytes=elements * (14 * b + 2) if reference else 0.0,
                activation_bytes=0.0 if reference else elements * b,
                transient_bytes=elements * (b + (2 * b if reference else 0.0)),
                launches=24 if reference else 1,
                source=source,
                formula="the error is simulated, then min, max, scale, round, cast, pack",
            ),
            Operation(
                name="power_iteration",
                kind="gemm",
                executed_flops=elements * (2.0 * self.rank * 4),
                workspace_bytes=elements * (b + 4 + 4 * 4) if reference else 0.0,
                activation_bytes=0.0 if reference else elements * 4 * b,
                transient_bytes=elements * 4 if reference else 0.0,
                dtype="fp32",
                launches=16 if reference else 4,
                shape={
                    "m": elements / (mixer.head_dim * 2.0),
                    "n": float(max(self.rank, 1)),
                    "k": float(mixer.head_dim),
                },
                source=source,
                formula="two rounds of two products with r columns, in fp32",
            ),
        )

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Attention over the compressed segments and the buffer."""
        mixer = attention_of(group)
        compressed, buffered = self.parts(mixer, point)
        per_token = point.batch * mixer.kv_elements_per_token()
        b = point.element_bytes
        t = point.cached_tokens
        quantised = (t - buffered) * per_token
        reference = point.level == "reference"
        low_rank = quantised * (2.0 * self.rank)
        attention = decode_attention(
            mixer,
            point,
            read_tokens=t,
            executed_tokens=t + 1,
            read_bytes=0.0 if reference else compressed + buffered * per_token * b,
            written_bytes=per_token * b,
            vector_flops=0.0 if reference else 2 * quantised + low_rank / mixer.head_dim,
            source="eager attention over the decompressed copy" if reference else "",
            formula="compressed state and buffer read once",
        )
        if not reference:
            return attend_packed(
                point, attention, packed=compressed, elements=quantised, bits=self.bits
            )
        attention = reads_copy(attention, (t + 1) * per_token * b)
        return (
            elementwise(
                "decompress",
                vector_flops=2 * quantised,
                state_bytes=compressed,
                workspace_bytes=quantised * (3 + 7 * b),
                transient_bytes=quantised * 3 * b,
                launches=16,
                source=f"{_CODE} true_gear_decompress",
                formula="low and high nibbles apart (0.5, 1), joined (1, 1), cast, scaled, shifted",
            ),
            Operation(
                name="low_rank_product",
                kind="gemm",
                executed_flops=low_rank,
                workspace_bytes=quantised * 4 * b,
                transient_bytes=quantised * 2 * b,
                dtype=point.dtype,
                launches=4,
                shape={
                    "m": quantised / (mixer.head_dim * 2.0),
                    "n": float(mixer.head_dim),
                    "k": float(max(self.rank, 1)),
                },
                source=f"{_CODE} true_gear_decompress",
                formula="2 r FLOPs per element; the product written, read and added",
            ),
            elementwise(
                "join",
                workspace_bytes=2 * t * per_token * b,
                transient_bytes=t * per_token * b,
                launches=2,
                source="opengear-project/GEAR compressed_cache_utils.py torch.cat",
                formula="decompressed and buffered tokens read and written",
            ),
            attention,
        )

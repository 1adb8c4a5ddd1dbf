"""transformers' quantised cache on optimum-quanto: 2 or 4 bits, groups along the head.

Not KIVI: keys and values are grouped alike (axis 0: groups of g elements along the head of a
token), the whole prompt is quantised, and the cache is dequantised on every step; see
``hf_quantized``. State per layer, e = bits/8 + 2 b / g: B K (Hk + Hv) [(T - Rq) e + Rq b], Rq = (T
- S) mod R.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from costmodel.architecture import Architecture, MixerGroup
from costmodel.errors import ConfigError
from costmodel.methods import hf_quantized
from costmodel.methods.base import (
    AbstractMethod,
    Scope,
    Stage,
    State,
    attention_of,
    check_at_least,
    not_stored,
)
from costmodel.operation import Operations
from costmodel.workload import Point

_QUANTO = "huggingface/optimum-quanto optimum/quanto/tensor/weights/qbits.py, packed.py"
# amin and amax (b each), divide (b, b), shift (b, b), round (b, b), clamp (b, b), cast (b, 1), pack
# (1, 1): 11 b + 3
_CHAIN = (11.0, 3.0)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HfQuanto(AbstractMethod):
    """QuantizedCache(backend="quanto") with its defaults."""

    NAME: ClassVar[str] = "hf_quanto"
    TITLE: ClassVar[str] = "transformers quantised cache, optimum-quanto"
    REFERENCE: ClassVar[str] = "transformers 5.23 cache_utils.py QuantoQuantizedLayer"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"store"})
    ACTS: ClassVar[str] = "after prefill, layer by layer; again every residual_tokens steps"
    STORES: ClassVar[str] = "int{bits}"
    SCOPE: ClassVar[Scope] = "unbounded"
    DOES_NOT_SAVE: ClassVar[str] = (
        "time: the whole cache is dequantised on every step, which is slower than 16 bits."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = ("transformers",)
    PARAMETERS: ClassVar[dict[str, str]] = {
        "bits": "bits per element, 2 or 4; fewer is smaller",
        "group": "elements that share a scale and a shift; larger is smaller",
        "residual_tokens": "decoded tokens collected in 16 bits before all is quantised again",
    }
    STATE_FORMULA: ClassVar[str] = "B K (Hk + Hv) [(T - Rq) e + Rq b], Rq = (T - S) mod R"
    COST_ONLY: ClassVar[bool] = True

    bits: int = 4
    group: int = 64
    residual_tokens: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise ConfigError(f"hf_quanto: expected bits of 2 or 4, got {self.bits}")
        check_at_least("hf_quanto", 1, group=self.group, residual_tokens=self.residual_tokens)

    def refusal(self, architecture: Architecture) -> str | None:
        """Every layer must be full attention."""
        return hf_quantized.refusal(self.NAME, architecture)

    def element_bytes(self, point: Point) -> float:
        """Bytes of a quantised element with its share of scale and shift."""
        return self.bits / 8 + 2 * point.element_bytes / self.group

    def state(self, group: MixerGroup, point: Point) -> State:
        """Packed prompt and residual."""
        return hf_quantized.state(group, point, self.element_bytes(point), self.residual_tokens)

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Exact; the prompt's K and V live for one layer only."""
        return not_stored(attention, point)

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Quantise the whole prompt."""
        widths, fixed = _CHAIN
        return hf_quantized.quantise(
            attention_of(group),
            point,
            element=self.element_bytes(point),
            chain_bytes=widths * point.element_bytes + fixed,
            chain_flops=6.0,
            launches=20,
            source=_QUANTO,
            formula="(11 b + 3) bytes per element",
        )

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Dequantise, join, attend."""
        widths, fixed = _CHAIN
        b = point.element_bytes
        return hf_quantized.decode(
            attention_of(group),
            point,
            element=self.element_bytes(point),
            bits=self.bits,
            residual_tokens=self.residual_tokens,
            # unpack (to bytes, 1), cast (1, b), multiply (b, b), subtract (b, b), regroup (b, b)
            dequantise_bytes=2 + 7 * b,
            chain_bytes=widths * b + fixed,
            chain_flops=6.0,
            launches=20,
            source=_QUANTO,
        )

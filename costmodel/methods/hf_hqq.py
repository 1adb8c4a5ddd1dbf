"""transformers' quantised cache on HQQ: 1 to 8 bits, with an iterative fit of the zero points.

Badri and Shaji, half-quadratic quantisation (mobiusml/hqq). Same rules as quanto
(``hf_quantized``), but every quantisation runs a proximal fit of up to 20 iterations, which is
counted in full (it may stop earlier). Three-bit codes are packed ten to a 32-bit word, so a group
of 64 takes 7 words.

State per layer: B K (Hk + Hv) [(T - Rq) e + Rq b], Rq = (T - S) mod R, e = packed + 2 b / group.
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

_HQQ = "mobiusml/hqq hqq/core/quantize.py, optimize.py optimize_weights_proximal_legacy"
_ITERATIONS = 20
# one iteration: scale, add, round, clamp, subtract, divide, subtract, shrink (abs, pow, scale, sub,
# relu, sign, multiply), subtract, scale, subtract, mean, error (sub, abs, mean): 20 kernels, 39 b
_ITERATION_WIDTHS = 39.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HfHqq(AbstractMethod):
    """QuantizedCache(backend="hqq") with its defaults."""

    NAME: ClassVar[str] = "hf_hqq"
    TITLE: ClassVar[str] = "transformers quantised cache, HQQ"
    REFERENCE: ClassVar[str] = "transformers 5.23 cache_utils.py HQQQuantizedLayer; mobiusml/hqq"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"store"})
    ACTS: ClassVar[str] = "after prefill, layer by layer; again every residual_tokens steps"
    STORES: ClassVar[str] = "int{bits}"
    SCOPE: ClassVar[Scope] = "unbounded"
    DOES_NOT_SAVE: ClassVar[str] = (
        "time: the whole cache is dequantised on every step, and each quantisation iterates."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = ("transformers",)
    PARAMETERS: ClassVar[dict[str, str]] = {
        "bits": "bits per element, 1, 2, 3, 4 or 8; fewer is smaller",
        "group": "elements that share a scale and a zero point; larger is smaller",
        "residual_tokens": "decoded tokens collected in 16 bits before all is quantised again",
    }
    STATE_FORMULA: ClassVar[str] = "B K (Hk + Hv) [(T - Rq) e + Rq b], Rq = (T - S) mod R"
    COST_ONLY: ClassVar[bool] = True

    bits: int = 4
    group: int = 64
    residual_tokens: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4, 8):
            raise ConfigError(f"hf_hqq: expected bits of 1, 2, 3, 4 or 8, got {self.bits}")
        check_at_least("hf_hqq", 1, group=self.group, residual_tokens=self.residual_tokens)
        if self.bits != 3 and self.group * self.bits % 8:
            raise ConfigError(
                f"hf_hqq: expected a group that fills whole bytes at {self.bits} bits, "
                f"got {self.group}"
            )

    def refusal(self, architecture: Architecture) -> str | None:
        """Every layer must be full attention."""
        return hf_quantized.refusal(self.NAME, architecture)

    def element_bytes(self, point: Point) -> float:
        """Bytes of a quantised element with its share of scale and zero point."""
        codes = 4 * -(-self.group // 10) / self.group if self.bits == 3 else self.bits / 8
        return codes + 2 * point.element_bytes / self.group

    def state(self, group: MixerGroup, point: Point) -> State:
        """Packed prompt and residual."""
        return hf_quantized.state(group, point, self.element_bytes(point), self.residual_tokens)

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Exact; the prompt's K and V live for one layer only."""
        return not_stored(attention, point)

    def _chain_bytes(self, point: Point) -> float:
        # to fp32 (b, 4), min and max (4, 4), to b (4, b), the fit, final round (12), pack (4, 1)
        b = point.element_bytes
        return 2 * b + 4 + 8 + 4 + _ITERATIONS * _ITERATION_WIDTHS * b + 12 + 5

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Quantise the whole prompt, fitting zero points."""
        return hf_quantized.quantise(
            attention_of(group),
            point,
            element=self.element_bytes(point),
            chain_bytes=self._chain_bytes(point),
            chain_flops=_ITERATIONS * 20.0,
            launches=2 * 20 * _ITERATIONS,
            source=_HQQ,
            formula="20 iterations of 39 b bytes per element, and the packing",
        )

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Dequantise, join, attend."""
        b = point.element_bytes
        return hf_quantized.decode(
            attention_of(group),
            point,
            element=self.element_bytes(point),
            bits=self.bits,
            residual_tokens=self.residual_tokens,
            # unpack (to b), subtract zero (b, b), multiply by scale (b, b)
            dequantise_bytes=5 * b,
            chain_bytes=self._chain_bytes(point),
            chain_flops=_ITERATIONS * 20.0,
            launches=2 * 20 * _ITERATIONS,
            source=_HQQ,
        )

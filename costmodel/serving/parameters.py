"""The fitted parameters of an engine with their priors, and what else is known about it."""

from collections.abc import Mapping
from dataclasses import dataclass

#: parameter -> (prior, spread of its logarithm; 0: not fitted). Kernels in a step take what they
#: take alone, in a prompt a fifth more (sustained power); weights stream at 0.7 to 0.9 of the
#: bandwidth; prefill interferes once. Products that quantise their activations and carry scales
#: take longer against their roofline: by 1.6 in tables of fp8 against bf16. Attention kernels
#: written in Triton reach 0.4 of the tensor rate where FlashAttention and FlashInfer reach 0.6 to
#: 0.8.
PRIORS: Mapping[str, tuple[float, float]] = {
    "step_s": (4e-4, 1.0),
    "layer_s": (4e-6, 1.0),
    "start_s": (1e-3, 1.5),
    "matmul_factor": (1.0, 0.25),
    "integer_matmul_factor": (1.2, 0.3),
    "narrow_matmul_factor": (1.5, 0.1),
    "attention_factor": (1.0, 0.25),
    "packed_attention_factor": (0.9, 0.2),
    "prefill_factor": (1.2, 0.2),
    "prompt_attention_factor": (1.7, 0.4),
    "expert_factor_16": (1.4, 0.5),
    "expert_factor_8": (1.3, 0.5),
    "expert_factor_4": (1.1, 0.5),
    "expert_factor_integer": (1.5, 0.5),
    "expert_factor_prefill": (1.6, 0.6),
    "expert_layer_s": (1.5e-5, 1.0),
    "collective_factor": (0.8, 0.6),
    "prefill_share": (1.0, 0.4),
}
#: parameter -> limits. Every other request is admitted once per request; where all start and end
#: together, half of their prompts stand before its first token. Experts are never faster than their
#: roofline; half of a collective may hide behind what is fused with it.
LIMITS: Mapping[str, tuple[float, float]] = {
    "prefill_share": (0.5, 1.0),
    "collective_factor": (0.5, 2.0),
    "expert_factor_16": (1.0, 5.0),
    "expert_factor_8": (1.0, 5.0),
    "expert_factor_4": (1.0, 5.0),
    "expert_factor_integer": (1.0, 5.0),
    "expert_factor_prefill": (1.0, 5.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What is fitted to an engine's runs of dense models, or to those of models with routed
    experts; units in the names, shares and multipliers without one.

    step_s            host time per step, t0
    layer_s           gaps between the kernels of one layer
    start_s           what a first token takes besides its prefill, t_s
    matmul_factor     matmuls and small kernels inside a step against their own tables, a
    integer_matmul_factor   the same for integer weights, which are widened before they multiply
    narrow_matmul_factor    more of it for products in fp4, of which there are no tables; in prompts
                      too
    attention_factor  decode attention against its family, b; below 1 of what it takes beyond its
                      roofline
    packed_attention_factor   attention on a packed integer cache against that on the 16-bit cache
                      it replaces, where the engine unpacks inside its kernel
    prefill_factor    kernels of a prompt against their tables, p: clocks under sustained load
    prompt_attention_factor   more of it for attention over a prompt, where the engine attends with
                      kernels of its own; else 1
    expert_factor_16, _8, _4   expert roofline to attained time in decode, by bits of the weights
    expert_factor_integer      the same for integer weights
    expert_factor_prefill      the same in prefill, any format
    expert_layer_s    fixed cost of one layer of experts
    collective_factor collectives inside a step against their tables, c
    prefill_share     share of the others' prefill that stands between two tokens, q
    """

    step_s: float
    layer_s: float
    start_s: float
    matmul_factor: float
    integer_matmul_factor: float
    narrow_matmul_factor: float
    attention_factor: float
    packed_attention_factor: float
    prefill_factor: float
    prompt_attention_factor: float
    expert_factor_16: float
    expert_factor_8: float
    expert_factor_4: float
    expert_factor_integer: float
    expert_factor_prefill: float
    expert_layer_s: float
    collective_factor: float
    prefill_share: float

    def expert_factor(self, precision: str) -> float:
        """The multiplier m for the precision of the weights."""
        if precision in ("int4", "int8"):
            return self.expert_factor_integer
        by_name = {"fp8": self.expert_factor_8, "fp4": self.expert_factor_4}
        return by_name.get(precision, self.expert_factor_16)

    def matmuls(self, precision: str) -> float:
        """The multiplier a for the precision of the matrices outside of experts."""
        if precision in ("int4", "int8"):
            return self.integer_matmul_factor
        return self.matmul_factor * self.narrow(precision)

    def narrow(self, precision: str) -> float:
        """What products in fp4 take more than their estimate; 1 in any other precision."""
        return self.narrow_matmul_factor if precision == "fp4" else 1.0


def default_parameters() -> Parameters:
    """The priors."""
    return Parameters(**{name: value for name, (value, _) in PRIORS.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known about an engine besides what is fitted.

    fp8_cache         keeps an fp8 cache where the weights are fp8 or fp4
    memory_fraction   of the device for weights and KV pool
    kin               one of the engines that serve under load with kernels of the same makers: its
                      fit starts from the fit to all of them together
    rules             engine of ``costmodel/data/engines.toml`` whose accounting rules hold
    own_attention     attends over prompts with kernels of which there are no tables
    with_method       its runs are of this method, whose kernels it brings
    own_forms         runs methods in forms of its own, not in those their authors published
    """

    fp8_cache: bool = False
    memory_fraction: float = 0.93
    kin: bool = False
    rules: str = "vllm"
    own_attention: bool = False
    with_method: str = "full"
    own_forms: bool = False

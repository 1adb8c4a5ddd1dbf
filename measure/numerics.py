"""What a config says beyond sizes: norms, rotary embedding, caps, scales, routing.

None of it changes what a layer holds, and next to nothing of what it costs, so ``Architecture``
does not carry it. ``measure.config_numerics`` reads it from a config.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """A rotary embedding: pair i of n turns by position * theta^(-i / n), rescaled.

    fraction     share of the head that turns; interleaved  pairs are neighbours, not halves
    kind         "default", "linear", "llama3" (arXiv 2407.21783) or "yarn" (arXiv 2309.00071)
    attention_factor  multiplies cosine and sine; None: yarn's own
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def frequencies(self, n: int, device: torch.device) -> Tensor:
        """Radians per position of the pairs of an ``n``-element rotary part."""
        plain = self.theta ** -(torch.arange(0, n, 2, device=device, dtype=torch.float32) / n)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            turns = plain * self.original_context / (2 * math.pi)
            span = self.high_freq_factor - self.low_freq_factor
            keep = ((turns - self.low_freq_factor) / span).clamp(0.0, 1.0)
            return plain * (keep + (1 - keep) / self.factor)
        if self.kind == "yarn":
            first, last = (self._pair_of(turns, n) for turns in (self.beta_fast, self.beta_slow))
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, n - 1)
            pairs = torch.arange(n // 2, device=device, dtype=torch.float32)
            keep = 1 - ((pairs - first) / max(last - first, 1e-3)).clamp(0.0, 1.0)
            return plain * (keep + (1 - keep) / self.factor)
        return plain

    def _pair_of(self, turns: float, n: int) -> float:
        """Index of the pair that makes ``turns`` turns over the original context."""
        ratio = self.original_context / (turns * 2 * math.pi)
        return n * math.log(ratio) / (2 * math.log(self.theta))

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied with."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    @property
    def score_factor(self) -> float:
        """What latent attention multiplies its scores with."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """From router logits to experts and their weights.

    score      "softmax" or "sigmoid" of all logits
    normalise  weights of the chosen experts sum to one; ``scale`` multiplies them then
    on_input   weights multiply what an expert reads, not what it gives (Llama 4)
    groups     experts are chosen within the best ``top_groups`` of so many groups; a group counts
               its two best experts (sigmoid) or its best one (softmax)
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    on_input: bool = False
    groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """Queries of layers without positions times 1 + scale log(1 + floor((position + 1) / floor))
    (arXiv 2501.19399, Llama 4).
    """

    scale: float
    floor: float

    def factors(self, first: Tensor, n: int) -> Tensor:
        """[n, 1] for the positions from ``first`` [1] on, fp32."""
        positions = torch.arange(1, n + 1, device=first.device, dtype=torch.float32) + first
        return 1.0 + self.scale * (positions / self.floor).floor().log1p().unsqueeze(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Multipliers:
    """Factors on what the parts of a layer read and give (Falcon-H1, arXiv 2507.22448).

    ssm  of Mamba-2's projected gate, x, B, C and step size
    """

    attention_in: float = 1.0
    attention_out: float = 1.0
    key: float = 1.0
    ssm_in: float = 1.0
    ssm_out: float = 1.0
    ssm: tuple[float, ...] = (1.0,) * 5
    mlp_gate: float = 1.0
    mlp_down: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """What changes the values but not the cost. Defaults: the llama family's.

    local_rope        of windowed and chunked layers where it differs; rope None: no positions
    attention_scale   of the scores; None: 1 / sqrt(head size)
    qk_norm           of every head's queries and keys, before the rotary embedding; "unit": without
                      weights, in layers with positions only
    norm_before_gate  Mamba-2 norms its output first and gates it then
    gated_norm_eps    of that norm, where it is not ``norm_eps``
    step_limits       least and greatest step size of Mamba-2 over a prompt; a single step has none,
                      in the published kernels as in transformers
    layer_norm        norms subtract the mean and have a bias; first_norm  the embedding is normed
    sandwich          norms behind both blocks too (Gemma 2 and 3)
    attention_residual, recurrent_residual, mlp_residual  factors of the stream and of what is added
    residual_normed   the stream goes on normed, as the block reads it (MiniMax)
    swiglu            "clamped": GPT-OSS' form, gate and up clamped at 7, sigmoid(1.702 gate)
    """

    norm_eps: float = 1e-5
    rope: Rope | None = Rope()
    local_rope: Rope | None = None
    activation: Activation = "silu"
    swiglu: Literal["plain", "clamped"] = "plain"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    multipliers: Multipliers = Multipliers()
    norm_before_gate: bool = False
    gated_norm_eps: float | None = None
    step_limits: tuple[float, float] = (0.0, math.inf)
    temperature: Temperature | None = None
    attention_residual: tuple[float, float] = (1.0, 1.0)
    recurrent_residual: tuple[float, float] = (1.0, 1.0)
    mlp_residual: tuple[float, float] = (1.0, 1.0)
    residual_normed: bool = False
    qk_norm: bool | Literal["unit"] = False
    sinks: bool = False
    layer_norm: bool = False
    first_norm: bool = False
    sandwich: bool = False
    routing: Routing = Routing()

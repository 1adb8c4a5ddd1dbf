"""Channel mixers: dense and mixture-of-experts MLPs.

Parameters of a dense MLP: 3 d F (gated) or 2 d F. Of an MoE: E experts of that form, a router of
d E, and shared experts. A token multiplies with ``top_k`` experts; a batch of m tokens reads on
average E (1 - (1 - k/E)^m) of them under uniform routing.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from costmodel.errors import NotApplicableError
from costmodel.mixers.base import Linear
from costmodel.operation import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMLP:
    """up (and gate) and down projections.

    activation   "gelu_tanh" where that stands between the matmuls: it takes a CPU several times as
                 long as SiLU; anything else counts as "silu"
    """

    d_ff: int
    gated: bool = True
    bias: bool = False
    role: str = "mlp"
    activation: Literal["silu", "gelu_tanh"] = "silu"

    def linears(self, d_model: int) -> tuple[Linear, ...]:
        """Gate and up as one matmul, and down."""
        up = self.d_ff * (2 if self.gated else 1)
        return (
            Linear(
                name="gate_up_proj" if self.gated else "up_proj",
                n_in=d_model,
                n_out=up,
                role=self.role,
                bias=up if self.bias else 0,
            ),
            Linear(
                name="down_proj",
                n_in=self.d_ff,
                n_out=d_model,
                role=self.role,
                bias=d_model if self.bias else 0,
            ),
        )

    def other_parameters(self, d_model: int) -> int:
        """None."""
        return 0

    def sharded(self, tp: int) -> "DenseMLP":
        """The hidden width divides (rounded up, as engines pad)."""
        return replace(self, d_ff=-(-self.d_ff // tp))


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """Routed experts, a router and shared experts.

    d_ff              hidden width of one expert
    shared_d_ff       hidden width of all shared experts together; 0 for none
    shared_gate       a d_model -> 1 gate on the shared expert
    bias              of the shared experts' matrices and of those around the latent width
    router_bias       elements of a router bias or correction
    latent_dim        width the routed experts work in when it is not d_model (a down- and an
                      up-projection around them)
    runs_all          transformers multiplies every token with every expert, zeros for the others
    extra_parameters  anything else the block stores
    """

    n_experts: int
    top_k: int
    d_ff: int
    gated: bool = True
    expert_bias: bool = False
    shared_d_ff: int = 0
    shared_gated: bool = True
    shared_gate: bool = False
    router_bias: int = 0
    latent_dim: int | None = None
    bias: bool = False
    runs_all: bool = False
    extra_parameters: int = 0

    def expert_linears(self, d_model: int) -> tuple[Linear, ...]:
        """The routed experts, each matrix with its number of copies."""
        width = self.latent_dim or d_model
        up = self.d_ff * (2 if self.gated else 1)
        return (
            Linear(
                name="experts_gate_up" if self.gated else "experts_up",
                n_in=width,
                n_out=up,
                role="expert",
                copies=self.n_experts,
                bias=self.n_experts * up if self.expert_bias else 0,
            ),
            Linear(
                name="experts_down",
                n_in=self.d_ff,
                n_out=width,
                role="expert",
                copies=self.n_experts,
                bias=self.n_experts * width if self.expert_bias else 0,
            ),
        )

    def linears(self, d_model: int) -> tuple[Linear, ...]:
        """What every token multiplies with: the router and the shared experts."""
        out = [
            Linear(
                name="router",
                n_in=d_model,
                n_out=self.n_experts,
                role="router",
                quantisable=False,
                bias=self.router_bias,
            )
        ]
        if self.latent_dim:
            out += [
                Linear(name=name, n_in=n_in, n_out=n_out, role="mlp", bias=self.bias * n_out)
                for name, n_in, n_out in (
                    ("latent_down", d_model, self.latent_dim),
                    ("latent_up", self.latent_dim, d_model),
                )
            ]
        if self.shared_d_ff:
            out += DenseMLP(
                d_ff=self.shared_d_ff,
                gated=self.shared_gated,
                bias=self.bias,
                role="shared_expert",
            ).linears(d_model)
        if self.shared_gate:
            out.append(
                Linear(name="shared_gate", n_in=d_model, n_out=1, role="router", quantisable=False)
            )
        return tuple(out)

    def other_parameters(self, d_model: int) -> int:
        """Whatever the family adds."""
        return self.extra_parameters

    def sharded(self, tp: int) -> "MoE":
        """Tensor-parallel experts: every expert's width divides (rounded up)."""
        if self.n_experts % tp and self.d_ff % tp:
            raise NotApplicableError(f"{self.n_experts} experts of width {self.d_ff} and tp={tp}")
        return replace(self, d_ff=-(-self.d_ff // tp), shared_d_ff=-(-self.shared_d_ff // tp))

    def experts_read(self, n_tokens: Array) -> Array:
        """Distinct experts that ``n_tokens`` tokens touch on average, uniform routing."""
        share = min(1.0, self.top_k / self.n_experts)
        return (
            self.n_experts * -np.expm1(np.asarray(n_tokens) * np.log1p(-share))
            if (share < 1.0)
            else np.broadcast_to(np.float64(self.n_experts), np.shape(n_tokens))
        )


MLP = DenseMLP | MoE

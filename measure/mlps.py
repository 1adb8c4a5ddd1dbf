"""Dense MLPs and mixtures of experts.

Experts run one after another on the tokens that chose them: FLOPs are those of ``top_k`` experts
per token, and a step reads only the experts it visits.
"""

import torch
from torch import Tensor
from torch.nn.functional import sigmoid

from costmodel.errors import NotApplicableError
from costmodel.mlps import MLP, DenseMLP, MoE
from measure.mixers.base import Shape, Shapes
from measure.numerics import Numerics, Routing
from measure.parts import ACTIVATIONS, Tensors, scaled
from measure.weight_formats import linear

#: GPT-OSS: clamp of gate and up, and the factor inside its sigmoid.
_CLAMP, _ALPHA = 7.0, 1.702


class MLPRunner:
    """Runs one MLP; gate and up are stacked in this order."""

    def __init__(self, mlp: MLP, numerics: Numerics) -> None:
        self.mlp, self.numerics = mlp, numerics
        self.activation = ACTIVATIONS[numerics.activation]
        if isinstance(mlp, MoE) and mlp.extra_parameters:
            raise NotApplicableError("has experts with extra scales")

    def shapes(self, d_model: int) -> Shapes:
        """Tensors as ``linears`` names them; experts [E, out, in]."""
        prefix = "shared_" if isinstance(self.mlp, MoE) else ""
        shapes: Shapes = {}
        for matrix in self.mlp.linears(d_model):
            own = matrix.name.startswith(("router", "shared", "latent"))
            name = matrix.name if own else prefix + matrix.name
            shapes[name] = Shape.of(matrix)
            if matrix.bias:
                shapes[f"{name}_bias"] = Shape((matrix.n_out,), "zeros")
        if isinstance(self.mlp, MoE):
            for matrix in self.mlp.expert_linears(d_model):
                n = matrix.copies
                shapes[matrix.name] = Shape(
                    (n, matrix.n_out, matrix.n_in), packable=matrix.quantisable
                )
                if matrix.bias:
                    shapes[f"{matrix.name}_bias"] = Shape((n, matrix.n_out), "zeros")
        return shapes

    def run(self, x: Tensor, w: Tensors) -> Tensor:
        """[B, S, D] to the same."""
        if isinstance(self.mlp, DenseMLP):
            return self._dense(x, w, "", self.mlp.gated)
        flat = x.flatten(0, 1)
        out = self._routed(self.mlp, flat, w)
        if self.mlp.shared_d_ff:
            shared = self._dense(flat, w, "shared_", self.mlp.shared_gated)
            if self.mlp.shared_gate:
                shared = shared * sigmoid(linear(flat, w["shared_gate"]))
            out = out + shared
        return out.view(x.shape)

    def _dense(self, x: Tensor, w: Tensors, prefix: str, gated: bool) -> Tensor:
        up, down = f"{prefix}{'gate_up_proj' if gated else 'up_proj'}", f"{prefix}down_proj"
        hidden = self._activate(self.project_up(x, w, up), gated)
        out = linear(hidden, w[down], w.get(f"{down}_bias"))
        return scaled(out, self.numerics.multipliers.mlp_down)

    def project_up(self, x: Tensor, w: Tensors, name: str) -> Tensor:
        """Gate and up, or up."""
        return linear(x, w[name], w.get(f"{name}_bias"))

    def _activate(self, hidden: Tensor, gated: bool) -> Tensor:
        if not gated:
            return self.activation(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        if self.numerics.swiglu == "clamped":
            gate, up = gate.clamp(max=_CLAMP), up.clamp(-_CLAMP, _CLAMP)
            return (up + 1) * gate * sigmoid(gate * _ALPHA)
        return self.activation(scaled(gate, self.numerics.multipliers.mlp_gate)).mul_(up)

    def _routed(self, mlp: MoE, x: Tensor, w: Tensors) -> Tensor:
        logits = linear(x, w["router"], w.get("router_bias"))
        on_input = self.numerics.routing.on_input
        weights, chosen = route(logits, self.numerics.routing, mlp.top_k, w.get("correction"))
        up_name = "experts_gate_up" if mlp.gated else "experts_up"
        up_bias, down_bias = w.get(f"{up_name}_bias"), w.get("experts_down_bias")
        if mlp.latent_dim:
            x = linear(x, w["latent_down"], w.get("latent_down_bias"))
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, ranks = torch.where(chosen == expert)
            scales, inputs = weights[rows, ranks, None].to(x.dtype), x[rows]
            if on_input:
                inputs = inputs * scales
            hidden = linear(
                inputs, w[up_name][expert], None if up_bias is None else up_bias[expert]
            )
            result = linear(
                self._activate(hidden, mlp.gated),
                w["experts_down"][expert],
                None if down_bias is None else down_bias[expert],
            )
            out.index_add_(0, rows, result if on_input else result * scales)
        return linear(out, w["latent_up"], w.get("latent_up_bias")) if mlp.latent_dim else out


def route(
    logits: Tensor, routing: Routing, top_k: int, correction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights and experts [tokens, k] of router logits [tokens, E].

    ``correction`` is added to the scores for choosing, not for weighing.
    """
    softmax = routing.score == "softmax"
    scores = logits.float().softmax(dim=-1) if softmax else logits.float().sigmoid()
    choice = scores if correction is None else scores + correction.float()
    if routing.groups > 1:
        grouped = choice.unflatten(-1, (routing.groups, -1))
        best = grouped.amax(-1) if softmax else grouped.topk(2, dim=-1).values.sum(-1)
        kept = best.topk(routing.top_groups, dim=-1).indices
        dropped = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, False)
        choice = grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(-2)
    chosen = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if routing.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routing.scale, chosen

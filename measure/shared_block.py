"""Zamba2's shared transformer: attention and an MLP whose weights several layers use.

    t = hybrid_proj( mlp( norm( attention( norm( concat(x, embedding) ) ) ) ) )

Nothing is added on the way; the layer's own mixer then reads norm(x + t). Every layer has its own
low-rank adapters beside the matrices it shares (arXiv 2411.15242).
"""

from torch import Tensor, cat

from costmodel.architecture import Layer
from costmodel.errors import NotApplicableError
from costmodel.mixers import Attention, Linear
from measure.methods.base import AbstractLayerCache
from measure.mixers.attention import AttentionRunner
from measure.mixers.base import Shape, Shapes
from measure.mlps import MLPRunner
from measure.numerics import Numerics
from measure.parts import Rotary, Tensors, rms
from measure.weight_formats import linear


class _AdaptedAttention(AttentionRunner):
    """Reads twice the width; adapters "adapter_q_a", "adapter_q_b", ... where there are any."""

    READS = "hidden and embedding"

    def project(self, x: Tensor, w: Tensors) -> Tensor:
        """q, k and v, each with what its adapter adds."""
        projected = super().project(x, w)
        if "adapter_q_a" not in w:
            return projected
        added = [linear(linear(x, w[f"adapter_{n}_a"]), w[f"adapter_{n}_b"]) for n in "qkv"]
        return projected + cat(added, dim=-1)


class _AdaptedMLP(MLPRunner):
    def project_up(self, x: Tensor, w: Tensors, name: str) -> Tensor:
        """Gate and up with what their adapter adds."""
        added = linear(linear(x, w["adapter_gate_up_a"]), w["adapter_gate_up_b"])
        return super().project_up(x, w, name) + added


class SharedBlock:
    """Runs the shared part of one layer."""

    def __init__(self, layer: Layer, numerics: Numerics) -> None:
        first = layer.mixers[0]
        if not isinstance(first, Attention) or len(layer.mlps) != 1:
            raise NotApplicableError("shares something else than attention and an MLP")
        self.attention = _AdaptedAttention(first, numerics)
        self.mlp = _AdaptedMLP(layer.mlps[0], numerics)
        self.width = first.input_dim
        self.linears: tuple[Linear, ...] = layer.linears
        self.eps = numerics.norm_eps

    def shapes(self, d_model: int) -> Shapes:
        """What is shared."""
        return {
            **self.attention.shapes(d_model),
            **self.mlp.shapes(d_model),
            "input_norm": Shape((self.width or d_model,), "ones"),
            "mlp_norm": Shape((d_model,), "ones"),
        }

    def own_shapes(self) -> Shapes:
        """What every layer has of its own: adapters, and the projection back."""
        return {matrix.name: Shape.of(matrix) for matrix in self.linears}

    def run(
        self,
        x: Tensor,
        embedded: Tensor,
        w: Tensors,
        cache: AbstractLayerCache,
        table: Rotary | None,
        first: bool,
    ) -> Tensor:
        """What is added to what the layer's own mixer reads, [B, S, D]."""
        h = rms(cat((x, embedded), dim=-1), w["input_norm"], self.eps)
        h = self.attention.run(h, w, cache, table, first)
        h = self.mlp.run(rms(h, w["mlp_norm"], self.eps), w)
        return linear(h, w["hybrid_proj"])

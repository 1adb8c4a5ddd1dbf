"""RG-LRU (Griffin): h = a h + sqrt(1 - a^2) (i x), gates from block-diagonal matmuls.

a = exp(-8 r softplus(lambda)); the first token is not scaled by sqrt(1 - a^2), there being nothing
before it. A prompt is a few associative scans, one after another; a step is elementwise.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from costmodel.mixers.rglru import RGLRU
from measure.mixers.base import FixedState, RecurrentRunner, Shape, Shapes, scan_pieces
from measure.numerics import Numerics
from measure.parts import ACTIVATIONS, Rotary, Tensors
from measure.weight_formats import linear

#: The constant c of arXiv 2402.19427.
_DECAY_SCALE = 8.0


class RGLRURunner(RecurrentRunner):
    """One recurrent block; x, y branches are stacked so, and input, recurrence gates too."""

    def __init__(self, mixer: RGLRU, numerics: Numerics) -> None:
        self.mixer = mixer
        self.activation = ACTIVATIONS[numerics.activation]

    def shapes(self, d_model: int) -> Shapes:
        """Branches, convolution, gates, decay, output."""
        m = self.mixer
        w, block = m.width, m.width // m.n_blocks
        return {
            "xy": Shape((2 * w, d_model), packable=True),
            "xy_bias": Shape((2 * w,), "zeros"),
            "out": Shape((d_model, w), packable=True),
            "out_bias": Shape((d_model,), "zeros"),
            "conv": Shape((w, 1, m.conv_kernel)),
            "conv_bias": Shape((w,), "zeros"),
            "gates": Shape((2, m.n_blocks, block, block)),
            "gates_bias": Shape((2, m.n_blocks, block), "zeros"),
            "decay": Shape((w,), "step"),
        }

    def state_sizes(self) -> tuple[tuple[int, ...], tuple[int, int]]:
        """[w] and [w, k - 1]."""
        return (self.mixer.width,), (self.mixer.width, self.mixer.conv_kernel - 1)

    def run(
        self, x: Tensor, w: Tensors, cache: FixedState, table: Rotary | None, first: bool
    ) -> Tensor:
        """Branch, convolve, gate, scan, project."""
        x, y = linear(x, w["xy"], w["xy_bias"]).chunk(2, dim=-1)
        x = cache.convolve(x, w["conv"], w["conv_bias"])
        if cache.fused and first:
            from measure.kernels.rglru_scan import rglru_scan

            entry, recurrence = self._before_sigmoid(x, w)
            states = rglru_scan(x, recurrence, entry, w["decay"], cache.state, first=True)
            cache.n_tokens += x.shape[1]
            return linear(states * self.activation(y), w["out"], w["out_bias"])
        gates = self.gates(x, w)
        log_a = -_DECAY_SCALE * gates[1].float() * softplus(w["decay"].float())
        scale = torch.sqrt(-torch.expm1(2 * log_a))
        if first:
            scale[:, 0] = 1.0
        added = scale * (x * gates[0]).float()
        states = torch.empty_like(added)
        for piece, found in scan_pieces(log_a.exp(), added, cache.state):
            states[:, piece] = found
        cache.n_tokens += x.shape[1]
        return linear(states.to(y.dtype) * self.activation(y), w["out"], w["out_bias"])

    def gates(self, x: Tensor, w: Tensors) -> list[Tensor]:
        """Input and recurrence gate of x [B, S, w], each a block-diagonal matmul."""
        return [torch.sigmoid(gate) for gate in self._before_sigmoid(x, w)]

    def _before_sigmoid(self, x: Tensor, w: Tensors) -> list[Tensor]:
        blocks = x.unflatten(-1, (self.mixer.n_blocks, -1)).flatten(0, 1).transpose(0, 1)
        return [
            torch.baddbmm(bias.unsqueeze(1), blocks, weight).transpose(0, 1).reshape(x.shape)
            for weight, bias in zip(w["gates"], w["gates_bias"], strict=True)
        ]

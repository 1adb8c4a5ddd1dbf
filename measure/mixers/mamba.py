"""Mamba-1: h = exp(dt A) h + dt B x, y = C h + D x; every channel and state has its own decay.

A prompt runs in pieces, each an associative scan; a step is elementwise with one readout matmul.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from costmodel.mixers.mamba import Mamba
from measure.mixers.base import FixedState, Init, RecurrentRunner, Shape, Shapes, linear_scan
from measure.numerics import Numerics
from measure.parts import Rotary, Tensors, rms
from measure.weight_formats import linear

#: Tokens scanned together: bounds the hidden states [B, tokens, E, N] in fp32.
PIECE_TOKENS = 64


class MambaRunner(RecurrentRunner):
    """One selective state-space layer."""

    def __init__(self, mixer: Mamba, numerics: Numerics) -> None:
        self.mixer, self.eps = mixer, numerics.norm_eps

    def shapes(self, d_model: int) -> Shapes:
        """Projections, convolution, decay, skip and inner norms."""
        m = self.mixer
        shapes: Shapes = {}
        for matrix in m.linears(d_model):
            shapes[matrix.name] = Shape.of(matrix)
            if matrix.bias:
                kind: Init = "step" if matrix.name == "dt_proj" else "zeros"
                shapes[f"{matrix.name}_bias"] = Shape((matrix.n_out,), kind)
        shapes |= {
            "conv": Shape((m.d_inner, 1, m.conv_kernel)),
            "a_log": Shape((m.d_inner, m.d_state), "log_decay"),
            "skip": Shape((m.d_inner,), "ones"),
        }
        if m.conv_bias:
            shapes["conv_bias"] = Shape((m.d_inner,), "zeros")
        if m.inner_norms:
            shapes["dt_norm"] = Shape((m.dt_rank,), "ones")
            shapes |= {x: Shape((m.d_state,), "ones") for x in ("b_norm", "c_norm")}
        return shapes

    def state_sizes(self) -> tuple[tuple[int, ...], tuple[int, int]]:
        """[E, N] and [E, k - 1]."""
        m = self.mixer
        return (m.d_inner, m.d_state), (m.d_inner, m.conv_kernel - 1)

    def run(
        self, x: Tensor, w: Tensors, cache: FixedState, table: Rotary | None, first: bool
    ) -> Tensor:
        """Convolve, scan, gate, project."""
        m = self.mixer
        x, gate = linear(x, w["in_proj"], w.get("in_proj_bias")).chunk(2, dim=-1)
        x = silu(cache.convolve(x, w["conv"], w.get("conv_bias")))
        parts = linear(x, w["x_proj"]).split((m.dt_rank, m.d_state, m.d_state), dim=-1)
        if m.inner_norms:
            names = ("dt_norm", "b_norm", "c_norm")
            parts = tuple(rms(p, w[n], self.eps) for p, n in zip(parts, names, strict=True))
        step = softplus(linear(parts[0], w["dt_proj"], w["dt_proj_bias"]).float())
        a = -w["a_log"].float().exp()
        out = torch.empty_like(step)
        for start in range(0, x.shape[1], PIECE_TOKENS):
            piece = slice(start, start + PIECE_TOKENS)
            dt = step[:, piece]
            decay = torch.exp(dt.unsqueeze(-1) * a)
            added = (dt * x[:, piece]).unsqueeze(-1) * parts[1][:, piece].float().unsqueeze(2)
            states = linear_scan(decay, added, cache.state)
            cache.state.copy_(states[:, -1])
            out[:, piece] = torch.matmul(states, parts[2][:, piece].float().unsqueeze(-1))[..., 0]
        cache.n_tokens += x.shape[1]
        y = (out + x * w["skip"].float()).to(gate.dtype) * silu(gate)
        return linear(y, w["out_proj"], w.get("out_proj_bias"))

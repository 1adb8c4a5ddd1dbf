"""Mamba-2 (state space duality): one decay per head and token, so that chunks are matmuls.

Within a chunk y = (C B^T * decays) (dt x); across chunks y += decay C h, h = decay h + B^T (dt x).
A prompt is padded to whole chunks with tokens of step size 0, which leave the state alone.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from costmodel.mixers.mamba2 import Mamba2
from measure.mixers.base import FixedState, RecurrentRunner, Shape, Shapes
from measure.numerics import Numerics
from measure.parts import Rotary, Tensors, scaled
from measure.weight_formats import linear

#: Largest state of a head that the scan kernel is built for, elements.
_MOST_STATE = 2**15


class Mamba2Runner(RecurrentRunner):
    """One layer; heads [G groups, H / G]."""

    def __init__(self, mixer: Mamba2, numerics: Numerics) -> None:
        self.mixer, self.eps = mixer, numerics.gated_norm_eps or numerics.norm_eps
        self.step_limits = numerics.step_limits
        self.factors, self.norm_before_gate = numerics.multipliers, numerics.norm_before_gate

    def shapes(self, d_model: int) -> Shapes:
        """Projections, convolution, step-size bias, decay, skip, norm."""
        m = self.mixer
        shapes: Shapes = {}
        for matrix in m.linears(d_model):
            shapes[matrix.name] = Shape.of(matrix)
            if matrix.bias:
                shapes[f"{matrix.name}_bias"] = Shape((matrix.n_out,), "zeros")
        shapes |= {
            "conv": Shape((m.conv_channels, 1, m.conv_kernel)),
            "dt_bias": Shape((m.n_heads,), "step"),
            "a_log": Shape((m.n_heads,), "log_decay"),
            "skip": Shape((m.n_heads,), "ones"),
        }
        if m.conv_bias:
            shapes["conv_bias"] = Shape((m.conv_channels,), "zeros")
        if m.norm:
            shapes["norm"] = Shape((m.d_inner,), "ones")
        return shapes

    def state_sizes(self) -> tuple[tuple[int, ...], tuple[int, int]]:
        """[H, P, N] and [channels, k - 1]."""
        m = self.mixer
        return (m.n_heads, m.head_dim, m.d_state), (m.conv_channels, m.conv_kernel - 1)

    def run(
        self, x: Tensor, w: Tensors, cache: FixedState, table: Rotary | None, first: bool
    ) -> Tensor:
        """Convolve, scan, norm, project."""
        m = self.mixer
        factors = self.factors
        projected = linear(scaled(x, factors.ssm_in), w["in_proj"], w.get("in_proj_bias"))
        n_bc = m.n_groups * m.d_state
        sizes = (m.d_inner, m.d_inner, n_bc, n_bc, m.n_heads)
        for part, factor in zip(projected.split(sizes, dim=-1), factors.ssm, strict=True):
            if factor != 1.0:
                part.mul_(factor)
        gate, mixed, dt = projected.split((m.d_inner, m.conv_channels, m.n_heads), dim=-1)
        mixed = silu(cache.convolve(mixed, w["conv"], w.get("conv_bias")))
        x, b, c = mixed.split((m.d_inner, n_bc, n_bc), dim=-1)
        x = x.float().unflatten(-1, (m.n_heads, m.head_dim))
        b, c = (y.unflatten(-1, (m.n_groups, m.d_state)) for y in (b, c))
        step = softplus(dt.float() + w["dt_bias"].float())  # [B, S, H]
        if first:
            step = step.clamp(*self.step_limits)
        log_decay = -step * w["a_log"].float().exp()
        fused = first and cache.fused and self._fits()
        if not fused:  # the kernel widens them itself, and multiplies as exactly as they are
            b, c = b.float(), c.float()
        scan = self._fused_prompt if fused else self._prompt if first else self._step
        y = scan(x * step.unsqueeze(-1), b, c, log_decay, cache.state)
        cache.n_tokens += x.shape[1]
        y = (y + x * w["skip"].float().unsqueeze(-1)).flatten(2)
        if m.norm and self.norm_before_gate:
            y = self._normed(y, w["norm"])
        y = y * silu(gate.float())
        if m.norm and not self.norm_before_gate:
            y = self._normed(y, w["norm"])
        out = linear(y.to(gate.dtype), w["out_proj"], w.get("out_proj_bias"))
        return scaled(out, factors.ssm_out)

    def _normed(self, y: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of every group."""
        grouped = y.unflatten(-1, (self.mixer.n_groups, -1))
        grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return grouped.flatten(2) * weight.float()

    def _fits(self) -> bool:
        """Whether the scan kernel is built for these sizes: powers of two from 16 on, and a state
        that a block holds.
        """
        m = self.mixer
        sizes = m.head_dim, m.d_state, m.chunk_tokens
        is_small = m.head_dim * m.d_state <= _MOST_STATE
        return is_small and all(x >= 16 and not x & (x - 1) for x in sizes)

    def _fused_prompt(
        self, x: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, state: Tensor
    ) -> Tensor:
        """The same as ``_prompt`` by kernels."""
        from measure.kernels.ssd_scan import ssd_scan

        return ssd_scan(x, b, c, log_decay, state, self.mixer.chunk_tokens)

    def _prompt(self, x: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
        """All tokens, a chunk at a time; the state is updated in place."""
        m, s = self.mixer, x.shape[1]
        size = m.chunk_tokens
        missing = -s % size
        x, b, c = (pad(y, (0, 0, 0, 0, 0, missing)) for y in (x, b, c))
        log_decay = pad(log_decay, (0, 0, 0, missing))
        h = state.unflatten(1, (m.n_groups, -1))  # [B, G, H/G, P, N], a view
        future = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
        out = torch.empty_like(x)
        for start in range(0, s, size):
            piece = slice(start, start + size)
            bs, cs = b[:, piece].transpose(1, 2), c[:, piece].transpose(1, 2)  # [B, G, c, N]
            xs = x[:, piece].transpose(1, 2).unflatten(1, (m.n_groups, -1))  # [B, G, H/G, c, P]
            total = log_decay[:, piece].transpose(1, 2).cumsum(-1).unflatten(1, (m.n_groups, -1))
            # [B, G, H/G, c, c] is the largest by far: it is made once and worked on in place
            scores = total.unsqueeze(-1) - total.unsqueeze(-2)
            scores.masked_fill_(future, -torch.inf).exp_()
            scores.mul_(torch.matmul(cs, bs.transpose(-1, -2)).unsqueeze(2))
            y = torch.matmul(scores, xs)
            # C h of all heads of a group in one matmul: [c, N] x [N, H/G P]
            read = torch.matmul(cs, h.flatten(2, 3).transpose(-1, -2))
            read = read.unflatten(-1, (-1, m.head_dim)).transpose(2, 3)
            y = y + read * total.exp().unsqueeze(-1)
            left = (total[..., -1:] - total).exp().unsqueeze(-1)
            added = torch.matmul((xs * left).transpose(-1, -2).flatten(2, 3), bs)
            h.mul_(total[..., -1].exp()[..., None, None])
            h.add_(added.unflatten(2, (-1, m.head_dim)))
            out[:, piece] = y.flatten(1, 2).transpose(1, 2)
        return out[:, :s]

    def _step(self, x: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
        """One token."""
        m = self.mixer
        h = state.unflatten(1, (m.n_groups, -1)).flatten(2, 3)  # [B, G, H/G P, N]
        columns = x.squeeze(1).unflatten(1, (m.n_groups, -1)).flatten(2).unsqueeze(-1)
        state.mul_(log_decay.squeeze(1).exp()[..., None, None])
        h.add_(torch.matmul(columns, b.transpose(1, 2)))
        y = torch.matmul(h, c.squeeze(1).unsqueeze(-1))
        return y.reshape(x.shape)

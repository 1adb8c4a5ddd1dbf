"""Gated DeltaNet: S = a S + k b (v - k a S)^T, o = q S, with one decay a per head and token.

Within a chunk of c tokens the corrections solve a unit lower-triangular system, so that a chunk is
matmuls and one solve (arXiv 2412.06464); a step is three matmuls with the state.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu, softplus

from costmodel.errors import NotApplicableError
from costmodel.mixers.delta import CHUNK_TOKENS, DeltaRule
from measure.mixers.base import FixedState, RecurrentRunner, Shape, Shapes
from measure.numerics import Numerics
from measure.parts import Rotary, Tensors, rms


class DeltaRunner(RecurrentRunner):
    """One gated-DeltaNet layer; q, k, v, z stacked in this order, then b and a."""

    def __init__(self, mixer: DeltaRule, numerics: Numerics) -> None:
        if mixer.form != "gdn":
            raise NotApplicableError("has Kimi Delta Attention")
        self.mixer, self.eps = mixer, numerics.norm_eps

    def shapes(self, d_model: int) -> Shapes:
        """Projections, convolution, decay, step-size bias, norm."""
        m = self.mixer
        return {
            **{x.name: Shape((x.n_out, x.n_in)) for x in m.linears(d_model)},
            "conv": Shape((m.conv_channels, 1, m.conv_kernel)),
            "a_log": Shape((m.n_value_heads,), "log_decay"),
            "dt_bias": Shape((m.n_value_heads,), "step"),
            "norm": Shape((m.value_dim,), "ones"),
        }

    def state_sizes(self) -> tuple[tuple[int, ...], tuple[int, int]]:
        """[V, dk, dv] and [channels, k - 1]."""
        m = self.mixer
        return (m.n_value_heads, m.key_dim, m.value_dim), (m.conv_channels, m.conv_kernel - 1)

    def run(
        self, x: Tensor, w: Tensors, cache: FixedState, table: Rotary | None, first: bool
    ) -> Tensor:
        """Convolve, apply the rule, norm and gate, project."""
        m = self.mixer
        mixed, z = linear(x, w["in_proj_qkvz"]).split((m.conv_channels, m.d_value), dim=-1)
        beta, a = linear(x, w["in_proj_ba"]).chunk(2, dim=-1)
        mixed = silu(cache.convolve(mixed, w["conv"], None))
        parts = mixed.split((m.d_key, m.d_key, m.d_value), dim=-1)
        sizes = (m.key_dim, m.key_dim, m.value_dim)
        q, k, v = (
            p.unflatten(-1, (-1, n)).transpose(1, 2).float()
            for p, n in zip(parts, sizes, strict=True)
        )
        per_key = m.n_value_heads // m.n_key_heads
        q = (q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6)) * m.key_dim**-0.5
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        q, k = q.repeat_interleave(per_key, dim=1), k.repeat_interleave(per_key, dim=1)
        log_decay = -w["a_log"].float().exp() * softplus(a.float() + w["dt_bias"].float())
        log_decay, beta = log_decay.transpose(1, 2), beta.sigmoid().float().transpose(1, 2)
        rule = self._prompt if first else self._step
        out = rule(q, k, v, log_decay, beta, cache.state).transpose(1, 2)
        cache.n_tokens += x.shape[1]
        out = rms(out, w["norm"].float(), self.eps) * silu(z.unflatten(-1, out.shape[2:]).float())
        return linear(out.flatten(2).to(z.dtype), w["out_proj"])

    @staticmethod
    def _prompt(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
    ) -> Tensor:
        """All tokens [B, V, S, .], a chunk at a time; the state is updated in place."""
        s, size = q.shape[2], CHUNK_TOKENS
        missing = -s % size
        q, k, v = (pad(x, (0, 0, 0, missing)) for x in (q, k, v))
        log_decay, beta = (pad(x, (0, missing)) for x in (log_decay, beta))
        future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        out = torch.empty_like(v)
        for start in range(0, s, size):
            piece = slice(start, start + size)
            qs, ks, vs = q[:, :, piece], k[:, :, piece], v[:, :, piece]
            total = log_decay[:, :, piece].cumsum(-1)
            between = total.unsqueeze(-1) - total.unsqueeze(-2)
            between = between.masked_fill(future, -torch.inf).exp()
            weighed = ks * beta[:, :, piece].unsqueeze(-1)
            since = total.exp().unsqueeze(-1)
            system = torch.matmul(weighed, ks.transpose(-1, -2)) * between
            # what is new in the values: less what the state at the chunk's start already gives
            wanted = vs * beta[:, :, piece].unsqueeze(-1) - torch.matmul(weighed * since, state)
            new = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
            scores = torch.matmul(qs, ks.transpose(-1, -2)) * between
            out[:, :, piece] = torch.matmul(qs * since, state) + torch.matmul(scores, new)
            left = (total[..., -1:] - total).exp().unsqueeze(-1)
            state.mul_(total[..., -1].exp()[..., None, None])
            state.add_(torch.matmul((ks * left).transpose(-1, -2), new))
        return out[:, :, :s]

    @staticmethod
    def _step(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
    ) -> Tensor:
        """One token."""
        state.mul_(log_decay.exp().unsqueeze(-1))
        new = (v - torch.matmul(k, state)) * beta.unsqueeze(-1)
        state.add_(torch.matmul(k.transpose(-1, -2), new))
        return torch.matmul(q, state)

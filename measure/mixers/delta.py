"""Gated DeltaNet and Kimi Delta Attention: S = a S + k b (v - k a S)^T, o = q S.

The decay a is one number per head and token (GDN), or one per key channel (KDA). Within a chunk the
corrections solve a unit lower-triangular system, so that a chunk is matmuls and one solve
(arXiv 2412.06464, 2510.26692); KDA's scores between tokens are elementwise sums over channels,
whose decays are at most one. A step is three matmuls with the state.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from costmodel.mixers.delta import CHUNK_TOKENS, DeltaRule
from measure.mixers.base import FixedState, RecurrentRunner, Shape, Shapes
from measure.numerics import Numerics
from measure.parts import Rotary, Tensors, rms
from measure.weight_formats import linear

#: KDA's elementwise scores grow with the chunk squared times the key size.
_KDA_CHUNK_TOKENS = 16


class DeltaRunner(RecurrentRunner):
    """One layer. GDN stacks q, k, v, z in this order, then b and a; KDA q, k, v, then the low-rank
    inputs of decay and output gate.
    """

    def __init__(self, mixer: DeltaRule, numerics: Numerics) -> None:
        self.mixer, self.eps = mixer, numerics.norm_eps

    def shapes(self, d_model: int) -> Shapes:
        """Projections, convolution, decay, step-size bias, norm."""
        m = self.mixer
        n_bias = m.n_value_heads if m.form == "gdn" else m.d_key
        return {
            **{x.name: Shape.of(x) for x in m.linears(d_model)},
            "conv": Shape((m.conv_channels, 1, m.conv_kernel)),
            "a_log": Shape((m.n_value_heads,), "log_decay"),
            "dt_bias": Shape((n_bias,), "step"),
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
        mixed, gate, beta, decay = (self._gdn_inputs if m.form == "gdn" else self._kda_inputs)(x, w)
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
        raw = decay.float() + w["dt_bias"].float()
        rate = w["a_log"].float().exp()[:, None, None]
        log_decay = -rate * softplus(raw.unflatten(-1, (m.n_value_heads, -1)).transpose(1, 2))
        beta = beta.sigmoid().float().transpose(1, 2).unsqueeze(-1)
        rule = self._prompt if first else self._step
        out = rule(q, k, v, log_decay, beta, cache.state).transpose(1, 2)
        cache.n_tokens += x.shape[1]
        activate = silu if m.form == "gdn" else torch.sigmoid
        out = rms(out, w["norm"].float(), self.eps)
        out = out * activate(gate.unflatten(-1, out.shape[2:]).float())
        return linear(out.flatten(2).to(x.dtype), w["out_proj"])

    def _gdn_inputs(self, x: Tensor, w: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs of the convolution, output gate, correction strength, decay."""
        m = self.mixer
        mixed, gate = linear(x, w["in_proj_qkvz"]).split((m.conv_channels, m.d_value), dim=-1)
        beta, decay = linear(x, w["in_proj_ba"]).chunk(2, dim=-1)
        return mixed, gate, beta, decay

    def _kda_inputs(self, x: Tensor, w: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        decay, gate = linear(x, w["gates_a_proj"]).chunk(2, dim=-1)
        return (
            linear(x, w["qkv_proj"]),
            linear(gate, w["g_b_proj"]),
            linear(x, w["b_proj"]),
            linear(decay, w["f_b_proj"]),
        )

    def _prompt(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
    ) -> Tensor:
        """All tokens [B, V, S, .], a chunk at a time; the state is updated in place."""
        size = CHUNK_TOKENS if self.mixer.form == "gdn" else _KDA_CHUNK_TOKENS
        s, missing = q.shape[2], -q.shape[2] % size
        q, k, v, log_decay, beta = (pad(x, (0, 0, 0, missing)) for x in (q, k, v, log_decay, beta))
        out = torch.empty_like(v)
        for start in range(0, s, size):
            piece = slice(start, start + size)
            qs, ks, vs, bs = (x[:, :, piece] for x in (q, k, v, beta))
            total = log_decay[:, :, piece].cumsum(2)
            weighed, since = ks * bs, total.exp()
            # what is new in the values: less what the state at the chunk's start already gives
            wanted = vs * bs - torch.matmul(weighed * since, state)
            system = _decayed_scores(weighed, ks, total)
            new = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
            scores = _decayed_scores(qs, ks, total)
            out[:, :, piece] = torch.matmul(qs * since, state) + torch.matmul(scores, new)
            left = (total[:, :, -1:] - total).exp()
            state.mul_(total[:, :, -1:].exp().transpose(-1, -2))
            state.add_(torch.matmul((ks * left).transpose(-1, -2), new))
        return out[:, :, :s]

    @staticmethod
    def _step(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
    ) -> Tensor:
        """One token."""
        state.mul_(log_decay.exp().transpose(-1, -2))
        new = (v - torch.matmul(k, state)) * beta
        state.add_(torch.matmul(k.transpose(-1, -2), new))
        return torch.matmul(q, state)


def _decayed_scores(a: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """sum_c a_t k_s exp(total_t - total_s) for s <= t, else 0; total [.., c, 1 or dk] cumulated."""
    size = k.shape[2]
    future = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1).unsqueeze(-1)
    between = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(future, -torch.inf).exp()
    if total.shape[-1] == 1:
        return torch.matmul(a, k.transpose(-1, -2)) * between.squeeze(-1)
    return (a.unsqueeze(3) * between * k.unsqueeze(2)).sum(-1)

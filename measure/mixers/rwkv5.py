"""RWKV-5 time mixing: S = diag(w) S + k^T v, y = r (S + u k^T v), one decay per key channel.

Within a chunk the scores of two tokens are sums over channels of r_t k_s w^(t-1-s); the powers are
at most one, so nothing overflows. Across chunks everything is a matmul with the state. Channel
mixing, sigmoid(r) (relu(k)^2 W), shifts its input by one token too; one state keeps both shifts.
"""

import torch
from torch import Tensor
from torch.nn.functional import group_norm, pad, relu, sigmoid, silu

from costmodel.architecture import Layer
from costmodel.mixers.base import Linear
from costmodel.mixers.rwkv5 import RWKV5
from costmodel.mlps import MLP
from measure.mixers.base import FixedState, RecurrentRunner, Shape, Shapes
from measure.numerics import Numerics
from measure.parts import Rotary, Tensors
from measure.weight_formats import linear

#: Tokens per chunk: bounds the scores' elementwise part, c^2 per channel.
CHUNK_TOKENS = 16
#: Epsilon of the group norm: 1e-5 times the square of the head-size divisor 8.
_GROUP_EPS = 64e-5
_INPUTS = ("key", "value", "receptance", "gate")


class RWKV5Runner(RecurrentRunner):
    """Time mixing of one layer; column 0 holds its last input."""

    def __init__(self, mixer: RWKV5, numerics: Numerics) -> None:
        self.mixer = mixer

    def shapes(self, d_model: int) -> Shapes:
        """Projections, mixing vectors (key, value, receptance, gate), decay, bonus, norm."""
        m = self.mixer
        inner = m.n_heads * m.head_dim
        return {
            **{x.name: Shape.of(x) for x in m.linears(d_model)},
            "mix": Shape((4, d_model), "ones"),
            "decay": Shape((inner,), "step"),
            "bonus": Shape((inner,), "zeros"),
            "norm": Shape((inner,), "ones"),
            "norm_bias": Shape((inner,), "zeros"),
        }

    def state_sizes(self) -> tuple[tuple[int, ...], tuple[int, int]]:
        """[H, h, h] (key channels, value channels) and the two shifted inputs."""
        m = self.mixer
        return (m.n_heads, m.head_dim, m.head_dim), (m.shift_dim, 2)

    def run(
        self, x: Tensor, w: Tensors, cache: FixedState, table: Rotary | None, first: bool
    ) -> Tensor:
        """Mix with the token before, project, recur, norm and gate, project."""
        m = self.mixer
        before = torch.cat((cache.columns[..., 0].unsqueeze(1), x[:, :-1]), dim=1)
        cache.columns[..., 0] = x[:, -1]
        k, v, r, gate = (
            linear(torch.lerp(before, x, mix), w[name])
            for name, mix in zip(_INPUTS, w["mix"], strict=True)
        )
        r, k, v = (y.unflatten(-1, (m.n_heads, -1)).transpose(1, 2).float() for y in (r, k, v))
        log_decay = -w["decay"].float().exp().view(m.n_heads, 1, -1)
        bonus = w["bonus"].float().view(m.n_heads, 1, -1)
        out = recur(r, k, v, log_decay, bonus, cache.state, CHUNK_TOKENS if first else 1)
        cache.n_tokens += x.shape[1]
        flat = out.transpose(1, 2).flatten(2).flatten(0, 1)
        normed = group_norm(flat, m.n_heads, w["norm"].float(), w["norm_bias"].float(), _GROUP_EPS)
        return linear(normed.view(*x.shape[:2], -1).to(x.dtype) * silu(gate), w["output"])


class ChannelMixing:
    """Channel mixing of one layer; column 1 of the mixer's state holds its last input."""

    def __init__(self, mlp: MLP, receptance: Linear) -> None:
        self.mlp, self.receptance = mlp, receptance

    @classmethod
    def of(cls, layer: Layer) -> "ChannelMixing | None":
        """What mixes the channels of an RWKV-5 layer; None for any other layer."""
        if not any(isinstance(m, RWKV5) for m in layer.mixers) or not layer.linears:
            return None
        return cls(layer.mlps[0], layer.linears[0])

    def other_parameters(self, d_model: int) -> int:
        """Elements of the two mixing vectors."""
        return 2 * d_model

    def shapes(self, d_model: int) -> Shapes:
        """Mixing vectors (key, receptance) and three matrices."""
        matrices = (self.receptance, *self.mlp.linears(d_model))
        return {
            "mix": Shape((2, d_model), "ones"),
            **{x.name: Shape((x.n_out, x.n_in)) for x in matrices},
        }

    def run(self, x: Tensor, w: Tensors, cache: FixedState) -> Tensor:
        """[B, S, D] to the same."""
        before = torch.cat((cache.columns[..., 1].unsqueeze(1), x[:, :-1]), dim=1)
        cache.columns[..., 1] = x[:, -1]
        k, r = (torch.lerp(before, x, mix) for mix in w["mix"])
        hidden = relu(linear(k, w["up_proj"])).square()
        return sigmoid(linear(r, w[self.receptance.name])) * linear(hidden, w["down_proj"])


def recur(
    r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor, size: int
) -> Tensor:
    """r, k, v [B, H, S, h], decay and bonus [H, 1, h]; the state is updated in place.

    A padded token has no key, but would still decay the state: the last chunk decays by its own
    number of tokens.
    """
    s = r.shape[2]
    missing = -s % size
    r, k, v = (pad(y, (0, 0, 0, missing)) for y in (r, k, v))
    t = torch.arange(size, device=r.device, dtype=torch.float32)
    apart = (t[:, None] - t[None, :] - 1).unsqueeze(-1)  # steps between writing s and reading t
    powers = (apart.clamp(min=0) * log_decay.unsqueeze(1)).exp().masked_fill(apart < 0, 0.0)
    since = (t[:, None] * log_decay).exp()
    out = torch.empty_like(v)
    for start in range(0, s, size):
        n = min(size, s - start)
        piece = slice(start, start + size)
        rs, ks, vs = r[:, :, piece], k[:, :, piece], v[:, :, piece]
        scores = (rs.unsqueeze(3) * powers * ks.unsqueeze(2)).sum(-1)
        scores = scores + torch.diag_embed((rs * bonus * ks).sum(-1))
        out[:, :, piece] = torch.matmul(rs * since, state) + torch.matmul(scores, vs)
        left = ((n - 1 - t[:n, None]) * log_decay).exp()
        state.mul_((n * log_decay).exp().transpose(-1, -2))
        state.add_(torch.matmul((ks[:, :, :n] * left).transpose(-1, -2), vs[:, :, :n]))
    return out[:, :, :s]

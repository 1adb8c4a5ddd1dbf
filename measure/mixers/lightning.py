"""Lightning attention: S = e^-r S + k^T v, o = q S, one fixed rate r per head.

A block of a prompt is matmuls: o = (q k^T * decays) v inside it, q e^(-r i) S for what came before
(arXiv 2405.17381); a step is two matmuls with the state.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from costmodel.mixers.lightning import Lightning
from measure.mixers.base import FixedState, RecurrentRunner, Shape, Shapes
from measure.numerics import Numerics
from measure.parts import Rotary, Tensors, rms
from measure.weight_formats import linear

#: The output norm's, whatever the config says (transformers 5.23 ``models/minimax``).
_NORM_EPS = 1e-6


class LightningRunner(RecurrentRunner):
    """One layer; q, k and v of all heads are stacked in this order."""

    #: share of the depth of the model that lies below the layer: deeper heads forget more slowly
    depth = 0.0

    def __init__(self, mixer: Lightning, numerics: Numerics) -> None:
        self.mixer = mixer

    def at_layer(self, index: int, n_layers: int) -> "LightningRunner":
        """The same with the rates of one layer."""
        placed = LightningRunner(self.mixer, Numerics())
        placed.depth = index / (n_layers - 1 + 1e-5)
        return placed

    def shapes(self, d_model: int) -> Shapes:
        """Projections and the norm of the output."""
        shapes = {x.name: Shape.of(x) for x in self.mixer.linears(d_model)}
        return {**shapes, "norm": Shape((self.mixer.width,), "ones")}

    def state_sizes(self) -> tuple[tuple[int, ...], tuple[int, int]]:
        """[N, h, h]; no convolution."""
        m = self.mixer
        return (m.n_heads, m.head_dim, m.head_dim), (0, 0)

    def run(
        self, x: Tensor, w: Tensors, cache: FixedState, table: Rotary | None, first: bool
    ) -> Tensor:
        """Project and activate, attend, norm and gate, project."""
        m = self.mixer
        qkv = silu(linear(x, w["qkv_proj"])).float().unflatten(-1, (3, m.n_heads, m.head_dim))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, N, S, h]
        attend = self._prompt if first else self._step
        out = attend(q, k, v, self._rates(x.device), cache.state)
        cache.n_tokens += x.shape[1]
        out = rms(out.transpose(1, 2).flatten(2), w["norm"].float(), _NORM_EPS).to(x.dtype)
        return linear(out * linear(x, w["output_gate"]).sigmoid(), w["out_proj"])

    def _rates(self, device: torch.device) -> Tensor:
        """Decay rates [N, 1, 1]: 2^(-8 i / N), less with depth."""
        n = self.mixer.n_heads
        heads = torch.arange(1, n + 1, device=device, dtype=torch.float32)
        return (torch.exp2(-8.0 / n * heads) * (1.0 - self.depth + 1e-5))[:, None, None]

    def _prompt(self, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor) -> Tensor:
        """All tokens, a block at a time; the state is updated in place."""
        size = self.mixer.block_tokens
        out = torch.empty_like(v)
        index = torch.arange(min(size, q.shape[2]), device=q.device, dtype=torch.float32)[:, None]
        distance = index - index.T
        decays = (-rates * distance).masked_fill_(distance < 0, -torch.inf).exp_()
        for start in range(0, q.shape[2], size):
            piece = slice(start, start + size)
            qs, ks, vs = q[:, :, piece], k[:, :, piece], v[:, :, piece]
            n = qs.shape[2]
            scores = torch.matmul(qs, ks.transpose(-1, -2)).mul_(decays[:, :n, :n])
            before = torch.matmul(qs * (-rates * (index[:n] + 1)).exp(), state)
            out[:, :, piece] = torch.matmul(scores, vs).add_(before)
            left = (-rates * (n - 1 - index[:n])).exp()
            state.mul_((-rates * n).exp())
            state.add_(torch.matmul((ks * left).transpose(-1, -2), vs))
        return out

    @staticmethod
    def _step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor) -> Tensor:
        """One token."""
        state.mul_((-rates).exp())
        state.add_(torch.matmul(k.transpose(-1, -2), v))
        return torch.matmul(q, state)

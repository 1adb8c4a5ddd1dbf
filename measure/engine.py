"""A small real decoder built from an :class:`~costmodel.architecture.Architecture`.

    x = embedding[tokens]
    per layer:  x += o( attend( rope(q), rope(k), v ) ),   q k v = qkv( rms_norm(x) )
                x += down( silu(gate) * up ),              gate up = gate_up( rms_norm(x) )
    logits = head( rms_norm(last x) )

Attention lives in the layer's cache (``measure.methods``): it attends the prompt exactly and stores
what the method stores, then attends one new token per step in place. Weights are random unless
given: dimensions decide cost, values do not. Prefill takes the whole prompt at once.

Letters: B batch, S prompt tokens, T cached tokens, N query heads, K KV heads, H head size, D width,
F MLP width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, silu

from costmodel.architecture import Architecture, Layer
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.mixers import Attention
from costmodel.mlps import DenseMLP
from measure.methods.base import AbstractLayerCache

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Standard deviation of random weights: activations stay of order one, far from inf and denormals.
_WEIGHT_SCALE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """What changes the values but not the cost. Defaults: the llama family's."""

    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerWeights:
    """One layer; matrices as ``y = x W^T``, q, k, v (and gate, up) stacked in this order."""

    attention_norm: Tensor  # [D]
    qkv: Tensor  # [(N + 2 K) H, D]
    o: Tensor  # [D, N H]
    mlp_norm: Tensor  # [D]
    gate_up: Tensor  # [2 F, D]
    down: Tensor  # [D, F]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Weights:
    """All tensors of a decoder; ``head`` is ``embedding`` itself where they are tied."""

    embedding: Tensor  # [V, D]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [D]
    head: Tensor  # [V, D]

    @property
    def nbytes(self) -> int:
        """Bytes of the storages, each counted once."""
        tensors = [self.embedding, self.final_norm, self.head]
        for layer in self.layers:
            tensors += [
                *(layer.attention_norm, layer.qkv, layer.o),
                *(layer.mlp_norm, layer.gate_up, layer.down),
            ]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def check_supported(architecture: Architecture) -> None:
    """Raise ``NotApplicableError`` for a model this engine cannot run."""
    for index, layer in enumerate(architecture.layers):
        reason = _unsupported(layer)
        if reason:
            raise NotApplicableError(
                f"the torch engine runs layers of full attention and a gated MLP; layer {index} of "
                f"{architecture.name} {reason}"
            )


def _unsupported(layer: Layer) -> str | None:
    if len(layer.mixers) != 1 or len(layer.mlps) != 1 or layer.linears or layer.shared_with:
        return f"has {len(layer.mixers)} mixers, {len(layer.mlps)} MLPs, or shared weights"
    mixer, mlp = layer.mixers[0], layer.mlps[0]
    if not isinstance(mixer, Attention):
        return f"has a {mixer.KIND} mixer"
    plain = Attention(
        n_heads=mixer.n_heads,
        n_kv_heads=mixer.n_kv_heads,
        head_dim=mixer.head_dim,
        v_head_dim=mixer.head_dim,
    )
    if mixer != plain:
        return "has attention with a window, biases, gates, inner norms or unequal K and V heads"
    if not isinstance(mlp, DenseMLP) or not mlp.gated or mlp.bias:
        return "has an MLP that is not dense, gated and without bias"
    return None


def random_weights(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Weights:
    """Weights of the true sizes, the same for the same seed."""
    check_supported(architecture)
    generator = torch.Generator(device=device).manual_seed(seed)
    d, v = architecture.d_model, architecture.vocab_size

    def matrix(n_out: int, n_in: int) -> Tensor:
        weight = torch.empty(n_out, n_in, dtype=dtype, device=device)
        return weight.normal_(0.0, _WEIGHT_SCALE, generator=generator)

    def ones() -> Tensor:
        return torch.ones(d, dtype=dtype, device=device)

    def layer(description: Layer) -> LayerWeights:
        (qkv, o), (gate_up, down) = (
            part.linears(d) for part in (description.mixers[0], description.mlps[0])
        )
        return LayerWeights(
            attention_norm=ones(),
            qkv=matrix(qkv.n_out, qkv.n_in),
            o=matrix(o.n_out, o.n_in),
            mlp_norm=ones(),
            gate_up=matrix(gate_up.n_out, gate_up.n_in),
            down=matrix(down.n_out, down.n_in),
        )

    table = matrix(v, d)
    return Weights(
        embedding=table,
        layers=tuple(layer(x) for x in architecture.layers),
        final_norm=ones(),
        head=table if architecture.tied_embeddings else matrix(v, d),
    )


# What runs between the matmuls ---------------------------------------------------------------


def split_heads(qkv: Tensor, mixer: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, (N + 2 K) H] -> q [B, N, S, H], k and v [B, K, S, H]; views, nothing is copied."""
    b, s, _ = qkv.shape
    heads = qkv.view(b, s, -1, mixer.head_dim).transpose(1, 2)
    q, k, v = heads.split((mixer.n_heads, mixer.n_kv_heads, mixer.n_kv_heads), dim=1)
    return q, k, v


def rope_table(
    n_positions: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [positions, H] of the half-split rotary embedding.

    Pair (i, i + H/2) turns by position * theta^(-2 i / H). The sines of the first half are
    negative, so that rotating is ``x * cos + swapped halves of x * sin``.
    """
    powers = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.outer(
        torch.arange(n_positions, device=device, dtype=torch.float32), theta**-powers
    )
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat((cos, cos), dim=-1).to(dtype),
        torch.cat((-sin, sin), dim=-1).to(dtype),
    )


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [B, heads, S, H] by its positions' rows of the table."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, swapped, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


# The decoder ---------------------------------------------------------------------------------


class Decoder:
    """Runs a prompt, then one token at a time; the caches carry everything between calls.

    ``n_positions`` is the longest sequence the rotary table covers.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        *,
        n_positions: int,
        numerics: Numerics | None = None,
    ) -> None:
        check_supported(architecture)
        numerics = numerics or Numerics()
        self.n_positions = n_positions
        self.architecture = architecture
        self.weights = weights
        self.mixers = [x.mixers[0] for x in architecture.layers]
        self.norm_eps = numerics.norm_eps
        dtype, device = weights.embedding.dtype, weights.embedding.device
        self.tables = {
            m.head_dim: rope_table(n_positions, m.head_dim, numerics.rope_theta, dtype, device)
            for m in self.mixers
            if isinstance(m, Attention)
        }

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, caches: Sequence[AbstractLayerCache]) -> Tensor:
        """Run the prompt [B, S] into empty caches; logits [B, V] of the last token."""
        return self._forward(tokens, caches, first=True)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, caches: Sequence[AbstractLayerCache]) -> Tensor:
        """Run one token per sequence [B, 1] after what the caches hold; logits [B, V]."""
        return self._forward(tokens, caches, first=False)

    def _forward(
        self, tokens: Tensor, caches: Sequence[AbstractLayerCache], *, first: bool
    ) -> Tensor:
        weights = self.weights
        position = 0 if first else caches[0].n_tokens
        end = position + tokens.shape[1]
        if end > self.n_positions:
            raise ConfigError(
                f"the decoder was built for {self.n_positions} positions and is asked for {end}"
            )
        x = embedding(tokens, weights.embedding)
        for mixer, layer, cache in zip(self.mixers, weights.layers, caches, strict=True):
            assert isinstance(mixer, Attention)
            cos, sin = (table[position:end] for table in self.tables[mixer.head_dim])
            h = self._norm(x, layer.attention_norm)
            q, k, v = split_heads(linear(h, layer.qkv), mixer)
            q, k = rope(q, cos, sin), rope(k, cos, sin)
            attended = cache.prefill(q, k, v) if first else cache.decode(q, k, v)
            x = x + linear(attended.transpose(1, 2).flatten(2), layer.o)
            h = self._norm(x, layer.mlp_norm)
            x = x + linear(swiglu(linear(h, layer.gate_up)), layer.down)
        last = self._norm(x[:, -1], weights.final_norm)
        return linear(last, weights.head)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self.norm_eps)

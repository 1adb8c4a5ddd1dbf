"""What of a model's tensors one tensor-parallel rank holds, as Megatron-LM divides them.

Query, key and value rows by heads (key and value heads repeat where there are fewer than ranks),
MLP rows by hidden units, the matrices behind them by columns; embedding and head by rows of the
vocabulary, the last rank's padded with zeros. Norms, routers and biases of the matrices that are
summed are whole; those biases count on rank 0 only. Attention layers, dense MLPs and experts.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from costmodel.architecture import Architecture, Layer
from costmodel.errors import NotApplicableError
from costmodel.mixers import Attention
from costmodel.mlps import MLP, DenseMLP, MoE
from measure.engine import LayerWeights, Weights
from measure.parts import Tensors


def share_of(architecture: Architecture, tp: int) -> Architecture:
    """What one rank holds, its rows of the vocabulary included.

    Raises ``NotApplicableError`` for layers that this engine does not divide.
    """
    for index, layer in enumerate(architecture.layers):
        for mixer in layer.mixers:
            if not isinstance(mixer, Attention):
                raise NotApplicableError(
                    f"tensor parallel points divide attention layers and MLPs; layer {index} of "
                    f"{architecture.name} has a {mixer.KIND} mixer"
                )
            if mixer.extra_parameters and mixer.extra_parameters != 2 * mixer.head_dim:
                raise NotApplicableError(
                    f"tensor parallel points cannot divide the inner parameters of layer {index}"
                )
        for mlp in layer.mlps:
            widths = [mlp.d_ff] if isinstance(mlp, DenseMLP) else [mlp.d_ff, mlp.shared_d_ff]
            if any(width % tp for width in widths):
                raise NotApplicableError(f"MLP widths {widths} do not divide by tp={tp}")
    sharded = architecture.sharded(tp)
    return replace(sharded, vocab_size=-(-architecture.vocab_size // tp))


def shard_weights(architecture: Architecture, weights: Weights, tp: int, rank: int) -> Weights:
    """Copies of the tensors that ``rank`` holds."""
    layers = tuple(
        _layer(layer, tensors, tp, rank)
        for layer, tensors in zip(architecture.layers, weights.layers, strict=True)
    )
    embedding = _vocabulary(weights.embedding, tp, rank)
    tied = weights.head is weights.embedding
    return Weights(
        embedding=embedding,
        layers=layers,
        outer=weights.outer,
        head=embedding if tied else _vocabulary(weights.head, tp, rank),
    )


def _vocabulary(table: Tensor, tp: int, rank: int) -> Tensor:
    rows = -(-len(table) // tp)
    part = table[rank * rows : (rank + 1) * rows]
    return pad(part, (0, 0, 0, rows - len(part))).clone()


def _layer(layer: Layer, weights: LayerWeights, tp: int, rank: int) -> LayerWeights:
    mixers = tuple(
        _attention(mixer, tensors, tp, rank)
        for mixer, tensors in zip(layer.mixers, weights.mixers, strict=True)
    )
    mlp = _mlp(layer.mlps[0], weights.mlp, tp, rank) if layer.mlps else {}
    return LayerWeights(norms=weights.norms, mixers=mixers, mlp=mlp)


def _attention(mixer: object, w: Tensors, tp: int, rank: int) -> Tensors:
    assert isinstance(mixer, Attention)
    sizes = [
        (mixer.n_heads, mixer.head_dim),
        (mixer.n_kv_heads, mixer.head_dim),
        (mixer.n_kv_heads, mixer.v_head_dim),
    ]
    if mixer.output_gate:
        sizes.append((mixer.n_heads, mixer.head_dim))
    found: dict[str, Tensor] = dict(w)
    for name in ("qkv", "qkv_bias"):
        if name in w:
            parts = w[name].split([heads * size for heads, size in sizes])
            found[name] = torch.cat(
                [
                    _heads(part, heads, tp, rank)
                    for part, (heads, _) in zip(parts, sizes, strict=True)
                ]
            )
    found["o"] = _columns(w["o"], tp, rank)
    return _summed_bias(found, "o_bias", rank)


def _heads(tensor: Tensor, heads: int, tp: int, rank: int) -> Tensor:
    """Rows of a rank's heads; where there are fewer heads than ranks, of the one it shares."""
    own = max(1, heads // tp)
    first = rank * heads // tp
    return tensor.unflatten(0, (heads, -1))[first : first + own].flatten(0, 1)


def _mlp(mlp: MLP, w: Tensors, tp: int, rank: int) -> Tensors:
    found: dict[str, Tensor] = dict(w)
    for name, tensor in w.items():
        base = name.removesuffix("_bias")
        axis = tensor.dim() - 1 if name.endswith("_bias") else tensor.dim() - 2
        if base.endswith(("gate_up_proj", "gate_up")):
            halves = tensor.chunk(2, dim=axis)
            found[name] = torch.cat([x.chunk(tp, axis)[rank] for x in halves], axis)
        elif base.endswith(("up_proj", "experts_up")):
            found[name] = tensor.chunk(tp, axis)[rank].clone()
        elif base.endswith(("down_proj", "experts_down")):
            if name.endswith("_bias"):
                found = dict(_summed_bias(found, name, rank))
            else:
                found[name] = _columns(tensor, tp, rank)
    assert isinstance(mlp, DenseMLP | MoE)
    return found


def _columns(tensor: Tensor, tp: int, rank: int) -> Tensor:
    return tensor.chunk(tp, dim=-1)[rank].clone()


def _summed_bias(found: dict[str, Tensor], name: str, rank: int) -> dict[str, Tensor]:
    if rank and name in found:
        found[name] = torch.zeros_like(found[name])
    return found

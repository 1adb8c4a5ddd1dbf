"""What the tests of runnable methods share: caches, random tokens, attention spelled out."""

import torch
from torch import Tensor

from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from measure.methods import build_layer_cache
from measure.methods.base import Realisation

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

BATCH, HEADS, KV_HEADS, SIZE = 2, 4, 2, 16


def cache(
    spec: str,
    *,
    dtype=torch.float32,
    reserve: int = 0,
    mixer: Attention | None = None,
    realisation: Realisation = "best",
):
    """An empty cache of four heads over two KV heads, unless told otherwise."""
    if mixer is None:
        mixer = Attention(n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=SIZE, v_head_dim=SIZE)
    return build_layer_cache(
        parse_method(spec),
        mixer,
        batch=BATCH,
        dtype=dtype,
        device=torch.device("cpu"),
        reserve_tokens=reserve,
        realisation=realisation,
    )


def tokens(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [B, N, n, H], k and v [B, K, n, H]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, n), (KV_HEADS, n), (KV_HEADS, n))
    q, k, v = (torch.randn(BATCH, *s, SIZE, generator=generator) for s in shapes)
    return q, k, v


def part(qkv: tuple[Tensor, Tensor, Tensor], start: int, stop: int):
    """Tokens ``start`` to ``stop`` of each."""
    return tuple(x[:, :, start:stop] for x in qkv)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """Softmax of one query [H] over keys [T, H]."""
    return ((k @ q) / len(q) ** 0.5).softmax(-1)

"""Attention as published implementations run it: repeats, score matrices, softmax in fp32.

The chains are those of ``costmodel.methods.eager``, from transformers 4.x ``modeling_llama.py``.
"""

import torch
from torch import Tensor


def repeat_kv(x: Tensor, n_heads: int) -> Tensor:
    """[B, K, ...] copied to all query heads [B, N, ...]; as it is without grouping."""
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def eager_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    hidden: Tensor | None = None,
    first_queries: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over the whole square: out [B, N, S, H], probabilities [B, N, S, S].

    ``hidden`` [S, S] are pairs that are masked besides; ``first_queries`` are queries [B, N, S, H]
    that meet the first keys [B, K, n, H] in the place of the others.
    """
    n_heads, s = q.shape[1], q.shape[2]
    k, v = repeat_kv(k, n_heads), repeat_kv(v, n_heads)
    scores = torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    if first_queries is not None:
        queries, keys = first_queries
        keys = repeat_kv(keys, n_heads).transpose(-1, -2)
        scores[..., : keys.shape[-1]] = torch.matmul(queries, keys) / q.shape[-1] ** 0.5
    lowest = torch.finfo(q.dtype).min
    mask = torch.full((s, s), lowest, dtype=q.dtype, device=q.device).triu_(1)
    if hidden is not None:
        mask.masked_fill_(hidden, lowest)
    scores = scores + mask  # rebound: the unmasked square is not held any longer
    weights = softmax_fp32(scores)
    return torch.matmul(weights, v), weights


def eager_step(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One query [B, N, 1, H] over keys [B, K, T, H]: out [B, N, 1, H], weights [B, N, 1, T].

    ``hidden`` [B, N, T] are tokens that are masked.
    """
    n_heads = q.shape[1]
    keys, values = repeat_kv(keys, n_heads), repeat_kv(values, n_heads)
    scores = torch.matmul(q, keys.transpose(-1, -2)) / q.shape[-1] ** 0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden.unsqueeze(2), torch.finfo(q.dtype).min)
    weights = softmax_fp32(scores)
    return torch.matmul(weights, values), weights


def softmax_fp32(scores: Tensor) -> Tensor:
    """Softmax in fp32, back in the type of the scores."""
    return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)

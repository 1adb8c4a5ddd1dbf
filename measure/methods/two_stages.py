"""Attention over several sets of keys with one softmax, as thunlp/InfLLM runs it on plain torch.

``inf_llm/attention/dot_production_attention/torch_impl.py``: every stage repeats K and V to all
query heads and holds its masked scores; the last joins them, takes the softmax in the compute type
and multiplies stage by stage.
"""

import torch
from torch import Tensor

from measure.methods.base import AbstractLayerCache
from measure.methods.eager import repeat_kv


def turned_in_fp32(cache: AbstractLayerCache, x: Tensor, positions: Tensor) -> Tensor:
    """``cache.turned`` in fp32 and back (``inf_llm/attention/rope.py``)."""
    return cache.turned(x.float(), positions).to(x.dtype)


def within_window(rows: Tensor, columns: Tensor, window: int) -> Tensor:
    """Pairs [queries, keys] of a query at ``rows`` with itself and the window - 1 before it."""
    age = rows[:, None] - columns
    return (age >= 0) & (age < window)


class TwoStages:
    """Collects stages, then attends all of them at once."""

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self._values: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._scored: list[bool] = []
        #: what every key of the stages asked for received from all queries [B, N, keys]
        self.received: list[Tensor] = []

    def append(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, scored: bool = False
    ) -> None:
        """Queries [B, N, Q, H] over keys [B, K, T, H], of which they see ``seen`` [Q, T]."""
        n_heads = q.shape[1]
        k, v = repeat_kv(k, n_heads), repeat_kv(v, n_heads)
        scores = torch.matmul(q, k.transpose(-1, -2)).masked_fill(~seen, -torch.inf)
        self._scores.append(scores.mul_(q.shape[-1] ** -0.5))
        self._values.append(v)
        self._masks.append(seen)
        self._scored.append(scored)

    def result(self) -> Tensor:
        """Output [B, N, Q, H] over the keys of all stages."""
        joined = torch.cat(self._scores, dim=-1)
        weights = joined.softmax(dim=-1)
        parts = weights.split([x.shape[-1] for x in self._scores], dim=-1)
        out = None
        stages = zip(parts, self._masks, self._values, self._scored, strict=True)
        for part, mask, values, scored in stages:
            used = part.masked_fill(~mask, 0)
            if scored:
                self.received.append(used.sum(dim=-2))
            mixed = torch.matmul(used, values)
            out = mixed if out is None else out.add_(mixed)
        assert out is not None
        return out

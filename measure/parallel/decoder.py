"""The decoder of one rank: what blocks add is summed over ranks, the vocabulary is divided."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import embedding, linear

from measure.engine import Decoder


class ParallelDecoder(Decoder):
    """Two sums over ranks per layer, one behind the embedding; logits are gathered."""

    def __init__(self, *arguments: Any, vocab_size: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.vocab_size = vocab_size

    def _embed(self, tokens: Tensor) -> Tensor:
        rows = len(self.weights.embedding)
        local = tokens - distributed.get_rank() * rows
        own = (local >= 0) & (local < rows)
        x = embedding(local.clamp(0, rows - 1), self.weights.embedding)
        return self._joined(x * own.unsqueeze(-1).to(x.dtype))

    def _joined(self, part: Tensor) -> Tensor:
        part = part.contiguous()
        distributed.all_reduce(part)
        return part

    def _scores(self, last: Tensor) -> Tensor:
        own = linear(last, self.weights.head)
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, own)
        return torch.cat(parts, dim=-1)[..., : self.vocab_size]

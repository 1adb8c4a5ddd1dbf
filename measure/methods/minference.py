"""MInference run for real: every query attends vertical columns and slash blocks, per query head.

The last 64 queries are scored against all keys. Sums over columns choose the vertical tokens, sums
over diagonals of blocks of 64 x 64 tokens the slash blocks: as in microsoft/MInference
``convert_vertical_slash_indexes`` all rows of a block attend the whole block a diagonal crosses,
and a column inside a chosen block counts once. Here blocks are aligned, and half of the kept tokens
are columns, half blocks. The first columns and the diagonal itself are always chosen. Queries that
see no more than the kept tokens see everything before them, in one fused call.

``reference`` repeats K and V to all query heads and does all of this one head after another.
"""

from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from costmodel.methods.base import AbstractMethod
from costmodel.methods.minference import MInference
from measure.methods.base import AbstractPromptAttention, Realisation
from measure.methods.eager import repeat_kv

_LAST_QUERIES = 64
#: Columns that are always chosen.
_SINK_COLUMNS = 30


@final
class MInferenceAttention(AbstractPromptAttention):
    """Vertical-slash sparse attention over a prompt."""

    NAME: ClassVar[str] = "minference"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "K and V repeated to all query heads, then index and sparse attention one head after "
        "another. The sparse kernel is that of `best`: upstream's is Triton and CUDA alone, and "
        "what it multiplies depends on the data"
    )

    def _configure(self, method: AbstractMethod) -> None:
        assert isinstance(method, MInference)
        self.kept = method.kept_tokens
        self.block = method.block_tokens
        self.n_blocks = method.kept_blocks
        self.n_columns = self.kept - self.n_blocks * self.block

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, S, H] and [B, K, S, H] -> [B, N, S, H]."""
        if q.shape[2] <= self.kept:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self._head_by_head(q, k, v) if self.is_reference else self._sparse(q, k, v)

    def _head_by_head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``minference_forward``."""
        k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        for head in range(q.shape[1]):
            one = slice(head, head + 1)
            out[:, one] = self._sparse(q[:, one], k[:, one], v[:, one])
        return out

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, g = q.shape[2], self.block
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        dense = self.kept // g * g
        if dense:
            q_part, k_part, v_part = (x[:, :, :dense] for x in (q, k, v))
            out[:, :, :dense] = scaled_dot_product_attention(
                q_part, k_part, v_part, is_causal=True, enable_gqa=True
            )
        columns, diagonals = self.chosen(q, k)
        n_diagonals = -(-s // g)
        is_chosen = torch.zeros(*q.shape[:2], n_diagonals, dtype=torch.bool, device=q.device)
        is_chosen.scatter_(-1, diagonals, True)
        column_kv = [_gather(x, columns) for x in (k, v)]
        inside = torch.arange(g, device=q.device)
        for row in range(dense // g, n_diagonals):
            start, stop = row * g, min(s, row * g + g)
            rows = torch.arange(start, stop, device=q.device)[:, None]
            below = row - diagonals  # the key block of every diagonal, negative: there is none
            keys = (below.unsqueeze(-1) * g + inside).flatten(-2)  # [B, N, blocks g]
            seen_keys = (keys >= 0).unsqueeze(2) & (keys.unsqueeze(2) <= rows)
            twice = is_chosen.gather(-1, (row - columns // g).clamp_(min=0))
            seen_columns = ~twice.unsqueeze(2) & (columns.unsqueeze(2) <= rows)
            block_kv = [_gather(x, keys.clamp(0, s - 1)) for x in (k, v)]
            queries = q[:, :, start:stop] * q.shape[-1] ** -0.5
            scores = torch.cat(
                [torch.matmul(queries, x.transpose(-1, -2)) for x in (column_kv[0], block_kv[0])],
                dim=-1,
            )
            seen = torch.cat((seen_columns, seen_keys), dim=-1)
            weights = scores.masked_fill_(~seen, -torch.inf).softmax(dim=-1)
            n = columns.shape[-1]
            out[:, :, start:stop] = torch.matmul(weights[..., :n], column_kv[1])
            out[:, :, start:stop] += torch.matmul(weights[..., n:], block_kv[1])
        return out

    def chosen(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Columns [B, N, v] and block diagonals [B, N, d] (0: the main one), ascending."""
        b, n_heads, s, size = q.shape
        n_kv, g, last = k.shape[1], self.block, min(_LAST_QUERIES, s)
        queries = (q[:, :, -last:] * size**-0.5).reshape(b, n_kv, -1, size)
        scores = torch.matmul(queries, k.transpose(-1, -2)).view(b, n_heads, last, s)
        hidden = torch.ones(last, s, dtype=torch.bool, device=q.device).triu_(s - last + 1)
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1, dtype=torch.float32)
        vertical = weights.sum(dim=2)
        vertical[..., :_SINK_COLUMNS] = torch.inf
        columns = vertical.topk(self.n_columns, dim=-1).indices.sort(dim=-1).values
        by_block = pad(weights, (0, -s % g)).unflatten(-1, (-1, g)).sum(dim=-1)
        row_block = torch.arange(s - last, s, device=q.device)[:, None] // g
        diagonal = row_block - torch.arange(by_block.shape[-1], device=q.device)
        slash = torch.zeros(b, n_heads, by_block.shape[-1], device=q.device)
        index = diagonal.clamp(min=0).expand_as(by_block).flatten(2)
        slash.scatter_add_(-1, index, by_block.flatten(2))
        slash[..., 0] = torch.inf
        diagonals = slash.topk(self.n_blocks, dim=-1).indices.sort(dim=-1).values
        return columns, diagonals


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` [B, N, n] of x [B, K, S, H] for every query head: [B, N, n, H]."""
    grouped = index.reshape(index.shape[0], x.shape[1], -1)
    found = x.gather(2, grouped.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
    return found.view(*index.shape, x.shape[-1])

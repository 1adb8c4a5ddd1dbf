"""Quest run for real: the whole cache stays, a step reads the pages that may matter.

Every page of p tokens keeps the elementwise minimum and maximum of its keys. A step bounds what
each page's keys can score, sum_i max(q_i min_i, q_i max_i), takes the largest bound of a KV head's
query heads, and attends the best pages and the new token. A chosen page that is not full is
attended in full width with its empty places masked. The first two layers are dense. As long as a
step reads everything there are no pages.

``reference`` runs the three kernels of the published step one after the other: bounds of every page
and query head in memory, their top-k, and attention of every query head over its own pages.
"""

from collections.abc import Iterator
from typing import ClassVar, final

import torch
from torch import Tensor

from costmodel.methods.base import AbstractMethod
from costmodel.methods.quest import Quest
from measure.kernels._dropping import heads_fit, quest_step
from measure.methods.base import Realisation
from measure.methods.buffers import GrowingBuffer
from measure.methods.eager import repeat_kv
from measure.methods.fixed_steps import NO_ROOM, add_token, has_room, still_grows
from measure.methods.kept_tokens import KeptTokensCache, attend_all, gather_tokens

_DENSE_LAYERS = 2
_MIN_PAGES = 3


@final
class QuestCache(KeptTokensCache):
    """K and V of every token, minimum and maximum key of every page."""

    NAME: ClassVar[str] = "quest"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "the three CUDA kernels' work as torch operations: page bounds of every query head in "
        "memory, top-k, attention of every query head over its own pages. Heads of a group choose "
        "together (upstream: no GQA), and a page is read because of its bound alone (upstream: the "
        "last one always). Its evaluation script multiplies everything under a mask and saves "
        "nothing: not run"
    )

    def _build(self, method: AbstractMethod) -> None:
        assert isinstance(method, Quest)
        self.page, self.keep = method.page_tokens, method.keep_tokens
        self.keys, self.values = self._kv_buffers()
        self.low, self.high = (self._buffer((self.mixer.head_dim,), self.dtype) for _ in range(2))

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from (self.keys, self.values, self.low, self.high)

    def reserve(self, n_tokens: int) -> None:
        """Room for all tokens and their pages."""
        for buffer in (self.keys, self.values):
            buffer.reserve(n_tokens)
        for buffer in (self.low, self.high):
            buffer.reserve(-(-n_tokens // self.page) if n_tokens > self.keep else 0)

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep everything; pages where a step will not read it all."""
        self.keys.append(k)
        self.values.append(v)
        self.n_tokens = k.shape[2]
        if self.n_tokens > self.keep:
            self._make_pages()

    def _make_pages(self) -> None:
        keys, n = self.keys.entries(), self.n_tokens
        whole = n - n % self.page
        paged = keys[:, :, :whole].unflatten(2, (-1, self.page))
        parts = [torch.aminmax(paged, dim=3)] if whole else []
        if whole < n:
            parts.append(torch.aminmax(keys[:, :, whole:], dim=2, keepdim=True))
        for buffer, pieces in zip((self.low, self.high), zip(*parts, strict=True), strict=True):
            buffer.append(torch.cat(pieces, dim=2))

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Estimate, choose, attend; then the new token joins its page."""
        t = self.n_tokens
        if t <= self.keep or self.layer < _DENSE_LAYERS:
            if self.fixed_shapes:
                out = add_token(self, q, (k, v), (self.keys, self.values))
                self._join_page(k)
                return out
            self._append(k, v)
            return attend_all(self, q, self.keys.entries(), self.values.entries())
        if self.fused and heads_fit(self.mixer):
            return quest_step(self, q, k, v, self._n_chosen)
        if self.is_reference:
            return self._reference_step(q, k, v)
        chosen, hidden = self._chosen_tokens(self.fold(q))
        keys, values = (gather_tokens(x.whole, chosen) for x in (self.keys, self.values))
        queries = self.fold(q) * q.shape[-1] ** -0.5
        scores = torch.cat([torch.matmul(queries, x.transpose(-1, -2)) for x in (keys, k)], dim=-1)
        scores[..., :-1].masked_fill_(hidden.unsqueeze(2), float("-inf"))
        weights = scores.softmax(dim=-1)
        out = torch.matmul(weights[..., :-1], values) + torch.matmul(weights[..., -1:], v)
        if self.fixed_shapes:
            for buffer, x in ((self.keys, k), (self.values, v)):
                buffer.put(self.now(), x)
                buffer.length += 1
            self._join_page(k)
        else:
            self._append(k, v)
        return self.unfold(out)

    def _join_page(self, k: Tensor) -> None:
        """The new token's page begins with it, or widens; the device knows which."""
        now = self.now()
        page, is_first = now // self.page, now % self.page == 0
        for buffer, wider in ((self.low, torch.minimum), (self.high, torch.maximum)):
            joined = wider(buffer.whole.index_select(2, page), k)
            buffer.put(page, torch.where(is_first, k, joined))
            buffer.length = -(-(self.n_tokens + 1) // self.page)
        self.n_tokens += 1

    def _why_shapes_change(self) -> str:
        grows = still_grows(self.n_tokens, self.keep + 1)
        if grows or self._n_chosen * self.page >= self.n_tokens:
            return grows or "the chosen pages hold all tokens: what a step reads still grows"
        return "" if has_room(self.keys) and self.low.length else NO_ROOM

    @property
    def _n_chosen(self) -> int:
        """Pages a step reads, where there are so many."""
        return max(_MIN_PAGES, self.keep // self.page)

    def chosen_pages(self, queries: Tensor, *, each_head: bool = False) -> Tensor:
        """Pages [B, K, n] to read for queries [B, K, G, H]; ``each_head`` chooses once for every
        query head, [B, N, n].
        """
        n_pages = self.low.length
        n_bounded = self.low.capacity if self.fixed_shapes else n_pages
        low, high = (x.entries(0, n_bounded).unsqueeze(2) for x in (self.low, self.high))
        one = queries.unsqueeze(3)
        bounds = torch.maximum(one * low, one * high).sum(dim=-1, dtype=torch.float32)
        if self.fixed_shapes:  # pages without a token yet
            begins = torch.arange(n_bounded, device=queries.device) * self.page
            bounds.masked_fill_(begins >= self.now(), -torch.inf)
        n_chosen = min(self._n_chosen, n_pages)
        best = bounds.amax(dim=2)
        if each_head:
            best = repeat_kv(best, self.mixer.n_heads)
        return best.topk(n_chosen, dim=-1).indices

    def _reference_step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``decode_estimate``, ``decode_topk`` and ``decode_sparse_attn``."""
        n_kv, n_heads = self.mixer.n_kv_heads, self.mixer.n_heads
        chosen, hidden = self._chosen_tokens(self.fold(q), each_head=True)
        index = chosen.unflatten(1, (n_kv, -1)).flatten(2)
        keys, values = (
            gather_tokens(x.entries(), index).view(*chosen.shape, x.entries().shape[-1])
            for x in (self.keys, self.values)
        )
        k_all, v_all = repeat_kv(k, n_heads), repeat_kv(v, n_heads)
        queries = q * q.shape[-1] ** -0.5
        scores = torch.cat(
            [torch.matmul(queries, x.transpose(-1, -2)) for x in (keys, k_all)], dim=-1
        )
        scores[..., :-1].masked_fill_(hidden.unsqueeze(2), float("-inf"))
        weights = scores.softmax(dim=-1)
        out = torch.matmul(weights[..., :-1], values) + torch.matmul(weights[..., -1:], v_all)
        self._append(k, v)
        return out

    def _chosen_tokens(self, queries: Tensor, *, each_head: bool = False) -> tuple[Tensor, Tensor]:
        """Positions [B, K, n] of the chosen pages' tokens, and which of them do not exist."""
        t = self.n_tokens
        pages = self.chosen_pages(queries, each_head=each_head)
        if pages.shape[-1] * self.page >= t:
            everything = torch.arange(t, device=queries.device).expand(*pages.shape[:2], -1)
            return everything, torch.zeros_like(everything, dtype=torch.bool)
        inside = torch.arange(self.page, device=queries.device)
        positions = (pages.unsqueeze(-1) * self.page + inside).flatten(-2)
        now = self.now()
        return torch.minimum(positions, now - 1), positions >= now

    def _append(self, k: Tensor, v: Tensor) -> None:
        t = self.n_tokens
        self.keys.append(k)
        self.values.append(v)
        self.n_tokens += 1
        if self.n_tokens <= self.keep:
            return
        if self.low.length == 0:
            self._make_pages()
        elif t % self.page == 0:
            self.low.append(k)
            self.high.append(k)
        else:
            last = self.low.length - 1
            self.low.write(last, torch.minimum(self.low.entries(last), k))
            self.high.write(last, torch.maximum(self.high.entries(last), k))

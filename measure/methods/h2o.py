"""H2O run for real: heavy hitters and recent tokens, one score and one position per slot.

A prompt is attended by a fused kernel; a second pass over its scores, block after block of queries,
sums what every key received (O(S) memory). A step adds its probabilities to the scores and drops
the lightest token that is not recent: ``slot`` overwrites it, ``real_drop`` gathers the others and
appends. Scores of a KV head are sums over its query heads. Where the budget holds the whole prompt
no scores are kept: they start with the step in which it overflows.

``mask`` keeps all K and V and hides what was dropped. Its prompt is attended plainly and its scores
start with the first step, which still sees everything; what is hidden never returns.

``reference`` attends eagerly: the S x S probabilities of the prompt are held, K and V repeated to
all query heads; ``slot`` permutes its slots, the others grow by ``torch.cat``.
"""

from collections.abc import Iterator
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from costmodel.methods.base import AbstractMethod
from costmodel.methods.h2o import H2O
from measure.kernels._dropping import h2o_step, heads_fit
from measure.methods.base import Realisation
from measure.methods.buffers import GrowingBuffer
from measure.methods.eager import eager_prompt, eager_step
from measure.methods.fixed_steps import still_grows
from measure.methods.kept_tokens import (
    KeptTokensCache,
    attend_all,
    gather_tokens,
    overwrite,
    query_blocks,
)


@final
class H2OCache(KeptTokensCache):
    """K, V, summed score and position of the kept tokens."""

    NAME: ClassVar[str] = "h2o"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "eager attention with the S x S probabilities in memory; `slot` permutes its slots "
        "into copies (h2o_flexgen), `real_drop` and `mask` concatenate and gather every step "
        "(h2o_hf). Scores of a KV head are sums over its query heads (upstream: MHA)"
    )

    def _build(self, method: AbstractMethod) -> None:
        assert isinstance(method, H2O)
        self.method = method
        self.keys, self.values = self._kv_buffers()
        self.scores = self._buffer((), torch.float32)
        self.positions = self._buffer((), torch.int32)
        self.heavy = self.recent = 0

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from (self.keys, self.values, self.scores, self.positions)

    def _set_budget(self, n_prompt: int) -> None:
        self.heavy, self.recent = (int(x) for x in self.method.budget(float(n_prompt)))

    def reserve(self, n_tokens: int) -> None:
        """Room for the budget of a prompt of ``n_tokens``, the largest it can become."""
        self._set_budget(n_tokens)
        if self.is_reference and self.method.variant != "slot":
            return  # it grows by torch.cat
        kept = min(self.heavy + self.recent, n_tokens)
        for buffer in (self.keys, self.values):
            buffer.reserve(n_tokens if self._masks else kept)
        for buffer in (self.scores, self.positions):
            buffer.reserve(kept)

    @property
    def _masks(self) -> bool:
        return self.method.variant == "mask"

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend exactly; sum the scores where tokens will be dropped."""
        self._set_budget(k.shape[2])
        received = None
        is_cut = self.heavy + self.recent < k.shape[2] and not self._masks
        if is_cut and self.is_reference:
            out, weights = eager_prompt(q, k, v)
            if self.method.variant == "real_drop":
                weights = weights.clone()
            received = weights.unflatten(1, (k.shape[1], -1)).sum(dim=(2, 3), dtype=torch.float32)
        else:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            if is_cut:
                received = self._received(q, k)
        self._keep(k, v, received)
        return out

    def _received(self, q: Tensor, k: Tensor) -> Tensor:
        if self.fused and heads_fit(self.mixer):
            from measure.kernels import prompt_scores

            return prompt_scores.received_scores(q, k)
        return received_scores(q, k)

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep a prompt without queries: as if every key had received the same."""
        self._set_budget(k.shape[2])
        self._keep(k, v, torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device))

    def _keep(self, k: Tensor, v: Tensor, received: Tensor | None) -> None:
        self.n_tokens = n = k.shape[2]
        if received is None or self.heavy + self.recent >= n or self._masks:
            self.keys.append(k)
            self.values.append(v)
            return
        for buffer in self._buffers():
            buffer.fit(self.heavy + self.recent)
        chosen = self._chosen(received)
        self.keys.append(gather_tokens(k, chosen))
        self.values.append(gather_tokens(v, chosen))
        self.scores.append(received.gather(2, chosen))
        self.positions.append(chosen.int())

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend kept tokens and the new one, update the scores, drop one."""
        if self.n_tokens < self.heavy + self.recent:
            self.keys.append(k)
            self.values.append(v)
            self.n_tokens += 1
            return attend_all(self, q, self.keys.entries(), self.values.entries())
        if self._masks:
            return self._masked_step(q, k, v)
        if self.positions.length == 0:
            self._start_scores()
        if self.fused and self.method.variant == "slot" and heads_fit(self.mixer):
            return h2o_step(self, q, k, v)
        keys, values = self.keys.entries(), self.values.entries()
        if self.is_reference:
            out, weights = self._reference_step(q, keys, values, k, v)
        else:
            out, weights = self.attend_with_new(q, keys, values, k, v)
        received = weights.sum(dim=2)
        self.scores.entries().add_(received[..., :-1])
        now = self.now()
        lightest = self._lightest(now)
        position = torch.zeros_like(self.positions.entries(0, 1)).add_(now)
        new = (k, v, received[..., -1:], position)
        for buffer, entry in zip(self._buffers(), new, strict=True):
            if self.method.variant == "slot":
                overwrite(buffer, lightest, entry)
            else:
                _drop_and_append(buffer, lightest, entry)
        self.n_tokens += 1
        return out

    def _reference_step(
        self, q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """FlexGen permutes slots x heads to heads x slots, the Hugging Face form concatenates; both
        attend eagerly. Out [B, N, 1, H], fp32 weights [B, K, G, C + 1].
        """
        if self.method.variant == "slot":
            keys, values = (
                x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (keys, values)
            )
        out, weights = eager_step(q, torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2))
        if self.method.variant == "real_drop":
            weights = weights.clone()
        return out, weights.view(*k.shape[:2], -1, weights.shape[-1]).float()

    def _lightest(self, now: Tensor) -> Tensor:
        """Slots [B, K] of the lightest tokens that are not recent; the new one is recent itself."""
        old = self.positions.entries() <= now - self.recent
        return self.scores.entries().masked_fill(~old, torch.inf).argmin(dim=-1)

    def _masked_step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend everything with what was dropped hidden, update the scores, drop one."""
        self.keys.append(k)
        self.values.append(v)
        kept, hidden, now = self.positions.entries().long(), None, self.now()
        if self.positions.length:
            hidden = torch.ones(
                *kept.shape[:2], self.n_tokens + 1, dtype=torch.bool, device=k.device
            )
            hidden.scatter_(-1, kept, False)
            hidden[..., -1] = False
        keys, values = self.keys.entries(), self.values.entries()
        if self.is_reference:
            group = self.mixer.n_heads // self.mixer.n_kv_heads
            masked = None if hidden is None else hidden.repeat_interleave(group, dim=1)
            out, weights = eager_step(q, keys, values, masked)
            weights = weights.clone().view(*k.shape[:2], -1, weights.shape[-1]).float()
        else:
            scores = torch.matmul(self.fold(q) * q.shape[-1] ** -0.5, keys.transpose(-1, -2))
            if hidden is not None:
                scores.masked_fill_(hidden.unsqueeze(2), -torch.inf)
            weights = scores.softmax(dim=-1, dtype=torch.float32)
            out = self.unfold(torch.matmul(weights.to(v.dtype), values))
        received = weights.sum(dim=2)
        if self.positions.length:
            self.scores.entries().add_(received.gather(-1, kept))
            lightest = self._lightest(now)
            overwrite(self.scores, lightest, received[..., -1:])
            position = torch.zeros_like(self.positions.entries(0, 1)).add_(now)
            overwrite(self.positions, lightest, position)
        else:
            chosen = self._chosen(received)
            self.scores.append(received.gather(2, chosen))
            self.positions.append(chosen.int())
        self.n_tokens += 1
        return out

    def _why_shapes_change(self) -> str:
        if self._masks:
            return "what is hidden is chosen in the first step, and all K and V grow"
        return still_grows(self.n_tokens, self.heavy + self.recent)

    def _chosen(self, received: Tensor) -> Tensor:
        """Positions [B, K, C] of the heavy hitters and the recent tokens, ascending."""
        n = received.shape[-1]
        heavy = received[..., : n - self.recent].topk(self.heavy, dim=-1).indices
        recent = torch.arange(n - self.recent, n, device=received.device)
        recent = recent.expand(*received.shape[:2], -1)
        return torch.cat((heavy.sort(dim=-1).values, recent), dim=-1)

    def _start_scores(self) -> None:
        zeros = torch.zeros(self.batch, self.mixer.n_kv_heads, self.n_tokens, device=self.device)
        self.scores.append(zeros)
        self.positions.append(torch.arange(self.n_tokens, device=self.device).expand_as(zeros))


def received_scores(q: Tensor, k: Tensor) -> Tensor:
    """Attention every key of a prompt received, [B, K, S], summed over queries and their heads."""
    received = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    for _, stop, weights in query_blocks(q, k):
        received[..., :stop] += weights.sum(dim=(2, 3))
        del weights  # not beside those of the next block
    return received


def _drop_and_append(buffer: GrowingBuffer, slots: Tensor, entry: Tensor) -> None:
    """Gather all but ``slots`` [B, K] and put the new entry behind them; order is kept."""
    data = torch.cat((buffer.entries(), entry), dim=2)
    kept = torch.arange(buffer.length, device=slots.device).expand(*slots.shape, -1)
    kept = kept + (kept >= slots.unsqueeze(-1))
    index = kept.view(*kept.shape, *(1,) * (data.dim() - 3)).expand(*kept.shape, *data.shape[3:])
    buffer.entries().copy_(data.gather(2, index))

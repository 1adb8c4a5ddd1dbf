"""TOVA run for real: every step drops the token its query attended to least.

All heads of a layer keep the same tokens: probabilities are averaged over heads. The prompt's last
query chooses the first C; afterwards the new token takes the slot of the one that leaves, unless it
is the least attended itself.

``reference`` attends the prompt eagerly, keeps keys before their rotation with their positions,
and on every step concatenates, rotates all keys, attends eagerly and gathers all but one token.
"""

from collections.abc import Iterator
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from costmodel.methods.base import AbstractMethod
from costmodel.methods.tova import Tova
from measure.kernels._dropping import heads_fit, tova_step
from measure.methods.base import Realisation
from measure.methods.buffers import GrowingBuffer
from measure.methods.eager import eager_prompt, eager_step
from measure.methods.fixed_steps import still_grows
from measure.methods.kept_tokens import KeptTokensCache, attend_all, gather_tokens


@final
class TovaCache(KeptTokensCache):
    """K and V of at most C tokens; ``reference``: keys unrotated, and positions once it drops."""

    NAME: ClassVar[str] = "tova"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "eager attention; keys cached before rotation, with positions; every step concatenates, "
        "rotates all keys, takes the top C of C + 1 and gathers them (upstream: batch 1)"
    )

    def _build(self, method: AbstractMethod) -> None:
        assert isinstance(method, Tova)
        self.keep = method.keep_tokens
        self.ROTATES = self.is_reference
        self.keys, self.values = self._kv_buffers()
        self.positions = GrowingBuffer(self.batch, 1, (), torch.int64, self.device)

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from (self.keys, self.values, self.positions)

    def reserve(self, n_tokens: int) -> None:
        """Room for C tokens."""
        if self.is_reference:
            return  # it grows by torch.cat
        for buffer in (self.keys, self.values):
            buffer.reserve(min(n_tokens, self.keep))

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend exactly; the last query's probabilities choose."""
        if self.is_reference:
            return self._reference_prefill(q, k, v)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        weights = None
        if k.shape[2] > self.keep:
            query = self.fold(q[:, :, -1:]) * q.shape[-1] ** -0.5
            scores = torch.matmul(query, k.transpose(-1, -2))
            weights = scores.softmax(dim=-1, dtype=torch.float32).mean(dim=(1, 2))
        self._keep(k, v, weights)
        return out

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep a prompt without queries: as if all its tokens were attended alike."""
        self._keep(k, v, torch.zeros(k.shape[0], k.shape[2], device=k.device))

    def _keep(self, k: Tensor, v: Tensor, weights: Tensor | None) -> None:
        self.n_tokens = k.shape[2]
        if weights is not None and self.n_tokens > self.keep:
            chosen = weights.topk(self.keep, dim=-1).indices.sort(dim=-1).values
            chosen = chosen.unsqueeze(1).expand(-1, k.shape[1], -1)
            if self.is_reference:
                self.positions.append(chosen[:, :1])
            k, v = gather_tokens(k, chosen), gather_tokens(v, chosen)
        self.keys.append(k)
        self.values.append(v)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend C tokens and the new one; the least attended of them leaves."""
        if self.is_reference:
            return self._reference_step(q, k, v)
        self.n_tokens += 1
        if self.n_tokens <= self.keep:
            self.keys.append(k)
            self.values.append(v)
            return attend_all(self, q, self.keys.entries(), self.values.entries())
        if self.fused and heads_fit(self.mixer):
            return tova_step(self, q, k, v)
        keys, values = self.keys.entries(), self.values.entries()
        out, weights = self.attend_with_new(q, keys, values, k, v)
        least = weights.mean(dim=(1, 2)).argmin(dim=-1)
        stays = least == self.keep  # the new token is the least attended: nothing is written
        rows, slots = torch.arange(len(least), device=k.device), torch.where(stays, 0, least)
        for held, new in ((keys, k), (values, v)):
            old = held[rows, :, slots]  # [B, K, H]
            # not by scatter_, see ``kept_tokens.overwrite``
            held[rows, :, slots] = torch.where(stays.view(-1, 1, 1), old, new.squeeze(2))
        return out

    def _why_shapes_change(self) -> str:
        return still_grows(self.n_tokens, self.keep)

    def _reference_prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``llama_custom.py``, then ``reduce`` of ``tova_cache.py``."""
        n, weights = k.shape[2], None
        if n <= self.keep:
            out = self.attend_prompt(q, k, v)
        else:
            positions = torch.arange(n, device=k.device)
            out, square = eager_prompt(self.turned(q, positions), self.turned(k, positions), v)
            weights = square[:, :, -1].float().mean(dim=1)
        self._keep(k, v, weights)
        return out

    def _reference_step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t, is_plain = self.n_tokens, self.n_tokens < self.keep
        if not is_plain and not self.positions.length:
            everything = torch.arange(t, device=k.device).expand(self.batch, 1, -1)
            self.positions.append(everything)
        keys = torch.cat((self.keys.entries(), k), dim=2)
        values = torch.cat((self.values.entries(), v), dim=2)
        new = torch.full((self.batch, 1, 1), t, device=k.device)
        self.n_tokens += 1
        if is_plain:
            self.keys.hold(keys)
            self.values.hold(values)
            positions = torch.arange(t + 1, device=k.device)
            return attend_all(self, self.turned(q, new), self.turned(keys, positions), values)
        positions = torch.cat((self.positions.entries(), new), dim=2)
        out, weights = eager_step(self.turned(q, new), self.turned(keys, positions), values)
        best = weights[:, :, -1].float().mean(dim=1).topk(self.keep, dim=-1).indices
        chosen = best.sort(dim=-1).values.unsqueeze(1)
        self.positions.hold(positions.gather(2, chosen))
        chosen = chosen.expand(-1, k.shape[1], -1)
        self.keys.hold(gather_tokens(keys, chosen))
        self.values.hold(gather_tokens(values, chosen))
        return out

"""StreamingLLM run for real: the first I tokens and a ring of the last W.

Positions are places in the cache (``positions=cache``). Among the latest W tokens those places are
as far apart as the tokens themselves, and the sinks' places are their own; so nothing that is
cached has to turn: only the query that meets the sinks is turned back by as many positions as were
dropped. The prompt is attended through the same band, block after block of queries.

With ``positions=fixed`` sinks have one distance, W + I, from every query that has lost tokens: as
far as their places put them. What differs is a step, whose window of W holds its own token, so that
the oldest cached one is masked. (Upstream also moves sinks away from queries that still see all.)
"""

from collections.abc import Iterator
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from costmodel.methods.base import AbstractMethod
from costmodel.methods.block_retrieval import MODEL_CHUNK
from costmodel.methods.streaming_llm import StreamingLLM
from measure.kernels._dropping import heads_fit, ring_step
from measure.methods.base import Realisation
from measure.methods.buffers import GrowingBuffer
from measure.methods.eager import eager_prompt, eager_step
from measure.methods.fixed_steps import still_grows
from measure.methods.kept_tokens import KeptTokensCache, attend_all
from measure.methods.two_stages import TwoStages, turned_in_fp32, within_window
from measure.numerics import Rope
from measure.parts import QUERY_BLOCK, rotate


@final
class StreamingCache(KeptTokensCache):
    """Sinks, and the window as a ring whose ``_oldest`` entry leaves next."""

    NAME: ClassVar[str] = "streaming_llm"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "keys cached before rotation, concatenated and rotated on every step; `positions=cache` "
        "eager over the whole square, `positions=fixed` the two-stage torch attention of InfLLM in "
        "chunks of 8192. The prompt's mask is the band (upstream attends a whole prompt densely "
        "and drops afterwards), so that both forms give the same"
    )

    def _build(self, method: AbstractMethod) -> None:
        assert isinstance(method, StreamingLLM)
        self.method = method
        self.ROTATES = self.is_reference
        self.sinks = self.window = self._oldest = 0
        self.keys, self.values = self._kv_buffers()

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from (self.keys, self.values)

    def _set_budget(self, n_prompt: int) -> None:
        self.sinks, self.window = (int(x) for x in self.method.budget(float(n_prompt)))

    def reserve(self, n_tokens: int) -> None:
        """Room for sinks and window of a prompt of ``n_tokens``."""
        self._set_budget(n_tokens)
        if self.is_reference:
            return  # it grows by torch.cat
        for buffer in self._buffers():
            buffer.reserve(min(n_tokens, self.sinks + self.window))

    def clear(self) -> None:
        """Empty; the ring starts over."""
        super().clear()
        self._oldest = 0

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend through the band, then keep its end."""
        s = k.shape[2]
        self._set_budget(s)
        if s <= self.sinks + self.window:
            out = self.attend_prompt(q, k, v)
        elif self.is_reference:
            fixed = self.method.positions == "fixed"
            out = self._two_stage_prompt(q, k, v) if fixed else self._eager_prompt(q, k, v)
        else:
            out = self._banded(q, k, v)
        self.store(k, v)
        return out

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep the first I and the last W tokens."""
        self.n_tokens = n = k.shape[2]
        self._set_budget(n)
        first = min(n, self.sinks)
        last = max(first, n - self.window)
        for buffer, x in ((self.keys, k), (self.values, v)):
            buffer.append(torch.cat((x[:, :, :first], x[:, :, last:]), dim=2))

    def _turned_back(self, q: Tensor, positions: Tensor) -> Tensor:
        """Turn queries [B, heads, n, H] at ``positions`` [n] to their places in the cache."""
        places = positions.clamp(max=self.sinks + self.window)
        if self.rope is None:
            return q
        return _turn(q, places - positions, self.rope)

    def _banded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every query attends the sinks and the W + ... tokens up to itself: I + W in all."""
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        for start in range(0, q.shape[2], QUERY_BLOCK):
            rows = slice(start, start + QUERY_BLOCK)
            out[:, :, rows] = self._block(q[:, :, rows], k, v, start)
        return out

    def _block(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """The same for queries [B, N, n, H] from position ``start`` on; no score outlives it."""
        b, n_kv, _, size = k.shape
        stop = start + q.shape[2]
        first = min(self.sinks, stop)
        low = max(start - self.window + 1, first)
        rows = torch.arange(start, stop, device=q.device)
        queries = q * size**-0.5
        turned = self._turned_back(queries, rows)
        scores = torch.cat(
            [
                torch.matmul(x.reshape(b, n_kv, -1, size), y.transpose(-1, -2))
                for x, y in ((turned, k[:, :, :first]), (queries, k[:, :, low:stop]))
            ],
            dim=-1,
        )
        columns = torch.arange(first + stop - low, device=q.device)
        columns[first:] += low - first
        seen = columns <= rows[:, None]
        seen &= (columns < self.sinks) | (columns > rows[:, None] - self.window)
        scores.unflatten(2, (-1, stop - start)).masked_fill_(~seen, float("-inf"))
        values = torch.cat((v[:, :, :first], v[:, :, low:stop]), dim=2)
        block = torch.matmul(scores.softmax(dim=-1), values)
        return block.reshape(b, -1, stop - start, v.shape[-1])

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend sinks, window and the new token, which takes the oldest one's place."""
        t, keys, values = self.n_tokens, self.keys, self.values
        is_full = t >= self.sinks + self.window
        if is_full and self.fused and heads_fit(self.mixer):
            out = ring_step(self, q, k, v, self._oldest)
            self.n_tokens, self._oldest = t + 1, (self._oldest + 1) % self.window
            return out
        now = self.now()
        self.n_tokens += 1
        if self.is_reference:
            return self._reference_step(q, k, v, t)
        if not is_full:
            keys.append(k)
            values.append(v)
            return attend_all(self, q, keys.entries(), values.entries())
        # the ring turns with the position, which a captured step reads on the device
        slot = (now - (t - self._oldest)) % self.window + self.sinks
        queries = self.fold(q) * q.shape[-1] ** -0.5
        turned = self.fold(self._turned_back(q, now)) * q.shape[-1] ** -0.5
        scores = torch.cat(
            (
                torch.matmul(turned, keys.entries(0, self.sinks).transpose(-1, -2)),
                torch.matmul(queries, keys.entries(self.sinks).transpose(-1, -2)),
                torch.matmul(queries, k.transpose(-1, -2)),
            ),
            dim=-1,
        )
        if self.method.positions == "fixed":
            scores.index_fill_(-1, slot, -torch.inf)
        weights = scores.softmax(dim=-1)
        out = torch.matmul(weights[..., :-1], values.entries())
        out += torch.matmul(weights[..., -1:], v)
        for buffer, new in ((keys, k), (values, v)):
            buffer.put(slot, new)
        self._oldest = (self._oldest + 1) % self.window
        return self.unfold(out)

    def _why_shapes_change(self) -> str:
        return still_grows(self.n_tokens, self.sinks + self.window)

    # Published operations ----------------------------------------------------------------------

    def _places(self, positions: Tensor) -> Tensor:
        """Where in the cache queries at ``positions`` [n] meet the sinks."""
        return positions.clamp(max=self.sinks + self.window)

    def _eager_prompt(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``modify_llama.py``: the square of scores; queries meet the sinks at their places."""
        positions = torch.arange(k.shape[2], device=k.device)
        turned, sinks = self.turned(k, positions), slice(0, self.sinks)
        out, _ = eager_prompt(
            self.turned(q, positions),
            turned,
            v,
            hidden=self._hidden(positions, positions),
            first_queries=(self.turned(q, self._places(positions)), turned[:, :, sinks]),
        )
        return out

    def _hidden(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Pairs between sinks and window: [queries, keys]."""
        return (columns >= self.sinks) & (columns <= rows[:, None] - self.window)

    def _two_stage_prompt(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``stream_llm.py``, chunk after chunk."""
        out = []
        for start in range(0, k.shape[2], int(MODEL_CHUNK)):
            stop = min(start + int(MODEL_CHUNK), k.shape[2])
            first = max(0, start - self.window)
            kept = torch.cat([torch.arange(*x, device=k.device) for x in
                              ((0, min(self.sinks, first)), (first, stop))])  # fmt: skip
            out.append(self._two_stages(q[:, :, start:stop], k[:, :, kept], v[:, :, kept], stop))
        return torch.cat(out, dim=2)

    def _two_stages(self, q: Tensor, keys: Tensor, values: Tensor, n_seen: int) -> Tensor:
        """Attend the last tokens of ``n_seen``; keys and values are those kept, sinks first."""
        n = q.shape[2]
        rows = torch.arange(n_seen - n, n_seen, device=q.device)
        local = min(keys.shape[2], n + self.window)
        columns = torch.arange(n_seen - local, n_seen, device=q.device)
        near = turned_in_fp32(self, keys[:, :, -local:].contiguous(), columns)
        stages = TwoStages()
        stages.append(
            turned_in_fp32(self, q, rows),
            near,
            values[:, :, -local:].contiguous(),
            within_window(rows, columns, self.window),
        )
        n_first = min(self.sinks, keys.shape[2])
        if n_first and n_seen > self.window:
            columns = torch.arange(n_first, device=q.device)
            stages.append(
                turned_in_fp32(self, q, self._places(rows)),
                turned_in_fp32(self, keys[:, :, :n_first].contiguous(), columns),
                values[:, :, :n_first].contiguous(),
                rows[:, None] - columns >= self.window,
            )
        return stages.result()

    def _reference_step(self, q: Tensor, k: Tensor, v: Tensor, t: int) -> Tensor:
        keys = torch.cat((self.keys.entries(), k), dim=2)
        values = torch.cat((self.values.entries(), v), dim=2)
        n = keys.shape[2]
        position = torch.tensor([t], device=q.device)
        if t < self.sinks + self.window:
            turned = self.turned(keys, torch.arange(n, device=q.device))
            out = attend_all(self, self.turned(q, position), turned, values)
        elif self.method.positions == "fixed":
            out = self._two_stages(q, keys, values, t + 1)
        else:
            turned = self.turned(keys, torch.arange(n, device=q.device))
            out, _ = eager_step(self.turned(q, self._places(position)), turned, values)
        if n > self.sinks + self.window:
            keys, values = (
                torch.cat((x[:, :, : self.sinks], x[:, :, n - self.window :]), dim=2)
                for x in (keys, values)
            )
        self.keys.hold(keys)
        self.values.hold(values)
        return out

    def snapshot(self) -> Any:
        """Copies of everything kept, and where the ring is."""
        return self._oldest, super().snapshot()

    def restore(self, snapshot: Any) -> None:
        """Put the copies back."""
        self._oldest = snapshot[0]
        super().restore(snapshot[1])


def _turn(x: Tensor, by: Tensor, rope: Rope) -> Tensor:
    """Turn x [B, heads, n, H] by ``by`` [n] positions."""
    n = int(x.shape[-1] * rope.fraction)
    angles = torch.outer(by.float(), rope.frequencies(n, x.device))
    cos, sin = angles.cos(), angles.sin()
    if rope.interleaved:
        pair = torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)
    else:
        pair = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    table = pair[0].to(x.dtype), pair[1].to(x.dtype)
    return rotate(x, table, interleaved=rope.interleaved)

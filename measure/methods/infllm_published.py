"""InfLLM as its authors' torch form runs it, on the cache of ``measure.methods.infllm``.

``inf_llm/attention/context_manager.py`` with ``torch_impl.py``: a chunk's queries attend the window
before them in one stage, keys rotated anew in fp32, and in a second one what lies in the attention
buffer, into which first tokens and remainder are copied behind the blocks; both share a softmax.
The window holds its keys unrotated. (Upstream keeps views of what it concatenated, which hold more
than is used; here only what is used is held.)
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from measure.methods.buffers import GrowingBuffer
from measure.methods.two_stages import TwoStages, turned_in_fp32, within_window

if TYPE_CHECKING:
    from measure.methods.infllm import InfLLMCache


def published_prompt(cache: "InfLLMCache", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend a prompt that the budgets do not hold, chunk by chunk; [B, N, S, H]."""
    s, local, init, p = k.shape[2], cache.local, cache.init, cache.block
    received = torch.zeros(cache.batch, cache.mixer.n_heads, s, device=k.device)
    far = turned_in_fp32(cache, q, torch.tensor([local], device=q.device))
    cache.take_full_size()
    out = []
    for start in range(0, s, cache.chunk):
        stop = min(s, start + cache.chunk)
        low, outside = max(0, start - local), max(0, stop - local)
        stages, queries = TwoStages(), slice(start, stop)
        window = slice(low, stop)
        _append_window(cache, stages, q[:, :, queries], k[:, :, window], v[:, :, window])
        n_blocks = cache.fetched(far[:, :, queries])[0].shape[2]
        first = min(init, outside)
        rest = slice(
            init + cache.blocks.n_blocks * p, max(init + cache.blocks.n_blocks * p, outside)
        )
        kv = [
            _in_buffer(buffer, init, x[:, :, :first], n_blocks, x[:, :, rest])
            for buffer, x in zip(cache.blocks.buffer, (k, v), strict=True)
        ]
        rows = torch.arange(start, stop, device=k.device)[:, None]
        away = torch.cat(
            (
                torch.arange(first, device=k.device),
                torch.full((n_blocks,), -1, device=k.device),  # seen by all
                torch.arange(rest.start, rest.stop, device=k.device),
            )
        )
        stages.append(far[:, :, queries], kv[0], kv[1], (away < 0) | (away <= rows - local))
        out.append(stages.result())
        received[:, :, window] += stages.received[0]
        cache.send_blocks(k, v, received, stop)
    cache.settle(k, k, v, received.to(cache.dtype))
    return torch.cat(out, dim=2)


def published_step(cache: "InfLLMCache", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend one token once the budgets do not hold the cache; [B, N, 1, H]."""
    slot, n_away = cache.n_tokens % cache.local, cache.rest[0].length - cache.local + 1
    windows = [
        torch.cat((x.entries(slot), x.entries(0, slot), new), dim=2)
        for x, new in zip(cache.window, (k, v), strict=True)
    ]
    stages = TwoStages()
    _append_window(cache, stages, q, windows[0], windows[1])
    far = turned_in_fp32(cache, q, torch.tensor([cache.local], device=q.device))
    n_blocks = cache.fetched(far)[0].shape[2]
    kv = [
        _in_buffer(buffer, cache.init, first.entries(), n_blocks, rest.entries(0, n_away))
        for buffer, first, rest in zip(cache.blocks.buffer, cache.first, cache.rest, strict=True)
    ]
    seen = torch.ones(1, kv[0].shape[2], dtype=torch.bool, device=q.device)
    stages.append(far, kv[0], kv[1], seen)
    out = stages.result()
    # without the token that leaves the window: it is masked and received nothing
    cache.take(k, k, v, stages.received[0][..., 1:].to(cache.dtype))
    return out


def _append_window(
    cache: "InfLLMCache", stages: TwoStages, q: Tensor, keys: Tensor, values: Tensor
) -> None:
    """The stage of the last queries over the window that ends with them, at true distances."""
    columns = torch.arange(keys.shape[2], device=q.device)
    rows = columns[-q.shape[2] :]
    stages.append(
        turned_in_fp32(cache, q, rows),
        turned_in_fp32(cache, keys, columns),
        values,
        within_window(rows, columns, cache.local),
        scored=True,
    )


def _in_buffer(
    buffer: GrowingBuffer, init: int, first: Tensor, n_blocks: int, rest: Tensor
) -> Tensor:
    """First tokens before and remainder behind the blocks' tokens, which are in the buffer."""
    start, end = init - first.shape[2], init + n_blocks
    buffer.entries(start, init).copy_(first)
    buffer.entries(end, end + rest.shape[2]).copy_(rest)
    return buffer.entries(start, end + rest.shape[2])

"""Operations of InfLLM around its attention kernel: lookup, transfers, copies.

A chunk of queries (one token when decoding) looks up its blocks once for all heads of a layer.
"""

from dataclasses import dataclass, replace

import numpy as np

from costmodel.methods.base import layer_bytes
from costmodel.methods.chains import elementwise, host_link, rotate_in_fp32, select
from costmodel.mixers import Attention
from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Point

MANAGER = "thunlp/InfLLM inf_llm/attention/context_manager.py"
#: Prompt tokens that upstream feeds to the model at once (``chunk_size`` of its configurations).
MODEL_CHUNK = 8192.0
#: Chunks of a prompt that ``chunk_counts`` looks at together, so that its memory is bounded.
_CHUNKS_AT_ONCE = 16_384.0


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """Tokens (init, local), blocks (topk, cached); scalars, or arrays for a preset."""

    init: Array
    local: Array
    topk: Array
    cached: Array
    block_tokens: float
    chunk_tokens: float


def lookup(
    mixer: Attention, point: Point, budget: Budget, n_blocks: Array, *, count: Array
) -> Operation:
    """Mean query of all heads against every representative, top-k; one choice for all heads.

    ``n_blocks``: those of a lookup, on average; none where all of them are wanted anyway.
    """
    size = point.batch * n_blocks * (mixer.n_heads * mixer.head_dim)
    reference = point.level == "reference"
    return select(
        "block_lookup",
        rows=point.batch,
        length=n_blocks,
        keep=budget.topk,
        state_bytes=size * point.kv_element_bytes,
        executed_flops=2.0 * size,
        dtype=point.dtype,
        launches=4 if reference else 1,
        count=count,
        source=f"{MANAGER} calc_block_topk" if reference else "",
        formula="N Hk b per representative read, 2 N Hk FLOPs each",
    )


def links(
    mixer: Attention, point: Point, budget: Budget, n_blocks: Array, *, count: Array
) -> Operations:
    """Blocks that are not on the GPU, fetched; upstream the host waits for the indices.

    Blocks asked for are taken as uniform among all: a share cached / n of them is on the GPU.
    """
    reference = point.level == "reference"
    _, missed = _wanted(budget, n_blocks)
    fetch = host_link(
        "fetch_blocks",
        layer_bytes(mixer, point, missed * budget.block_tokens),
        pinned=True,
        messages=np.maximum(2 * missed, 1.0),
        count=count,
        source=f"{MANAGER} MemoryUnit.load" if reference else "",
        formula="topk max(0, 1 - cached / n) blocks of K and V",
    )
    if not reference:
        return (fetch,)
    wait = host_link(
        "indices_to_host",
        point.batch * budget.topk * 8.0,
        pinned=False,
        count=count,
        host_waits=True,
        source=f"{MANAGER} calc_block_topk .cpu().tolist()",
        formula="8 bytes per index; the host waits for them",
    )
    return wait, fetch


def looked_up(budget: Budget, n_blocks: Array) -> Array:
    """Representatives a lookup scores: none as long as all blocks are wanted."""
    return np.where(n_blocks > budget.topk, n_blocks, 0.0)


def chunk_counts(
    prompt_tokens: Array, budget: Budget, block: float, *, spare: float = -1.0
) -> tuple[Array, Array]:
    """(pairs per head, representatives scored) of a prompt on an engine without a fused kernel.

    Queries of a chunk are scored in blocks of ``block``; one ending at e computes its window of
    min(e, W + block + spare) keys, masked ones too, and from afar the first tokens, the blocks
    looked up, and the rest of what lies more than W behind e. Every distinct prompt is counted
    once.
    """
    s = np.asarray(prompt_tokens, dtype=np.float64)
    arrays = np.broadcast_arrays(s, budget.init, budget.local, budget.topk)
    distinct, where = np.unique(np.stack([x.ravel() for x in arrays]), axis=1, return_inverse=True)
    n, init, local, topk = (x[:, None] for x in distinct)
    p, chunk = budget.block_tokens, budget.chunk_tokens
    pairs, scored = np.zeros(len(n)), np.zeros(len(n))
    last = np.ceil(n.max() / chunk)
    for first in np.arange(0.0, last, _CHUNKS_AT_ONCE):
        start = chunk * np.arange(first, min(first + _CHUNKS_AT_ONCE, last))[None, :]
        n_blocks = np.maximum(np.floor((start - init - local) / p), 0.0)
        for offset in np.arange(0.0, chunk, block):
            low = np.minimum(start + offset, n)
            high = np.minimum(np.minimum(low + block, start + chunk), n)
            queries = np.maximum(high - low, 0.0)
            outside = np.maximum(high - local, 0.0)
            far = np.minimum(init, outside) + np.minimum(topk, n_blocks) * p
            far = far + np.maximum(outside - init - n_blocks * p, 0.0)
            pairs += (queries * (np.minimum(high, local + queries + spare) + far)).sum(axis=1)
        scored += np.where((start < n) & (n_blocks > topk), n_blocks, 0.0).sum(axis=1)
    shape = np.shape(arrays[0])
    return pairs[where.ravel()].reshape(shape), scored[where.ravel()].reshape(shape)


def _wanted(budget: Budget, n_blocks: Array) -> tuple[Array, Array]:
    """(blocks a lookup asks for, those of them that are not on the GPU)."""
    wanted = np.minimum(budget.topk, n_blocks)
    return wanted, wanted * np.maximum(1.0 - budget.cached / np.maximum(n_blocks, 1.0), 0.0)


def copies(
    mixer: Attention,
    point: Point,
    budget: Budget,
    *,
    n_blocks: Array,
    remainder: Array,
    new_tokens: float,
    count: Array,
    cats: Array,
) -> Operations:
    """What upstream copies around the kernel: ``cats`` joins of the caches, ``count`` lookups."""
    window = np.minimum(point.cached_tokens, budget.local)
    joined = layer_bytes(mixer, point, window + remainder + new_tokens)
    wanted, missed = _wanted(budget, n_blocks)
    # a missed block is copied twice: to the buffer and to the cache of blocks
    block_copies = point.batch * (wanted + missed)
    one = replace(point, batch=1.0)
    return (
        elementwise(
            "window_and_remainder_cat",
            workspace_bytes=2 * joined,
            transient_bytes=joined,
            launches=6,
            count=cats,
            source=f"{MANAGER} append torch.cat",
            formula="window, remainder and new tokens of K and V read and written",
        ),
        rotate_in_fp32(mixer, point, window + new_tokens, count=count),
        elementwise(
            "copy_blocks",
            count=count * block_copies,
            workspace_bytes=2 * layer_bytes(mixer, one, budget.block_tokens),
            launches=2,
            source=f"{MANAGER} MemoryUnit.load, block after block and sequence after sequence",
            formula="K, then V of one retrieved block into the attention buffer",
        ),
        elementwise(
            "fill_buffer",
            count=count,
            workspace_bytes=2 * layer_bytes(mixer, point, np.maximum(remainder - window, 0.0)),
            launches=4,
            source=f"{MANAGER} get_global_hidden_and_mask",
            formula="first tokens and the remainder copied into the attention buffer",
        ),
    )


def prompt_copies(
    mixer: Attention, point: Point, budget: Budget, *, n_blocks: Array, remainder: Array
) -> Operations:
    """``copies`` over a prompt: one join per model pass of 8192 tokens, one lookup per chunk."""
    s = point.prompt_tokens
    return copies(
        mixer,
        point.at(s),
        budget,
        n_blocks=n_blocks,
        remainder=remainder,
        new_tokens=budget.chunk_tokens,
        count=np.ceil(s / budget.chunk_tokens),
        cats=np.ceil(s / MODEL_CHUNK),
    )


def in_chunks(
    operation: Operation, chunks: Array, queries: Array, keys: Array, *, launches: float
) -> Operation:
    """The same work as one run per chunk of queries, of ``launches`` kernels (window, first tokens
    and blocks, merge; or the scores).
    """
    shape = {
        **operation.shape,
        "q_len": queries,
        "kv_len": np.minimum(operation.shape["kv_len"], keys),
        "pairs": operation.shape["pairs"] / chunks,
        "window_tokens": np.inf,
    }
    return replace(
        operation,
        shape=shape,
        count=chunks,
        launches=launches,
        flops=operation.flops / chunks,
        executed_flops=operation.counted_flops / chunks,
        vector_flops=operation.vector_flops / chunks,
        state_bytes=operation.state_bytes / chunks,
        workspace_bytes=operation.workspace_bytes / chunks,
        activation_bytes=operation.activation_bytes / chunks,
    )

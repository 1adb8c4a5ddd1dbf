"""What SnapKV and PyramidKV share: scoring by the last queries, and decoding over what is left."""

from dataclasses import replace

import numpy as np

from costmodel.fused_kernels import fused_step
from costmodel.methods.base import State, layer_bytes, not_stored
from costmodel.methods.chains import (
    alive_around_bytes,
    blocked_transient_bytes,
    cache_cat,
    elementwise,
    gather_tokens,
    select,
)
from costmodel.methods.eager import alive_per_score, repeat_kv, softmax_chain_bytes
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Point


def keep_prompt_apart(
    mixer: Attention, point: Point, attention: Operations, *, source: str
) -> Operations:
    """Exact attention over K and V that are not cached as they are.

    ``reference`` repeats them to all query heads first.
    """
    apart = not_stored(attention, point)
    if point.level == "ideal":
        return apart
    s = point.prompt_tokens
    around = layer_bytes(mixer, point, s) * _copies(mixer) + alive_around_bytes(mixer, point)
    apart = tuple(replace(op, transient_bytes=op.transient_bytes + around) for op in apart)
    return (*repeat_kv(mixer, point, s, source=f"{source} repeat_kv", from_state=False), *apart)


def _copies(mixer: Attention) -> float:
    """Times K and V that their repetition to all query heads holds beside them."""
    ratio = mixer.n_heads / mixer.n_kv_heads
    return ratio if ratio > 1 else 0.0


def score_select_gather(
    mixer: Attention, point: Point, *, window: float, keep: Array, pooling: float, source: str
) -> Operations:
    """Scores of the last ``window`` queries, pooled; top-k; the kept tokens copied.

    ``ideal`` adds each score to its KV head's sum as it is computed; ``reference`` holds the
    window x S matrix of every query head, and selects and copies per query head.
    """
    s = point.prompt_tokens
    b = point.element_bytes
    heads = point.batch * mixer.n_heads
    rows = point.batch * mixer.n_kv_heads
    window_tokens = np.minimum(window, s)
    scores = heads * window_tokens * s
    reference = point.level == "reference"
    ratio = mixer.n_heads / mixer.n_kv_heads
    full_layer = layer_bytes(mixer, point, s)
    unfused = blocked_transient_bytes(mixer, point, np.inf, block=window)
    around = alive_around_bytes(mixer, point)
    matmul = Operation(
        name="window_scores",
        kind="prefill_attention",
        executed_flops=scores * (2.0 * mixer.head_dim),
        vector_flops=0.0 if reference else 6 * scores,
        activation_bytes=heads * window_tokens * (mixer.head_dim * b),
        workspace_bytes=scores * b + full_layer / 2 * ratio if reference else rows * s * 4.0,
        transient_bytes=full_layer * ratio + around + scores * b
        if reference
        else np.maximum(full_layer, unfused) + rows * s * 4.0,
        dtype=point.dtype,
        shape={
            "batch": point.batch,
            "q_len": window_tokens,
            "kv_len": s,
            "pairs": window_tokens * s,
            "n_heads": mixer.n_heads,
            "n_kv_heads": mixer.n_kv_heads,
            "head_dim": mixer.head_dim,
            "v_head_dim": 0.0,
            "window_tokens": np.inf,
        },
        source=source if reference else "",
        formula="2 Hk N w S FLOPs: the last w queries against all keys",
    )
    choose = select(
        "select_kept",
        rows=heads if reference else rows,
        length=s - window_tokens,
        keep=keep - window_tokens,
        workspace_bytes=(heads * 2 * b if reference else rows * 4.0) * s,
        launches=2,
        source=source if reference else "",
        formula=f"pooling of {pooling:g} tokens, top-k per head",
    )
    gather = gather_tokens(
        mixer, point, keep, heads=ratio if reference else 1.0, source=source if reference else ""
    )
    if not reference:
        return (*fused_step(point, "window_scores", matmul), choose, gather)
    softmax = elementwise(
        "window_softmax",
        vector_flops=6 * scores,
        workspace_bytes=scores * (softmax_chain_bytes(b) + b) + heads * s * 2 * b,
        transient_bytes=full_layer * ratio + around + scores * alive_per_score(point),
        launches=7,
        source=source,
        formula="B N w S (7 b + 8): scale, mask, softmax in fp32, cast, sum over the window",
    )
    return matmul, softmax, choose, gather


def decode_kept(mixer: Attention, point: Point, tokens: Array, *, source: str) -> Operations:
    """A decode step over ``tokens`` per KV head.

    ``ideal``: the model's own step. ``reference``: the cache holds all query heads, and grows by
    ``torch.cat``.
    """
    if point.level == "ideal":
        room = tokens + (point.reserved_tokens - point.cached_tokens)
        after = replace(point, cached_tokens=tokens, reserved_tokens=room)
        first, *others = mixer.decode(after)
        return (*fused_step(after, "attention16", first), *others)
    ratio = mixer.n_heads / mixer.n_kv_heads
    size = layer_bytes(mixer, point, tokens)
    attention = decode_attention(
        mixer,
        point,
        read_tokens=tokens,
        executed_tokens=tokens + 1,
        read_bytes=size,
        written_bytes=layer_bytes(mixer, point, 1.0),
        workspace_bytes=(ratio - 1) * (size + layer_bytes(mixer, point, 1.0)),
        source=f"{source} _flash_attention_forward",
        formula="G B t K (Hk + Hv) b read: every query head has its own copy",
    )
    if ratio > 1:
        shape = {**attention.shape, "n_kv_heads": mixer.n_heads, "kv_bytes": ratio * size}
        attention = replace(attention, shape=shape)
    return (
        cache_cat(mixer, point, tokens, source=f"{source} past_key_value.update", heads=ratio),
        attention,
    )


def held(mixer: Attention, point: Point, size: Array) -> State:
    """The state where ``size`` bytes of K heads are kept; an implementation that caches all query
    heads (level ``reference``) holds G times that, and grows with every token.
    """
    if point.level == "ideal":
        return State(size)
    repeated = size * (mixer.n_heads / mixer.n_kv_heads)
    return State(repeated, allocated=repeated)

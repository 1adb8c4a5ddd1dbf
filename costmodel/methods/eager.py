"""Eager attention as published implementations run it: repeats, score matrices, softmax in fp32.

All amounts are for one layer; letters as in ``chains``. The chains are transformers 4.x
``modeling_llama.py``, from which most implementations are copied.
"""

from costmodel.methods.base import layer_bytes
from costmodel.methods.chains import alive_around_bytes, elementwise, reads_copy
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Point

_EAGER = "transformers 4.x modeling_llama.py eager attention"


def softmax_chain_bytes(b: float) -> float:
    """Bytes per score of scale, mask, softmax in fp32 and the cast back.

    Scale (read b, write b), mask (b, b), softmax (b, 4), cast (4, b).
    """
    return 6 * b + 8


def alive_per_score(point: Point) -> float:
    """Bytes of a score at the chain's widest moment.

    The score, its fp32 probability and the cast: b + 4 + b; where a cast is none, b + 4. A softmax
    of plain torch makes the fp32 copy of 16-bit scores before it works: b + 4 + 4.
    """
    b = point.element_bytes
    if b >= 4:
        return b + 4
    return b + 8 if point.engine.score_block_tokens else 2 * b + 4


def rope_bytes(b: float) -> float:
    """Bytes per rotated element of ``x * cos + rotate_half(x) * sin``: four kernels, 9 passes."""
    return 9 * b


def repeat_kv(
    mixer: Attention, point: Point, tokens: Array, *, source: str, from_state: bool = True
) -> Operations:
    """K and V expanded to all query heads: read once, written G times; nothing without GQA."""
    ratio = mixer.n_heads / mixer.n_kv_heads
    if ratio == 1:
        return ()
    size = layer_bytes(mixer, point, tokens)
    return (
        elementwise(
            "repeat_kv",
            state_bytes=size if from_state else 0.0,
            workspace_bytes=size * (ratio if from_state else ratio + 1),
            transient_bytes=size * ratio,
            launches=2,
            source=source,
            formula="read B t K (Hk + Hv) b, write G times that",
        ),
    )


def eager_prompt(
    mixer: Attention, point: Point, *, pairs: Array, source: str = _EAGER
) -> Operations:
    """Attention over the prompt with the whole N S S score matrix in memory.

    The multiplications run over the full square; ``pairs`` is the useful part. The chain's
    largest moment is its softmax (``alive_per_score``), with the S x S mask beside it.
    """
    s = point.prompt_tokens
    b = point.element_bytes
    rows = point.batch * mixer.n_heads * s
    scores = rows * s
    ratio = mixer.n_heads / mixer.n_kv_heads
    kv = layer_bytes(mixer, point, s) * ratio
    beside = kv + s * s * b + alive_around_bytes(mixer, point)
    alive = beside + scores * alive_per_score(point)
    k_share = mixer.head_dim / (mixer.head_dim + mixer.v_head_dim)
    useful = point.batch * mixer.n_heads * pairs
    return (
        *repeat_kv(mixer, point, s, source=source, from_state=False),
        Operation(
            name="scores_matmul",
            kind="gemm",
            flops=useful * (2.0 * mixer.head_dim),
            executed_flops=scores * (2.0 * mixer.head_dim),
            activation_bytes=rows * (mixer.head_dim * b),
            workspace_bytes=kv * k_share + b * scores,
            transient_bytes=beside + b * scores,
            dtype=point.dtype,
            shape={"m": rows, "n": s, "k": float(mixer.head_dim)},
            source=source,
            formula="Q K^T over the whole S x S square, scores written",
        ),
        elementwise(
            "mask_softmax",
            vector_flops=6 * scores,
            workspace_bytes=scores * softmax_chain_bytes(b),
            transient_bytes=alive,
            launches=4,
            source=source,
            formula="B N S S (6 b + 8): scale, mask, softmax in fp32, cast",
        ),
        Operation(
            name="values_matmul",
            kind="gemm",
            flops=useful * (2.0 * mixer.v_head_dim),
            executed_flops=scores * (2.0 * mixer.v_head_dim),
            activation_bytes=rows * (mixer.v_head_dim * b),
            workspace_bytes=kv * (1 - k_share) + b * scores,
            transient_bytes=beside + 2 * b * scores,
            dtype=point.dtype,
            shape={"m": rows, "n": float(mixer.v_head_dim), "k": s},
            source=source,
            formula="probabilities read, times V over the whole square",
        ),
    )


def eager_step(
    mixer: Attention,
    point: Point,
    tokens: Array,
    *,
    source: str = _EAGER,
    from_state: bool = True,
) -> Operations:
    """One decode step of eager attention over ``tokens`` cached tokens and the new one.

    ``from_state``: the matmuls (or the repeat before them) read the cache itself; otherwise a copy
    of it that an operation before wrote, counted as workspace.
    """
    b = point.element_bytes
    ratio = mixer.n_heads / mixer.n_kv_heads
    kv = layer_bytes(mixer, point, tokens)
    scores = point.batch * mixer.n_heads * (tokens + 1)
    direct = from_state and ratio == 1
    attention = decode_attention(
        mixer,
        point,
        read_tokens=tokens,
        executed_tokens=tokens + 1,
        read_bytes=kv if direct else 0.0,
        written_bytes=layer_bytes(mixer, point, 1.0),
        workspace_bytes=2 * b * scores,
        transient_bytes=(ratio * kv if ratio > 1 else 0.0) + scores * alive_per_score(point),
        name="eager_attention",
        launches=2,
        source=source,
        formula="two batched matrix-vector products; scores written, probabilities read",
    )
    return (
        *repeat_kv(mixer, point, tokens, source=source, from_state=from_state),
        reads_copy(attention, 0.0 if direct else ratio * kv, repeated=ratio > 1),
        elementwise(
            "mask_softmax",
            vector_flops=6 * scores,
            workspace_bytes=scores * softmax_chain_bytes(b),
            transient_bytes=scores * alive_per_score(point),
            launches=4,
            source=source,
            formula="B N T (6 b + 8): scale, mask, softmax in fp32, cast",
        ),
    )


def rotate_keys(mixer: Attention, point: Point, tokens: Array, *, source: str) -> Operation:
    """Rotary embedding applied again to cached keys that were stored before it."""
    elements = point.batch * tokens * (mixer.n_kv_heads * mixer.head_dim)
    return elementwise(
        "rotate_keys",
        vector_flops=3 * elements,
        workspace_bytes=elements * rope_bytes(point.element_bytes),
        transient_bytes=elements * 3 * point.element_bytes,
        launches=5,
        source=source,
        formula="9 b bytes and 3 FLOPs per key element: x cos + rotate_half(x) sin",
    )

"""Eager attention as published implementations run it: repeats, score matrices, softmax in fp32.

All amounts are for one layer; letters as in ``chains``. The chains are transformers 4.x
``modeling_llama.py``, from which most implementations are copied.
"""

from dataclasses import replace

from costmodel.methods.base import layer_bytes
from costmodel.methods.chains import elementwise
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention, prefill_attention
from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Point

_EAGER = "transformers 4.x modeling_llama.py eager attention"


def softmax_chain_bytes(b: float) -> float:
    """Bytes per score of scale, mask, softmax in fp32 and the cast back.

    Scale (read b, write b), mask (b, b), softmax (b, 4), cast (4, b).
    """
    return 6 * b + 8


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
    largest moment holds the 16-bit scores, their fp32 softmax and the cast: b + 4 + b per score.
    """
    s = point.prompt_tokens
    b = point.element_bytes
    scores = point.batch * mixer.n_heads * s * s
    matmuls = prefill_attention(
        mixer,
        point,
        pairs=pairs,
        executed_pairs=s * s,
        state_bytes=0.0,
        name="eager_attention",
        source=source,
        formula="two batched matmuls over S x S; scores written, probabilities read",
    )
    kv = layer_bytes(mixer, point, s) * (mixer.n_heads / mixer.n_kv_heads)
    return (
        *repeat_kv(mixer, point, s, source=source, from_state=False),
        _with_workspace(matmuls, kv + 2 * b * scores, kv + scores * (2 * b + 4)),
        elementwise(
            "mask_softmax",
            vector_flops=6 * scores,
            workspace_bytes=scores * softmax_chain_bytes(b),
            transient_bytes=kv + scores * (2 * b + 4),
            launches=4,
            source=source,
            formula="B N S S (6 b + 8): scale, mask, softmax in fp32, cast",
        ),
    )


def eager_step(
    mixer: Attention,
    point: Point,
    tokens: Array,
    *,
    source: str = _EAGER,
    from_state: bool = True,
    written_bytes: Array | None = None,
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
    new_token = layer_bytes(mixer, point, 1.0) if written_bytes is None else written_bytes
    return (
        *repeat_kv(mixer, point, tokens, source=source, from_state=from_state),
        decode_attention(
            mixer,
            point,
            read_tokens=tokens,
            executed_tokens=tokens + 1,
            read_bytes=kv if direct else 0.0,
            written_bytes=new_token,
            workspace_bytes=(0.0 if direct else ratio * kv) + 2 * b * scores,
            transient_bytes=(ratio * kv if ratio > 1 else 0.0) + scores * (2 * b + 4),
            name="eager_attention",
            launches=2,
            source=source,
            formula="two batched matrix-vector products; scores written, probabilities read",
        ),
        elementwise(
            "mask_softmax",
            vector_flops=6 * scores,
            workspace_bytes=scores * softmax_chain_bytes(b),
            transient_bytes=scores * (2 * b + 4),
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

def _with_workspace(operation: Operation, workspace: Array, transient: Array) -> Operation:
    return replace(
        operation,
        workspace_bytes=operation.workspace_bytes + workspace,
        transient_bytes=operation.transient_bytes + transient,
    )

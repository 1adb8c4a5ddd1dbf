"""Operations that methods share: copies, gathers, selections, transfers, second score passes.

All amounts are for one layer. ``b`` is the bytes of one activation or unquantised cache element,
N query heads, K KV heads, G = N / K, Hk and Hv the head sizes, S prompt and T cached tokens.
"""

from dataclasses import replace

import numpy as np

from costmodel.methods.base import layer_bytes
from costmodel.mixers import Attention
from costmodel.operation import Array, Operation, Operations, blocked_pairs
from costmodel.workload import Point


def elementwise(
    name: str,
    *,
    source: str = "",
    formula: str = "",
    vector_flops: Array = 0.0,
    state_bytes: Array = 0.0,
    workspace_bytes: Array = 0.0,
    activation_bytes: Array = 0.0,
    transient_bytes: Array = 0.0,
    launches: float = 1.0,
    count: Array = 1.0,
) -> Operation:
    """Whatever is decided by bytes: copies, gathers, quantisation, rotation."""
    return Operation(
        name=name,
        kind="elementwise",
        count=count,
        vector_flops=vector_flops,
        state_bytes=state_bytes,
        workspace_bytes=workspace_bytes,
        activation_bytes=activation_bytes,
        transient_bytes=transient_bytes,
        launches=launches,
        source=source,
        formula=formula,
    )


def select(
    name: str,
    *,
    rows: Array,
    length: Array,
    keep: Array,
    state_bytes: Array = 0.0,
    workspace_bytes: Array = 0.0,
    transient_bytes: Array = 0.0,
    executed_flops: Array = 0.0,
    dtype: str = "fp32",
    launches: float = 1.0,
    count: Array = 1.0,
    source: str = "",
    formula: str = "",
) -> Operation:
    """Choose ``keep`` of ``length`` scores in each of ``rows`` rows (top-k or argmin)."""
    return Operation(
        name=name,
        kind="select",
        count=count,
        executed_flops=executed_flops,
        vector_flops=rows * length,
        state_bytes=state_bytes,
        workspace_bytes=workspace_bytes,
        transient_bytes=transient_bytes,
        launches=launches,
        dtype=dtype,
        shape={"rows": rows, "length": length, "k": keep},
        source=source,
        formula=formula,
    )


def host_link(
    name: str,
    link_bytes: Array,
    *,
    pinned: bool,
    messages: Array = 1.0,
    count: Array = 1.0,
    host_waits: bool = False,
    source: str = "",
    formula: str = "",
) -> Operation:
    """A transfer between GPU and host memory, one direction."""
    return Operation(
        name=name,
        kind="host_link",
        count=count,
        host_waits=host_waits,
        link_bytes=link_bytes,
        shape={"message_bytes": link_bytes / np.maximum(messages, 1.0), "pinned": float(pinned)},
        source=source,
        formula=formula,
    )


def probability_bytes(point: Point) -> float:
    """Bytes of one attention weight on its way to the scores: our kernels leave 16 bits, relative
    to the running maximum; else fp32.
    """
    return 2.0 if point.engine.fused_kernels and point.dtype != "fp32" else 4.0


def cache_cat(
    mixer: Attention, point: Point, tokens: Array, *, source: str, heads: float = 1.0
) -> Operation:
    """The layer's K and V copied into tensors one token longer (``heads``: times K heads)."""
    size = layer_bytes(mixer, point, tokens) * heads
    return elementwise(
        "cache_cat",
        workspace_bytes=2 * size,
        transient_bytes=size,
        launches=2,
        source=source,
        formula="read and write B t K (Hk + Hv) b",
    )


def gather_tokens(
    mixer: Attention,
    point: Point,
    tokens: Array,
    *,
    read_tokens: Array | None = None,
    extra_bytes: Array = 0.0,
    heads: float = 1.0,
    source: str = "",
) -> Operation:
    """Selected K and V copied into the cache.

    ``ideal`` reads them from the layer's activations; ``reference`` from memory (``read_tokens``
    of them, by default as many as are kept).
    """
    size = layer_bytes(mixer, point, tokens) * heads
    read = size if read_tokens is None else layer_bytes(mixer, point, read_tokens) * heads
    ideal = point.level == "ideal"
    return elementwise(
        "gather_kept",
        state_bytes=size / heads + extra_bytes,
        workspace_bytes=0.0 if ideal else read + size - size / heads,
        activation_bytes=read if ideal else 0.0,
        transient_bytes=layer_bytes(mixer, point, point.prompt_tokens) * heads,
        launches=1 if ideal else 4,
        source=source,
        formula="read and write B kept K (Hk + Hv) b",
    )


def computed_pairs(point: Point, keys: Array = np.inf) -> Array:
    """Pairs computed for a causal prompt whose queries see at most ``keys`` keys, per head."""
    return blocked_pairs(point.prompt_tokens, keys, float(point.engine.score_block_tokens))


def blocked_transient_bytes(
    mixer: Attention, point: Point, keys: Array, *, block: float | None = None, fp32: bool = True
) -> Array:
    """Bytes alive where an engine without a kernel scores a block of queries over ``keys`` keys.

    A score in the compute type, its fp32 copy where that is another type, and its probability; and
    what is ``alive_around_bytes``. Nothing on engines that have the kernel.
    """
    if not point.engine.score_block_tokens or point.level == "reference":
        return 0.0
    b, s = point.element_bytes, point.prompt_tokens
    size = float(point.engine.score_block_tokens)
    if block is None:  # the widest whole block, or the rest behind it
        whole = np.floor(s / size) * size
        rest, seen = s - whole, np.minimum(keys, s)
        pairs = np.maximum(
            size * np.minimum(seen + size - 1, whole), rest * np.minimum(seen + rest - 1, s)
        )
    else:  # the last queries only
        queries = np.minimum(block, s)
        pairs = queries * np.minimum(np.minimum(keys, s) + queries - 1, s)
    score = b + 4.0 + (4.0 if b < 4 else 0.0) if fp32 else 2 * b
    scores: Array = point.batch * mixer.n_heads * pairs * score
    return scores + alive_around_bytes(mixer, point)


def alive_around_bytes(mixer: Attention, point: Point) -> Array:
    """Bytes alive around a prompt's attention on an engine of plain torch; 0 on others.

    Of every token the layer's input (residual and normed), the fused projection, rotated q and k,
    and the output.
    """
    if not point.engine.score_block_tokens:
        return 0.0
    q, k = mixer.n_heads * mixer.head_dim, mixer.n_kv_heads * mixer.head_dim
    v, out = mixer.n_kv_heads * mixer.v_head_dim, mixer.n_heads * mixer.v_head_dim
    token = 2 * q + (q + k + v) + (q + k) + out
    return point.batch * point.prompt_tokens * (token * point.element_bytes)


def score_pass(
    mixer: Attention,
    point: Point,
    pairs: Array,
    *,
    name: str,
    keys: Array = np.inf,
    result_bytes: Array,
    transient_bytes: Array,
    source: str = "",
    unfitted: str = "",
) -> Operation:
    """Q K^T again, block by block: exp with the known row sums, summed over queries.

    ``pairs`` exist, with at most ``keys`` keys a query.
    ``result_bytes`` are the sums (and row sums) it reads and writes.
    """
    s = point.prompt_tokens
    heads = point.batch * mixer.n_heads
    return Operation(
        name=name,
        kind="prefill_attention",
        executed_flops=heads * computed_pairs(point, keys) * (2.0 * mixer.head_dim),
        vector_flops=2 * heads * pairs,
        activation_bytes=heads * s * (mixer.head_dim * point.element_bytes),
        workspace_bytes=result_bytes,
        transient_bytes=transient_bytes + blocked_transient_bytes(mixer, point, keys),
        dtype=point.dtype,
        shape={
            "batch": point.batch,
            "q_len": s,
            "kv_len": s,
            "pairs": pairs,
            "n_heads": mixer.n_heads,
            "n_kv_heads": mixer.n_kv_heads,
            "head_dim": mixer.head_dim,
            "v_head_dim": 0.0,
            "window_tokens": mixer.limit_tokens,
        },
        unfitted=unfitted,
        source=source,
        formula="2 Hk N per pair: half of the attention's multiplications again",
    )


def rotate_in_fp32(
    mixer: Attention, point: Point, tokens: Array, *, count: Array = 1.0
) -> Operation:
    """InfLLM's rotation of its window, in fp32 and anew for every chunk or step."""
    elements = point.batch * tokens * (mixer.n_kv_heads * mixer.head_dim)
    return elementwise(
        "rotate_window",
        count=count,
        vector_flops=3 * elements,
        workspace_bytes=elements * (2 * point.element_bytes + 28),
        transient_bytes=elements * 8,
        launches=6,
        source="thunlp/InfLLM inf_llm/attention/rope.py apply_rotary_pos_emb in fp32",
        formula="to fp32 (b, 4), two products (4, 4), sum (8, 4), cast (4, b)",
    )


def of_elements(operation: Operation, point: Point, elements: Array, bits: float) -> Operation:
    """Name what measured times of packing and unpacking depend on."""
    shape = {"elements": elements, "bits": float(bits)}
    return replace(operation, dtype=point.dtype, shape=shape)


#: Why packed caches have no fitted family, whatever their bytes per element come to.
_PACKED = "no table of measured kernels holds a cache packed like this one"


#: Elements that twins unpack at once (``piece_elements`` of ``measure.parts``; more on a GPU).
_PIECE_ELEMENTS = 2.0**18


def attend_packed(
    point: Point,
    attention: Operation,
    *,
    packed: Array,
    elements: Array,
    bits: float,
    name: str = "dequantise",
    piece_bytes: float | None = None,
    unfitted: str = _PACKED,
) -> Operations:
    """Attention of level ``ideal`` over a packed cache, on this engine.

    An engine without fused kernels writes a 16-bit copy of the packed part and reads it once; the
    copy is made piece by piece, so it is never alive whole. ``packed`` bytes are those of
    ``attention.state_bytes`` that hold ``elements`` packed elements; ``name`` tells formats apart
    whose unpacking takes different times. ``piece_bytes`` are alive per element of a piece, by
    default the copy and as much again. ``unfitted``: see ``Operation``.
    """
    if point.engine.fused_dequantise:
        return (replace(attention, unfitted=unfitted),)
    dequantise = elementwise(
        name,
        vector_flops=2 * elements,
        state_bytes=packed,
        workspace_bytes=2 * elements * point.element_bytes,
        # K or V, a piece of it
        transient_bytes=np.minimum(elements / 2, _PIECE_ELEMENTS)
        * (2.0 * point.element_bytes if piece_bytes is None else piece_bytes),
        launches=8,
        formula="codes, scales and zeros read; a copy of b bytes an element written and read",
    )
    # No kernel for a cache of so many bytes: what it reads is counted above.
    shape = {**attention.shape, "kv_bytes": np.where(packed, 0.0, attention.shape["kv_bytes"])}
    over_copy = replace(
        attention,
        name="dequantised_attention",
        shape=shape,
        state_bytes=attention.state_bytes - packed,
        vector_flops=0.0,
        formula="scores and weighted sum over the copy, and over what is not packed",
    )
    return of_elements(dequantise, point, elements, bits), over_copy


def reads_copy(operation: Operation, copy_bytes: Array, *, repeated: bool = False) -> Operation:
    """Decode attention over a copy that an operation before wrote, ``copy_bytes`` of workspace.

    ``repeated``: the copy has K and V for every query head, so no two heads share a read.
    """
    shape = dict(operation.shape)
    if np.any(copy_bytes):
        # Points without a copy read the cache itself.
        shape["kv_bytes"] = np.where(copy_bytes, copy_bytes, shape["kv_bytes"])
    if repeated:
        shape["n_kv_heads"] = shape["n_heads"]
    return replace(operation, workspace_bytes=operation.workspace_bytes + copy_bytes, shape=shape)

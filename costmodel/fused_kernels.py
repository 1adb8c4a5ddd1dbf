"""Our own kernels (``measure/kernels``) as the cost model knows them: counts, no device.

An engine with ``fused_kernels`` runs some steps of a method as one family of kernels.
``fused_step`` makes one operation of what such a step covers; ``KERNELS`` says what each does:

    attention16, attention8, flexgen4, flexgen2, kivi2, kivi4
                 a decode step over a cache of tokens or blocks: attend, merge, quantise and append
    h2o, tova    attend and leave weights, merge and score, overwrite the slot of what leaves
    ring         StreamingLLM: attend sinks and ring, merge and replace
    quest        bound pages, choose, attend the chosen, merge and append
    infllm       look blocks up, gather them, one softmax over window, first tokens, remainder and
                 blocks: a step of some fifty kernels of torch, the blocks copied twice
    prompt_scores, window_scores
                 what keys received from all queries, or the last ones, of a prompt: two passes
    ssd_scan, rglru_scan
                 prompts of Mamba-2 and of RG-LRU

Amounts per element are those derived in the docstrings of ``measure/kernels``: lane instructions on
the integer pipe, lane instructions issued in all, exponentials and their like on the special
function units, multiplications in 16 bits and in tf32. A kernel's ceiling is whichever of these and
of its bytes takes longest. What its docstring finds never to bind is left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from costmodel.operation import Array, Operation, Operations, added
from costmodel.units import DTYPE_BYTES
from costmodel.workload import Point

#: What ``Work`` consists of, in this order; the columns that times of these kernels depend on.
AMOUNTS = (
    *("n_bytes", "units", "block_bytes", "launches"),
    *("integer_ops", "issued_ops", "special_ops", "half_flops", "tf32_flops"),
)
Work = dict[str, Array]
#: (operation, SMs of the device) -> amounts of one run.
WorkOf = Callable[[Operation, float], Work]

#: Rows of a tile of the matrix units (``measure.kernels._softmax``).
_TILE_ROWS = 16.0
#: Kernels that ``torch.topk`` starts, about: it takes as long as four of ours.
_CHOICE_LAUNCHES = 4.0
#: ``measure.kernels.rglru_scan``: channels of a program, tokens a segment has at least, programs.
_CHANNELS, _SEGMENT_TOKENS, _PROGRAMS_PER_SM = 64.0, 256.0, 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedKernel:
    """One family of kernels.

    launches      kernels a step starts
    work          amounts of one run
    block_tokens  fewest tokens of one program; 0: programs always fill the device
    element_bits  of an element of them
    blocks_per_sm programs on one SM that the splits of a cache aim at
    fits          whether it is built for an operation's shape
    """

    launches: float
    work: WorkOf
    block_tokens: float = 0.0
    element_bits: float = 16.0
    blocks_per_sm: float = 1.0
    fits: Callable[[Mapping[str, Array]], bool]


def fused_step(point: Point, kernel: str, *operations: Operation) -> Operations:
    """The operations as one step of ``kernel``, where the engine has it; else as they are.

    The attention among them, or the first, names the step; amounts add up. Level ``ideal`` and
    16-bit models only: that is what the kernels are for.
    """
    if not point.engine.fused_kernels or point.level != "ideal" or point.dtype == "fp32":
        return operations
    shape = {name: value for op in reversed(operations) for name, value in op.shape.items()}
    family = KERNELS[kernel]
    if not family.fits(shape):
        return operations
    summed: dict[str, Any] = {
        name: added(*(getattr(op, name) for op in operations))
        for name in ("flops", "vector_flops", "state_bytes", "workspace_bytes", "activation_bytes")
    }
    transient: Array = 0.0
    for op in operations:
        transient = np.maximum(transient, op.transient_bytes)
    step = replace(
        next((op for op in operations if op.kind.endswith("attention")), operations[0]),
        **summed,
        executed_flops=added(*(op.counted_flops for op in operations)),
        transient_bytes=transient,
        unfitted="",
        source=f"measure/kernels, step {kernel}",
        formula="; ".join(dict.fromkeys(op.formula for op in operations)),
        launches=family.launches,
        kernel=kernel,
        shape={**shape, "room_tokens": point.reserved_tokens},
    )
    return (step,)


def work_of(operation: Operation, n_units: float) -> Work:
    """Amounts of one run of an operation that has a ``kernel``, on a device of so many SMs."""
    kernel = KERNELS[operation.kernel]
    work: Work = dict.fromkeys(AMOUNTS, np.float64(0.0))
    work["launches"] = kernel.launches
    if kernel.block_tokens:
        s = operation.shape
        width = np.asarray(s["head_dim"]) + s["v_head_dim"]
        tokens = np.minimum(s["kv_len"], kernel.block_tokens)
        work["block_bytes"] = tokens * width * (kernel.element_bits / 8.0)
    return work | kernel.work(operation, n_units)


def most_programs(kernel: FusedKernel, units: Array, n_units: float) -> Array:
    """Programs that share the caches of so many KV heads where all are long."""
    fill = np.maximum(np.floor(n_units * kernel.blocks_per_sm / units), 1.0)
    programs: Array = units * np.minimum(fill, MAX_SPLITS)
    return programs


def split_count(
    kernel: FusedKernel,
    units: Array,
    room_tokens: Array,
    n_units: float,
    block_tokens: Array | None = None,
) -> Array:
    """Programs that share the cache of one KV head: the rule of ``measure.kernels._splits``."""
    block = kernel.block_tokens if block_tokens is None else block_tokens
    blocks = np.ceil(np.asarray(room_tokens) / block)
    return np.maximum(np.minimum(most_programs(kernel, units, n_units) / units, blocks), 1.0)


#: Most programs that share one cache.
MAX_SPLITS = 128.0


# What a kernel is built for --------------------------------------------------------------------


def _decode_fits(shape: Mapping[str, Array]) -> bool:
    """Heads of 64, 128 or 256, alike for K and V, at most 16 of them per KV head."""
    same = shape["head_dim"] == shape["v_head_dim"]
    return bool(
        same
        and shape["head_dim"] in (64, 128, 256)
        and shape["n_heads"] <= 16 * shape["n_kv_heads"]
    )


def _heads_fit(shape: Mapping[str, Array]) -> bool:
    """Heads that are powers of two from 16 to 256."""
    sizes = (int(shape["head_dim"]), int(shape["v_head_dim"]) or int(shape["head_dim"]))
    return all(16 <= n <= 256 and not n & (n - 1) for n in sizes)


def _scan_fits(shape: Mapping[str, Array]) -> bool:
    """Head, state and chunk are powers of two from 16 on, a head's state at most 2^15 elements."""
    sizes = tuple(int(shape[name]) for name in ("head_dim", "d_state", "chunk"))
    return sizes[0] * sizes[1] <= 2**15 and all(n >= 16 and not n & (n - 1) for n in sizes)


# Work ------------------------------------------------------------------------------------------


def _decode(op: Operation) -> tuple[Array, Work]:
    """(elements attended, amounts that every decode kernel has)."""
    s = op.shape
    heads = np.asarray(s["batch"]) * s["n_kv_heads"]
    elements = heads * s["kv_len"] * (np.asarray(s["head_dim"]) + s["v_head_dim"])
    return elements, {
        "n_bytes": op.moved_bytes,
        "units": heads,
    }


def _packed(integer: float, issued: float = 0.0, products: float = 0.0) -> WorkOf:
    """Codes unpacked in registers: lane instructions per element, and FLOPs in 16 bits per query
    head of a KV head, of which tiles have at least two.
    """

    def work(op: Operation, _: float) -> Work:
        elements, amounts = _decode(op)
        group = np.asarray(op.shape["n_heads"]) / op.shape["n_kv_heads"]
        rows = np.maximum(2.0, 2.0 ** np.ceil(np.log2(group)))
        return amounts | {
            "integer_ops": integer * elements,
            "issued_ops": issued * elements,
            "half_flops": products * rows * elements,
        }

    return work


def _in_tf32(op: Operation, _: float) -> Work:
    """Tiles of at least 16 rows of queries in tf32: 2 FLOPs a row and element."""
    elements, amounts = _decode(op)
    group = np.asarray(op.shape["n_heads"]) / op.shape["n_kv_heads"]
    rows = np.maximum(_TILE_ROWS, 2.0 ** np.ceil(np.log2(group)))
    return amounts | {"tf32_flops": 2.0 * rows * elements}


def _looked_up(op: Operation, _: float) -> Work:
    """Chosen blocks read and written twice on their way; scores, their fp32 copies and weights."""
    amounts = _decode(op)[1]
    s, b = op.shape, DTYPE_BYTES[op.dtype]
    width = np.asarray(s["n_kv_heads"]) * (np.asarray(s["head_dim"]) + s["v_head_dim"])
    copies = 4.0 * np.asarray(s["batch"]) * s["copied_tokens"] * (width * b)
    weights = np.asarray(s["batch"]) * s["n_heads"] * s["kv_len"] * (4.0 * b + 8.0)
    return amounts | {"n_bytes": amounts["n_bytes"] + copies + weights}


def _received(op: Operation, _: float) -> Work:
    """Two passes over the logits: log-sum-exps, then sums over the queries.

    K and the queries are read from memory once a pass; tiles find them in the cache again.
    """
    s = op.shape
    pairs = np.asarray(s["batch"]) * s["pairs"] * s["n_heads"]
    rows = np.asarray(s["q_len"]) * s["n_heads"] + np.asarray(s["kv_len"]) * s["n_kv_heads"]
    read = np.asarray(s["batch"]) * rows * (np.asarray(s["head_dim"]) * DTYPE_BYTES[op.dtype])
    return {
        "n_bytes": 2.0 * read + op.workspace_bytes,
        "special_ops": 2.0 * pairs,
        "half_flops": 2.0 * pairs * (2.0 * np.asarray(s["head_dim"])),
    }


def _ssd(op: Operation, _: float) -> Work:
    """In fp32 x read twice and y written, states four times, log decays; b twice and c once."""
    s = op.shape
    p, n, c = s["head_dim"], s["d_state"], s["chunk"]
    tokens = np.asarray(s["batch"]) * np.ceil(np.asarray(s["q_len"]) / c) * c
    read = 3.0 * DTYPE_BYTES[op.dtype]
    per_head = 12.0 * p + 16.0 * p * n / c + 12.0
    flops = s["n_heads"] * (4.0 * p * n + (n + p) * c)
    return {
        "n_bytes": tokens * (s["n_heads"] * per_head + read * n * s["n_groups"]),
        "tf32_flops": tokens * flops,
    }


def _rglru(op: Operation, n_units: float) -> Work:
    """Inputs and both gates read, states written; a pass more where segments run side by side.

    Six exponentials and their like per channel, token and pass.
    """
    s = op.shape
    columns = np.ceil(np.asarray(s["n_heads"]) / _CHANNELS) * s["batch"]
    segments = np.minimum(
        np.floor(n_units * _PROGRAMS_PER_SM / columns), np.floor(s["q_len"] / _SEGMENT_TOKENS)
    )
    passes = np.where(segments > 1, 2.0, 1.0)
    channels = np.asarray(s["batch"]) * s["q_len"] * s["n_heads"]
    return {
        "n_bytes": channels * ((1.0 + 3.0 * passes) * DTYPE_BYTES[op.dtype]),
        "special_ops": 6.0 * passes * channels,
    }


def _token(block_tokens: float, element_bits: float, work: WorkOf) -> FusedKernel:
    """Attend, merge, append: programs of one warp, eight on an SM."""
    return FusedKernel(
        launches=3.0,
        work=work,
        block_tokens=block_tokens,
        element_bits=element_bits,
        blocks_per_sm=8.0,
        fits=_decode_fits,
    )


def _dropping(launches: float, work: WorkOf) -> FusedKernel:
    """Programs of four warps over tiles of 64 tokens, four on an SM."""
    return FusedKernel(
        launches=launches, work=work, block_tokens=64.0, blocks_per_sm=4.0, fits=_heads_fit
    )


#: By name. Issue slots and products of KIVI were counted for 2 bits; the slots are taken for 4 too,
#: where memory binds.
KERNELS: Mapping[str, FusedKernel] = {
    "attention16": _token(32.0, 16.0, _packed(0.0)),
    "attention8": _token(64.0, 8.0, _packed(1.75, issued=2.8)),
    "flexgen4": _token(64.0, 4.0, _packed(0.875, issued=2.3)),
    "flexgen2": _token(128.0, 2.0, _packed(0.75)),
    "kivi2": _token(128.0, 2.0, _packed(0.75, issued=2.4, products=10.0)),
    "kivi4": _token(128.0, 4.0, _packed(0.875, issued=2.4)),
    "h2o": _dropping(3.0, _in_tf32),
    "tova": _dropping(3.0, _in_tf32),
    "ring": _dropping(2.0, _in_tf32),
    "quest": _dropping(3.0 + _CHOICE_LAUNCHES, _in_tf32),
    "infllm": FusedKernel(launches=50.0, work=_looked_up, fits=lambda shape: True),
    "prompt_scores": FusedKernel(launches=2.0, work=_received, fits=_heads_fit),
    "window_scores": FusedKernel(launches=2.0, work=_received, fits=_heads_fit),
    "ssd_scan": FusedKernel(launches=4.0, work=_ssd, fits=_scan_fits),
    "rglru_scan": FusedKernel(launches=2.0, work=_rglru, fits=lambda shape: True),
}

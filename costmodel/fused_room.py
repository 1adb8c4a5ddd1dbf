"""Device memory that our own kernels (``costmodel.fused_kernels``) take beside weights and state.

    kept    from step to step, once for every layer: partial results of the splits, counts
    shared  from step to step, one for all layers: what scoring leaves between its launches
    alive   within a call: results, log-sum-exps, chunk states

Byte for byte what ``measure/kernels`` allocates (``StepState``, ``StepRoom``, ``ScoringWorkspace``
and the calls themselves), so it depends on the SMs, which decide how many splits there are.
Ignored: copies a call makes of inputs whose layout does not suit it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from costmodel.fused_kernels import KERNELS, split_count
from costmodel.operation import Array, Operation, Operations
from costmodel.units import DTYPE_BYTES

#: Tiles whose scores one program of the merge updates; pages of a program of Quest's bounds.
_CHUNK_TILES = 8.0
#: Query rows and keys of a tile of the prompt scores (``measure.kernels.prompt_scores``).
_ROWS, _KEYS, _BLOCKS_PER_SM = 128.0, 64.0, 4.0
_FP32, _INT64 = 4.0, 8.0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Room:
    """Bytes; see the module's docstring. ``alive`` counts what the operation itself has alive."""

    kept: Array = 0.0
    shared: Array = 0.0
    alive: Array = 0.0


def room_of(operation: Operation, n_units: float) -> Room:
    """Room of one layer's run of an operation that has a ``kernel``."""
    return _ROOMS[operation.kernel](operation, n_units)


def room_bytes(operations: Operations, n_units: float) -> Array:
    """What all layers of a pass keep between steps, the shared room once."""
    kept: Array = np.float64(0.0)
    shared: dict[str, Array] = {}
    for op in operations:
        if op.kernel:
            room = room_of(op, n_units)
            kept = kept + op.count * room.kept
            runs = np.where(np.asarray(op.count) > 0, room.shared, 0.0)
            shared[op.kernel] = np.maximum(shared.get(op.kernel, 0.0), runs)
    return kept + sum(shared.values(), np.float64(0.0))


def alive_bytes(operation: Operation, n_units: float) -> Array:
    """Bytes alive during a run beyond weights, state and what is kept."""
    if not operation.kernel:
        return operation.transient_bytes
    alive = room_of(operation, n_units).alive
    return np.where(np.asarray(operation.count) > 0, alive, 0.0)


def _partials(rows: Array, parts: Array, size: Array) -> Array:
    """A sum of ``size`` elements, a maximum and a total per row and part, in fp32."""
    return rows * parts * ((np.asarray(size) + 2.0) * _FP32)


def _heads(op: Operation) -> tuple[Array, Array]:
    """(rows of the queries, sequences times KV heads)."""
    batch = np.asarray(op.shape["batch"])
    return batch * op.shape["n_heads"], batch * op.shape["n_kv_heads"]


def _step(extra_parts: float) -> Callable[[Operation, float], Room]:
    """A step over a cache of tokens: partials, tokens of every sequence, arrivals."""

    def room(op: Operation, n_units: float) -> Room:
        rows, units = _heads(op)
        kernel, capacity = KERNELS[op.kernel], np.asarray(op.shape["room_tokens"])
        block = op.shape.get("residual_tokens", kernel.block_tokens)
        if "residual_tokens" in op.shape:  # whole blocks, and one more of residual
            capacity = (np.floor(capacity / block) + 1.0) * block
        splits = split_count(kernel, units, capacity, n_units, block)
        counts = np.asarray(op.shape["batch"]) * _INT64 + 4.0
        partials = _partials(rows, splits + extra_parts, op.shape["head_dim"])
        return Room(kept=partials + counts, alive=op.transient_bytes)

    return room


def _slots(op: Operation, n_units: float, capacity: Array) -> tuple[Array, Array, Array]:
    """(what a layer keeps, partials alone, tokens of a tile) of kernels that drop or choose."""
    rows, units = _heads(op)
    size = max(float(op.shape["head_dim"]), float(op.shape["v_head_dim"]))
    tile = max(16.0, min(64.0, 8192.0 // size))
    splits = split_count(KERNELS[op.kernel], units, capacity, n_units, tile)
    partials = _partials(rows, splits, op.shape["v_head_dim"])
    return partials + 2 * _INT64, partials, np.float64(tile)


def _scored(op: Operation, n_units: float) -> Room:
    """H2O and TOVA: weights in 16 bits, maxima of tiles, sums of the group, lightest of chunks."""
    rows, units = _heads(op)
    slots = np.asarray(op.shape["kv_len"])
    kept, partials, tile = _slots(op, n_units, slots)
    tiles = np.ceil(slots / tile)
    chunks = np.ceil(tiles / _CHUNK_TILES)
    shared = partials + rows * slots * 2.0 + rows * tiles * _FP32
    shared = shared + units * (slots + 1.0 + 2.0 * chunks) * _FP32
    return Room(kept=kept, shared=shared, alive=op.transient_bytes)


def _ring(op: Operation, n_units: float) -> Room:
    """StreamingLLM: also the frequencies that turn a head."""
    kept, _, _ = _slots(op, n_units, np.asarray(op.shape["kv_len"]))
    frequencies = np.asarray(op.shape["head_dim"]) / 2.0 * _FP32
    return Room(kept=kept + frequencies, alive=op.transient_bytes)


def _quest(op: Operation, n_units: float) -> Room:
    """Bounds of all pages there is room for; values and indices of the chosen."""
    _, units = _heads(op)
    capacity = np.maximum(op.shape["room_tokens"], op.shape["kv_len"])
    kept, _, _ = _slots(op, n_units, capacity)
    pages = np.ceil(capacity / op.shape["page_tokens"])
    calls = units * (pages * _FP32 + np.asarray(op.shape["k"]) * (_FP32 + _INT64))
    return Room(kept=kept, alive=op.transient_bytes + calls)


def _received(op: Operation, n_units: float) -> Room:
    """Sums per key, log-sum-exps per query row, and those of the splits before they are joined.

    Log-sum-exps and sums are among what the pass over a whole prompt says it has alive.
    """
    rows, units = _heads(op)
    queries, keys = np.asarray(op.shape["q_len"]), np.asarray(op.shape["kv_len"])
    group = 2.0 ** np.ceil(np.log2(np.asarray(op.shape["n_heads"]) / op.shape["n_kv_heads"]))
    tile_rows = _ROWS if float(op.shape["head_dim"]) <= 128 else _ROWS / 2
    least = 2.0 ** np.ceil(np.log2(np.maximum(queries, 16.0)))
    tiles = np.ceil(queries / np.maximum(np.minimum(np.floor(tile_rows / group), least), 1.0))
    fill = np.maximum(np.floor(n_units * _BLOCKS_PER_SM / (units * tiles)), 1.0)
    splits = np.minimum(np.minimum(fill, np.ceil(keys / (8.0 * _KEYS))), 128.0)
    sums = rows * queries * _FP32
    parts = np.where(splits > 1, splits * sums, 0.0)
    if op.kernel == "prompt_scores":
        return Room(alive=op.transient_bytes + parts)
    return Room(alive=op.transient_bytes + parts + sums)


def _ssd(op: Operation, n_units: float) -> Room:
    """Running sums of decays and states of all chunks, and the outputs, in fp32."""
    s = op.shape
    chunks = np.asarray(s["batch"]) * np.ceil(np.asarray(s["q_len"]) / s["chunk"])
    states = chunks * s["n_heads"] * (s["chunk"] + np.asarray(s["head_dim"]) * s["d_state"])
    outputs = np.asarray(s["batch"]) * s["q_len"] * s["n_heads"] * s["head_dim"]
    return Room(alive=op.activation_bytes + (states + outputs) * _FP32)


def _rglru(op: Operation, n_units: float) -> Room:
    """Products and ends of all segments in fp32, states of all tokens, the last state twice."""
    s = op.shape
    width, batch = np.asarray(s["n_heads"]), np.asarray(s["batch"])
    columns = np.ceil(width / 64.0)
    tokens = np.asarray(s["q_len"])
    wanted = np.floor(n_units * 8.0 / (columns * batch))
    segments = np.maximum(np.minimum(wanted, np.floor(tokens / 256.0)), 1.0)
    per_segment = np.ceil(tokens / (segments * 32.0)) * 32.0
    segments = np.ceil(tokens / per_segment)
    outputs = batch * tokens * width * DTYPE_BYTES[op.dtype]
    return Room(
        alive=op.activation_bytes + outputs + batch * (2.0 * segments + 1.0) * width * _FP32
    )


def _nothing(op: Operation, n_units: float) -> Room:
    """What it needs is the method's state; copies on their way are left out."""
    return Room(alive=op.transient_bytes)


_ROOMS: Mapping[str, Callable[[Operation, float], Room]] = {
    "attention16": _step(1.0),
    "attention8": _step(1.0),
    "flexgen4": _step(1.0),
    "flexgen2": _step(1.0),
    "kivi2": _step(3.0),
    "kivi4": _step(3.0),
    "h2o": _scored,
    "tova": _scored,
    "ring": _ring,
    "quest": _quest,
    "infllm": _nothing,
    "prompt_scores": _received,
    "window_scores": _received,
    "ssd_scan": _ssd,
    "rglru_scan": _rglru,
}

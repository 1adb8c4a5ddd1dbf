"""Memory of published runs: what an engine's own counter shows.

weights      weights of one GPU
state        KV cache
peak_torch   peak of the tensor allocator: the larger of both phases, without what the engine
             reserves beside tensors; ``extra_bytes`` on top
peak_profile weights and the activations of one full batch of tokens (vLLM's profiling run)
activations  of that, without the weights
kv_pool      memory_fraction of the device, less weights, activations and reserve
pool_tokens  tokens that fit in the pool
non_torch    what the engine reserves beside tensors
decode_time  seconds of a number of decode steps
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from costmodel.engines import load_engine
from costmodel.errors import LccostError, NotApplicableError
from costmodel.hardware import HardwareProfile
from costmodel.mlps import MoE
from costmodel.predict import predict
from costmodel.units import DTYPE_BYTES
from costmodel.validation.devices import Devices
from costmodel.validation.kinds import Options
from costmodel.validation.names import model_named
from costmodel.validation.result import Block
from costmodel.validation.table import Record
from costmodel.workload import Level, Workload

Floats = NDArray[np.float64]

#: Formulas that are exact but for rounding, small buffers and digitised figures; pools depend on
#: what profiling and other processes left; seconds on the prior of eager engines.
INTERVALS = {
    "weights": (0.99, 1.01),
    "state": (0.97, 1.03),
    "peak_torch": (0.99, 1.01),
    "peak_profile": (0.98, 1.02),
    "decode_time": (0.9, 1.6),
}
OTHER_INTERVAL = (0.85, 1.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCase:
    """What rows that are predicted in one call share.

    unit             "bytes", "tokens" or "s"
    memory_fraction  share of the device an engine may use
    reserved_bytes   beside tensors; None: the engine's rule
    """

    model: str
    system: str
    engine: str
    method: str
    level: Level
    quantity: str
    tp: int = 1
    dtype: str = "bf16"
    weight_dtype: str = "checkpoint"
    memory_fraction: float = 0.9
    reserved_bytes: float | None = None
    primary: bool = True
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One row of a case; n_steps is of ``decode_time``.

    reading_bytes   how far off the value may have been read from a published figure
    """

    batch: float = 1.0
    context_tokens: float
    output_tokens: float = 1.0
    extra_bytes: float = 0.0
    reading_bytes: float = 0.0
    n_steps: float = 1.0


def memory_blocks(
    rows: Sequence[tuple[int, Record]],
    read: Callable[[Record], tuple[MemoryCase, MemoryRow]],
    options: Options,
) -> tuple[list[Block], list[tuple[int, str]]]:
    """Blocks of rows (each with its index), and why the others are left out."""
    devices = Devices(options.hardware)
    grouped: dict[MemoryCase, list[tuple[int, MemoryRow]]] = {}
    unsupported: list[tuple[int, str]] = []
    for i, record in rows:
        try:
            case, row = read(record)
        except LccostError as error:
            unsupported.append((i, str(error)))
            continue
        grouped.setdefault(case, []).append((i, row))
    blocks = []
    for case, items in grouped.items():
        try:
            hardware = devices.profile(devices.name({"hw": case.system}, ("hw",)))
            blocks.append(_block(case, items, hardware, options))
        except LccostError as error:
            reason = " ".join(str(error).split())[:300]
            unsupported += [(i, reason) for i, _ in items]
    return blocks, unsupported


def _block(
    case: MemoryCase,
    items: Sequence[tuple[int, MemoryRow]],
    hardware: HardwareProfile,
    options: Options,
) -> Block:
    rows = [row for _, row in items]
    mid = np.broadcast_to(_values(case, rows, hardware, options.datasheet), (len(rows),)).astype(
        np.float64
    )
    reading = np.array([row.reading_bytes for row in rows])
    low, high = (mid * f for f in INTERVALS.get(case.quantity, OTHER_INTERVAL))
    low, high = np.maximum(low - reading, 0.0), high + reading
    if options.datasheet:
        low, high = np.full(mid.shape, np.nan), np.full(mid.shape, np.nan)
    return Block(
        group={
            "hw": hardware.name,
            "engine": case.engine,
            "model": model_named(case.model).name,
            "method": bare_method(case.method),
            "metric": case.quantity,
        },
        rows=np.array([i for i, _ in items], dtype=np.intp),
        low=low,
        mid=mid,
        high=high,
        basis="datasheet",
        primary=case.primary,
        parts=case.parts,
        unit={"decode_time": "s", "pool_tokens": "tokens"}.get(case.quantity, "bytes"),
    )


def bare_method(method: str) -> str:
    """A method without its parameters."""
    return "+".join(part.partition(":")[0] for part in method.split("+"))


def _values(
    case: MemoryCase, rows: Sequence[MemoryRow], hardware: HardwareProfile, datasheet: bool
) -> Floats:
    batch, context, output, extra, n_steps = (
        np.array([getattr(r, name) for r in rows])
        for name in ("batch", "context_tokens", "output_tokens", "extra_bytes", "n_steps")
    )
    p = predict(
        model_named(case.model),
        case.method,
        Workload.of(batch, context, output),
        hardware,
        engine=case.engine,
        level=case.level,
        tp=case.tp,
        dtype=case.dtype,
        weight_dtype=case.weight_dtype,
        memory_fraction=case.memory_fraction,
        solve=False,
    )
    engine = load_engine(case.engine)
    rule = engine.reserved_bytes[0 if case.tp == 1 else 1]
    own = rule if case.reserved_bytes is None else case.reserved_bytes
    weights, state = p["weights_bytes"], p["state_bytes"]
    if case.quantity == "decode_time":
        step: Floats = (p["roofline_tpot_s"] if datasheet else p["tpot_s"]) * n_steps
        return step
    if case.quantity in ("weights", "state", "non_torch"):
        return {"weights": weights, "state": state, "non_torch": np.full(state.shape, own)}[
            case.quantity
        ]
    if datasheet and case.quantity == "peak_torch":
        return weights + state
    if case.quantity == "peak_torch":
        peak = np.maximum(p["peak_prefill_bytes"], p["peak_decode_bytes"])
        out: Floats = peak - rule + extra
        return out
    activations = np.zeros(state.shape) if datasheet else _activations(case, context)
    if case.quantity == "activations":
        return activations
    if case.quantity == "peak_profile":
        profile: Floats = weights + activations
        return profile
    pool: Floats = hardware.memory_bytes * case.memory_fraction - weights - activations - own
    if np.any(pool <= 0.0):
        raise NotApplicableError(f"weights and activations leave no memory of {hardware.name}")
    if case.quantity == "kv_pool":
        return pool
    tokens: Floats = pool / (state / (batch * context))
    return tokens


def _activations(case: MemoryCase, context: Floats) -> Floats:
    """Activations of one pass over as many tokens as the engine batches in its profiling run."""
    engine = load_engine(case.engine)
    architecture = model_named(case.model).sharded(case.tp)
    per_width, per_model = engine.mlp_alive
    widest = 0.0
    for mlp, _ in architecture.mlp_groups:
        width = float(mlp.d_ff * (mlp.top_k if isinstance(mlp, MoE) else 1))
        widest = max(widest, width * (per_width - (not mlp.gated)))
    tokens = np.maximum(context, float(engine.prefill_chunk_tokens))
    out: Floats = tokens * ((widest + per_model * architecture.d_model) * DTYPE_BYTES[case.dtype])
    return out

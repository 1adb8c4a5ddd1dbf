"""Tables of measured kernels: one call per row, predicted warm by the family that answers for it.

Benchmarks replay the same buffers, so what fits in the last-level cache is read from there; a real
step is priced cold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from costmodel.calibration.schemas import SCHEMAS, Read, Schema
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.hardware import HardwareProfile
from costmodel.kernels.families import ENGINE_SPREAD, load_family
from costmodel.kernels.kinds import kernel_kind
from costmodel.kernels.physics import cache_bytes, cache_bytes_per_s
from costmodel.operation import Array
from costmodel.validation.cells import observed_value
from costmodel.validation.devices import Devices
from costmodel.validation.kernel_priors import prior_block, prior_row, work_interval
from costmodel.validation.kinds import Options
from costmodel.validation.result import Block, Floats, Predictions
from costmodel.validation.table import Record

#: Schema of each kind, column that names the kernel, further columns that tell groups apart.
_SCHEMA_NAMES = {"decode_attention": "attention", "prefill_attention": "attention"}
_MORE = {
    "prefill_attention": ("op",),
    "gemm": ("dtype",),
    "mla": ("phase", "kv_cache_dtype"),
    "linear_attention": ("op_name", "phase"),
    "sparse_attention": ("op_name",),
    "moe": ("moe_dtype",),
    "collectives": ("op_name",),
}

#: Collectives that move as many bytes as a gather does: a reduction of which each GPU keeps its
#: part, an exchange of parts.
_LIKE_GATHER = frozenset({"reduce_scatter", "reducescatter", "alltoall", "all_to_all", "all2all"})


@dataclass(frozen=True, slots=True)
class _Key:
    """What rows predicted in one call share; ``borrowed``: another operation's family answers."""

    kind: str
    variant: str
    hardware: str
    engine: str
    kernel: str
    more: tuple[str, ...]
    borrowed: bool


def predict(records: Sequence[Record], options: Options) -> Predictions:
    """Seconds of every call."""
    schema = schema_of(options.kind)
    more = _MORE.get(options.kind, ())
    devices = Devices(options.hardware)
    grouped: dict[_Key, list[tuple[int, Mapping[str, float]]]] = {}
    unsupported: list[tuple[int, str]] = []
    for i, record in enumerate(records):
        try:
            kind, variant, shape = _shape(schema, record)
            key = _Key(
                kind,
                variant,
                devices.name(record),
                record.get("framework", "").lower() or "unknown",
                record.get(schema.kernel, "").lower(),
                tuple(record.get(c, "").lower() for c in more),
                _is_like_gather(schema, record),
            )
        except ConfigError as error:
            unsupported.append((i, str(error)))
            continue
        grouped.setdefault(key, []).append((i, shape))
    blocks = []
    for key, items in grouped.items():
        try:
            blocks.append(_block(key, items, devices.profile(key.hardware), options, more))
        except (ConfigError, NotApplicableError) as error:
            unsupported += [(i, str(error)) for i, _ in items]
    return Predictions(
        blocks=tuple(blocks),
        unsupported=tuple(unsupported),
        assumptions=(
            "calls are predicted warm: buffers are replayed, so what fits in the cache is there",
        ),
    )


def schema_of(kind: str) -> Schema:
    """The schema of calibration tables that a kind's rows have."""
    name = _SCHEMA_NAMES.get(kind, kind)
    return next(s for s in SCHEMAS if s.name == name)


def _shape(schema: Schema, record: Record) -> Read:
    if _is_like_gather(schema, record):
        record = {**record, "op_name": "all_gather"}
    try:
        return schema.shape_of(record)
    except ConfigError:
        prior = prior_row(schema, record)
        if prior is None:
            raise
        return prior


def _is_like_gather(schema: Schema, record: Record) -> bool:
    return schema.name == "collectives" and record.get("op_name", "").lower() in _LIKE_GATHER


def _block(
    key: _Key,
    items: Sequence[tuple[int, Mapping[str, float]]],
    device: HardwareProfile,
    options: Options,
    more: Sequence[str],
) -> Block:
    columns = {name: np.array([shape[name] for _, shape in items]) for name in items[0][1]}
    rows = np.array([i for i, _ in items], dtype=np.intp)
    group = {
        "hw": device.name,
        "framework": key.engine,
        "kernel": key.kernel,
        "metric": "latency",
        **dict(zip(more, key.more, strict=True)),
    }
    if key.kind.startswith("prior:"):
        return prior_block(key.kind, key.variant, group, rows, columns, device, options.datasheet)
    limit = warm_limit_s(key.kind, device, columns, key.variant)
    limit = np.broadcast_to(limit, rows.shape)
    if options.datasheet:
        seconds = np.asarray(kernel_kind(key.kind).roofline_s(device, columns, key.variant))
        mid = np.broadcast_to(seconds, rows.shape).astype(np.float64)
        unknown = np.full(rows.shape, np.nan)
        return Block(
            group=group,
            rows=rows,
            low=unknown,
            mid=mid,
            high=unknown,
            basis="datasheet",
            limit=limit,
        )
    family = load_family(
        key.kind,
        key.engine,
        device,
        variant=key.variant,
        kernel=key.kernel,
        within={k: float(np.median(v)) for k, v in columns.items()},
    )
    if family is None:
        work = kernel_kind(key.kind).work(device, columns, key.variant)
        times: Sequence[Array] = work_interval(key.kind, key.variant, work, device, rows.shape)
    else:
        if key.borrowed:
            wider = family.interval.wider(ENGINE_SPREAD)
            family = replace(family, basis="transferred", interval=wider)
        times = family.time_s(device, columns, cold=False)
    low, mid, high = (np.broadcast_to(np.asarray(t, dtype=np.float64), rows.shape) for t in times)
    basis = "prior" if family is None else family.basis
    return Block(group=group, rows=rows, low=low, mid=mid, high=high, basis=basis, limit=limit)


def warm_limit_s(
    kind: str, device: HardwareProfile, columns: Mapping[str, Floats], variant: str
) -> Floats:
    """Least seconds of a replayed call: FLOPs at the peak, bytes at the rate of what holds them.

    What the last-level cache cannot hold has to come from memory in every run.
    """
    work = kernel_kind(kind).work(device, columns, variant)
    n_bytes = np.asarray(work.n_bytes, dtype=np.float64)
    from_memory = np.maximum(n_bytes - cache_bytes(device), 0.0) / device.hbm_bytes_per_s
    compute = np.asarray(work.flops, dtype=np.float64) / work.peak_flops_per_s
    limit: Floats = np.maximum(
        compute, np.maximum(from_memory, n_bytes / cache_bytes_per_s(device))
    )
    return limit


def observed(record: Record, block: Block) -> float:
    """Latency in seconds; raises ``ConfigError`` where it is no positive number."""
    return observed_value(record, "latency_us") * 1e-6

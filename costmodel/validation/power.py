"""Power and energy of attention kernels: an idle and activity law, given how long the call takes.

Power is judged at the activity that the *predicted* latency implies. Overall figures are of power,
which is energy per call given its latency; latency and energy stand in the groups.
"""

from collections.abc import Sequence

import numpy as np

from costmodel.errors import NotApplicableError
from costmodel.kernels.kinds import kernel_kind
from costmodel.power import load_power
from costmodel.validation.cells import observed_value
from costmodel.validation.devices import Devices
from costmodel.validation.kernels import predict as predict_kernels
from costmodel.validation.kernels import schema_of
from costmodel.validation.kinds import Options
from costmodel.validation.result import Block, Predictions
from costmodel.validation.table import Record

#: Columns of this table -> columns of the attention tables.
_COLUMNS = {
    "batch_size": "batch",
    "isl": "q_len",
    "num_heads": "Hq",
    "num_key_value_heads": "Hkv",
    "head_dim": "D",
    "window_size": "window",
    "kernel_source": "kernel",
    "kv_cache_dtype": "kv_dtype",
}
_PHASES = {"decode": "decode_attn", "prefill": "prefill_attn"}
#: metric -> (column, unit, what one of the column's unit is in the block's).
_METRICS = {
    "power": ("power", "W", 1.0),
    "energy": ("energy_mj_per_call", "J", 1e-3),
    "latency": ("latency_us", "s", 1e-6),
}

#: What an implementation's power is multiplied for (``PowerLaw.factors``): a Triton kernel, whose
#: instructions wait longer; a short window, whose loop ends before it is warm; an fp8 cache, whose
#: values are widened (decode) or whose prompt is quantised by a kernel before (prefill).
FACTORS = ("triton", "window", "fp8")
#: Watts on another GPU than the law was fitted on: the logarithm of its interval widens by this.
WIDER_OTHER_GPU = 1.5


def predict(records: Sequence[Record], options: Options) -> Predictions:
    """Watts, joules and seconds of every call."""
    tables = [renamed(r) for r in records]
    blocks: list[Block] = []
    unsupported: list[tuple[int, str]] = []
    for phase, op in _PHASES.items():
        index = np.array([i for i, r in enumerate(tables) if r.get("op") == op], dtype=np.intp)
        kind = "decode_attention" if phase == "decode" else "prefill_attention"
        inner = Options(kind=kind, datasheet=options.datasheet, hardware=options.hardware)
        timed = predict_kernels([tables[i] for i in index], inner)
        unsupported += [(int(index[i]), reason) for i, reason in timed.unsupported]
        for block in timed.blocks:
            rows = index[block.rows]
            try:
                blocks += _blocks(phase, block, rows, [tables[i] for i in rows], options)
            except NotApplicableError as error:
                unsupported += [(int(i), str(error)) for i in rows]
    known = frozenset(_PHASES.values())
    unsupported += [
        (i, f"phase: expected {' or '.join(_PHASES)}, got {records[i].get('phase', '')[:40]!r}")
        for i, r in enumerate(tables)
        if r.get("op") not in known
    ]
    return Predictions(
        blocks=tuple(blocks),
        unsupported=tuple(unsupported),
        assumptions=("power is taken at the activity that the predicted latency implies",),
    )


def renamed(record: Record) -> dict[str, str]:
    """A row under the column names of the attention tables."""
    out = {_COLUMNS.get(c, c): v for c, v in record.items()}
    out["op"] = _PHASES.get(record.get("phase", "").lower(), "")
    return out


def factor_flags(record: Record) -> tuple[float, ...]:
    """1.0 for each of ``FACTORS`` that a row (under either column names) has, else 0.0."""
    kernel = record.get("kernel") or record.get("kernel_source") or ""
    window = record.get("window") or record.get("window_size") or "0"
    cache = record.get("kv_dtype") or record.get("kv_cache_dtype") or ""
    has = ("triton" in kernel.lower(), window.strip() not in ("", "0"), "fp8" in cache.lower())
    return tuple(float(x) for x in has)


def _blocks(
    phase: str, block: Block, rows: np.ndarray, records: Sequence[Record], options: Options
) -> list[Block]:
    device = Devices(options.hardware).profile(block.group["hw"])
    if device.tdp_w is None:
        raise NotApplicableError(f"{device.name} states no TDP")
    schema = schema_of("decode_attention")
    shapes = [schema.shape_of(r) for r in records]
    columns = {n: np.array([s[2][n] for s in shapes]) for n in shapes[0][2]}
    work = kernel_kind(shapes[0][0]).work(device, columns, "")
    seconds = block.mid
    compute = np.asarray(work.flops) / work.peak_flops_per_s / seconds
    memory = np.asarray(work.n_bytes) / device.hbm_bytes_per_s / seconds
    law = load_power("decode" if phase == "decode" else "prefill")
    logs = np.log([law.factors.get(name, 1.0) for name in FACTORS])
    own = np.exp(np.array([factor_flags(r) for r in records]) @ logs)
    share = law.share_of_tdp(compute, 0.0, memory, own)
    watts = np.broadcast_to(device.tdp_w * share, rows.shape)
    wider = 1.0 if device.name == law.gpu else WIDER_OTHER_GPU
    factors = (law.low**wider, law.high**wider)
    if options.datasheet:
        watts, factors = np.full(rows.shape, device.tdp_w), (np.nan, np.nan)
    group = {**block.group, "phase": phase}
    basis = "calibrated" if device.name == law.gpu else "transferred"
    if options.datasheet:
        basis = "datasheet"
    values = {
        "power": (watts * factors[0], watts, watts * factors[1]),
        "energy": (
            block.low * watts * factors[0],
            seconds * watts,
            block.high * watts * factors[1],
        ),
        "latency": (block.low, seconds, block.high),
    }
    return [
        Block(
            group={**group, "metric": metric},
            rows=rows,
            low=low,
            mid=mid,
            high=high,
            basis=basis,
            primary=metric == "power",
            unit=_METRICS[metric][1],
        )
        for metric, (low, mid, high) in values.items()
    ]


def observed(record: Record, block: Block) -> float:
    """The value in the unit of the prediction."""
    column, _, scale = _METRICS[block.group["metric"]]
    return observed_value(record, column) * scale

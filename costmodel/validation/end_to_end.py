"""Predictions of end-to-end rows: cases to blocks, one vectorised call per case and metric."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from costmodel.errors import LccostError
from costmodel.hardware import HardwareProfile
from costmodel.kernels.families import load_family
from costmodel.serving import Served, load_engine_times, metric
from costmodel.serving.engine_times import EngineTimes
from costmodel.serving.metrics import roofline_s
from costmodel.validation.cases import Case, Grouped, Row, load_of, served_case
from costmodel.validation.devices import Devices
from costmodel.validation.kinds import Options
from costmodel.validation.memory_blocks import bare_method
from costmodel.validation.result import Block
from costmodel.validation.table import Record

ReadRows = Callable[[Record, int], tuple[Case, list[Row]]]
Reasons = list[tuple[int, str]]

#: Classes of models, as classes of metrics end.
DENSE, SPARSE = "dense", "sparse"
#: Metrics that no device can beat at the shape the row states.
_LIMITED = frozenset({"tpot", "step", "ttft"})


def grouped_rows(records: Sequence[Record], read: ReadRows) -> tuple[Grouped, Reasons]:
    """Rows by what they share, and why the others cannot be read."""
    grouped: Grouped = {}
    unsupported: Reasons = []
    for i, record in enumerate(records):
        try:
            case, rows = read(record, i)
        except LccostError as error:
            unsupported.append((i, str(error)))
            continue
        grouped.setdefault(case, []).extend(rows)
    return grouped, unsupported


def metric_class(row_metric: str, served: Served) -> str:
    """The class of metric whose scatter gives a prediction its interval."""
    name = {"tpot": "tpot", "step": "step", "ttft": "ttft"}.get(row_metric, "throughput")
    return f"{name}_{SPARSE if served.n_expert_layers else DENSE}"


def predicted_blocks(
    grouped: Grouped, options: Options, *, all_parts: bool = False
) -> tuple[list[Block], Reasons]:
    """One block per case and metric; rows of cases that do not go together with the reason.

    ``all_parts``: rows also count in the part of their engine and class of model.
    """
    devices = Devices(options.hardware)
    blocks: list[Block] = []
    unsupported: Reasons = []
    for case, rows in grouped.items():
        times = load_engine_times(case.engine)
        try:
            served = served_case(case, devices, times)
            keys = dict.fromkeys((r.metric, r.label, r.primary, r.parts) for r in rows)
            own = [
                _block(
                    case,
                    served,
                    times,
                    [r for r in rows if (r.metric, r.label, r.primary, r.parts) == key],
                    options,
                    all_parts,
                )
                for key in keys
            ]
        except LccostError as error:
            reason = " ".join(str(error).split())[:300]
            unsupported += [(i, reason) for i in sorted({r.index for r in rows})]
            continue
        blocks += own
    return blocks, unsupported


def _basis(times: EngineTimes, kind: str, hardware: HardwareProfile, engine: str) -> str:
    """The engine's, or that of its kernels where none were fitted near the device."""
    if load_family("gemm", engine, hardware, variant="bf16") is None:
        return "prior"
    return times.basis(kind, hardware.name)


def _block(
    case: Case,
    served: Served,
    times: EngineTimes,
    rows: Sequence[Row],
    options: Options,
    all_parts: bool,
) -> Block:
    first = rows[0]
    load = load_of(rows)
    index = np.array([r.index for r in rows], dtype=np.intp)
    kind = first.metric
    roofline = np.broadcast_to(roofline_s(kind, served, load), index.shape).astype(np.float64)
    unknown = np.full(index.shape, np.nan)
    low, mid, high, basis = unknown, roofline, unknown, "datasheet"
    if not options.datasheet:
        parameters = times.of(served)
        if case.own_form:
            parameters = replace(parameters, packed_attention_factor=1.0)
        seconds = metric(kind, times, served, load)(parameters)
        mid = np.broadcast_to(np.asarray(seconds, dtype=np.float64), index.shape)
        low, high = (
            np.broadcast_to(np.asarray(x, dtype=np.float64), index.shape)
            for x in times.interval(metric_class(kind, served), mid, served.run.hardware.name)
        )
        if kind in _LIMITED:
            low = np.maximum(low, np.minimum(roofline, mid))
        basis = _basis(times, metric_class(kind, served), served.run.hardware, case.engine)
    part = SPARSE if served.n_expert_layers else DENSE
    group = {
        "hw": served.run.hardware.name,
        "engine": case.shown or case.engine,
        "model": served.architecture.name,
        "precision": case.precision or "checkpoint",
        "metric": first.label,
    }
    if case.method != "full":
        group["method"] = bare_method(case.method)
        group["level"] = "reference" if case.own_form else case.level
    parts = first.parts
    if all_parts and first.primary:
        parts = (*parts, part, f"{case.shown or case.engine}_{part}")
    return Block(
        group=group,
        rows=index,
        low=low,
        mid=mid,
        high=high,
        basis=basis,
        primary=first.primary,
        parts=parts,
        limit=roofline if kind in _LIMITED and first.primary and case.method == "full" else None,
    )

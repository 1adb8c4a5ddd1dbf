"""End-to-end serving under a constant load: time per output token, unloaded time to first token.

A row's time to first token is under load; what is predicted is the unloaded one, so that metric
says how far a queue model is needed and is not part of the overall figures.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import LccostError
from costmodel.operation import Array
from costmodel.registry import load_architecture
from costmodel.serving import Load, Served, load_engine_times
from costmodel.serving.engine_times import EngineTimes
from costmodel.validation.cells import observed_value
from costmodel.validation.devices import Devices
from costmodel.validation.kinds import Options
from costmodel.validation.result import Block, Predictions
from costmodel.validation.serving_rows import Case, RowLoad, read_case
from costmodel.validation.table import Record

#: Metric -> column with milliseconds.
COLUMNS = {"tpot": "silicon_tpot_ms", "ttft_unloaded": "silicon_ttft_ms"}


def predict(records: Sequence[Record], options: Options) -> Predictions:
    """Seconds per output token of every row, and of the first."""
    grouped, unsupported = grouped_rows(records)
    devices = Devices(options.hardware)
    blocks: list[Block] = []
    for case, items in grouped.items():
        rows = np.array([i for i, _ in items], dtype=np.intp)
        try:
            served = served_case(case, devices)
            blocks += _blocks(case, served, rows, load_of([x for _, x in items]), options)
        except LccostError as error:
            unsupported += [(int(i), _plain(str(error))) for i in rows]
    return Predictions(
        blocks=tuple(blocks),
        unsupported=tuple(unsupported),
        assumptions=(
            "time to first token is predicted unloaded: what a request waits for others needs a "
            "queue model",
        ),
    )


def _plain(reason: str) -> str:
    return " ".join(reason.split())[:300]


def grouped_rows(
    records: Sequence[Record],
) -> tuple[dict[Case, list[tuple[int, RowLoad]]], list[tuple[int, str]]]:
    """Rows by what they share, and why the others cannot be read."""
    grouped: dict[Case, list[tuple[int, RowLoad]]] = {}
    unsupported: list[tuple[int, str]] = []
    for i, record in enumerate(records):
        try:
            case, load = read_case(record)
        except LccostError as error:
            unsupported.append((i, str(error)))
            continue
        grouped.setdefault(case, []).append((i, load))
    return grouped, unsupported


def served_case(case: Case, devices: Devices, engine: EngineTimes | None = None) -> Served:
    """The replica a case describes."""
    times = engine or load_engine_times(case.engine)
    hardware = devices.profile(devices.name({"system": case.system}, ("system",)))
    return Served.of(
        load_architecture(case.model),
        hardware,
        case.engine if case.engine in ENGINES else "vllm",
        deployment=case.deployment,
        precision=case.precision,
        fp8_cache=times.fp8_cache and case.precision in ("fp8", "fp4"),
    )


#: Engines with accounting rules of their own in ``costmodel/data/engines.toml``.
ENGINES = ("vllm", "sglang", "trtllm", "lmdeploy")


def load_of(rows: Sequence[RowLoad]) -> Load:
    """Rows as arrays."""
    return Load(
        concurrency=np.array([r.concurrency for r in rows]),
        input_tokens=np.array([r.input_tokens for r in rows]),
        output_tokens=np.array([r.output_tokens for r in rows]),
    )


def _blocks(
    case: Case, served: Served, rows: NDArray[np.intp], load: Load, options: Options
) -> list[Block]:
    times = load_engine_times(case.engine)
    unknown = np.full(rows.shape, np.nan)
    step = served.step(load.concurrency, np.asarray(load.input_tokens) + load.output_tokens / 2.0)
    tpot: tuple[Array, Array, Array]
    if options.datasheet:
        tpot = (unknown, step.roofline_s, unknown)
        ttft, basis = served.prefill(load.input_tokens).roofline_s, "datasheet"
    else:
        tpot = times.tpot_s(served, load, version=case.version)
        ttft, basis = times.ttft_s(served, load), str(times.basis)
    group = {
        "hw": served.run.hardware.name,
        "engine": case.engine,
        "model": served.architecture.name,
        "precision": case.precision or "checkpoint",
    }
    part = "sparse" if served.n_expert_layers else "dense"
    whole = [np.broadcast_to(np.asarray(x, dtype=np.float64), rows.shape) for x in tpot]
    return [
        Block(
            group={**group, "metric": "tpot"},
            rows=rows,
            low=whole[0],
            mid=whole[1],
            high=whole[2],
            basis=basis,
            parts=(part, f"{case.engine}_{part}"),
            limit=np.broadcast_to(step.roofline_s, rows.shape),
        ),
        Block(
            group={**group, "metric": "ttft_unloaded"},
            rows=rows,
            low=unknown,
            mid=np.broadcast_to(np.asarray(ttft, dtype=np.float64), rows.shape),
            high=unknown,
            basis=basis,
            primary=False,
        ),
    ]


def observed(record: Record, block: Block) -> float:
    """Milliseconds of the block's metric as seconds."""
    return observed_value(record, COLUMNS[block.group["metric"]]) * 1e-3

"""Packed caches in an engine: what each pricing predicts, and what the source's controls say."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from costmodel.memory import state_of
from costmodel.serving import Served, load_engine_times, metric
from costmodel.serving.__main__ import read_tables
from costmodel.serving.engine_times import EngineTimes, facts_of
from costmodel.serving.fit import Table, fit, read_runs
from costmodel.serving.parameters import default_parameters
from costmodel.validation.cases import Case, Row, load_of, served_case
from costmodel.validation.devices import Devices
from costmodel.validation.kv_methods import read_rows
from costmodel.validation.memory_blocks import bare_method
from costmodel.validation.table import Record, read_table
from costmodel.workload import Level

ENGINE = "lmdeploy-pytorch"
#: Pricing -> level, and attention on a packed cache against that on the 16-bit one.
PRICINGS: dict[str, tuple[Level, float]] = {
    "its bytes, one fused pass (`ideal`)": ("ideal", 0.0),
    "the authors' chain of operations": ("reference", 0.0),
    "a packed token as long as a 16-bit one (the engine's form)": ("ideal", 1.0),
}
#: The point whose gain is told: sequences, cached tokens of each.
POINT = (16.0, 2048.0)
#: Cached tokens of a batch from which a step shows its cache.
MANY_TOKENS = 8_000
#: Decoded tokens of a run, whose mean is what a row's time is of.
DECODED_TOKENS = 64

Floats = NDArray[np.float64]


def pricings(path: Path) -> str:
    """Decode steps of packed caches by a fit to the engine's runs of full attention alone."""
    tables, _ = read_tables(path.parent, {path.name: path})
    times = EngineTimes(name=ENGINE, parameters=default_parameters(), facts=facts_of(ENGINE))
    times = replace(times, parameters=fit(read_runs([_full(t) for t in tables], times)))
    runs = _decode(read_table(path).records)
    lines = [
        "| method | priced as | n | MAPE | bias | predicted gain at 16 x 2,048 |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for method in dict.fromkeys(m for m, *_ in runs if m != "full"):
        own = [(c, row, s) for m, c, row, s in runs if m == method]
        for name, (level, factor) in PRICINGS.items():
            error = np.array([_step_s(times, c, r, level, factor) / s - 1.0 for c, r, s in own])
            case, row, _ = own[0]
            at = replace(row, concurrency=POINT[0], input_tokens=POINT[1])
            full = _step_s(times, replace(case, method="full"), at, "ideal", 0.0)
            gain = 1.0 - _step_s(times, case, at, level, factor) / full
            lines.append(
                f"| {method} | {name} | {len(own)} | {np.abs(error).mean() * 100:.1f} "
                f"| {error.mean() * 100:+.1f} | {round(gain * 100) + 0} % |"
            )
    return "\n".join(lines) + "\n"


def controls(path: Path) -> str:
    """The same runs model by model: what a cached token costs, what packing promises and gains."""
    runs = _decode(read_table(path).records)
    times = load_engine_times(ENGINE)
    devices = Devices(None)
    lines = [
        "| model | cache, kB per token | runs | µs per cached token | GB/s that would be "
        "| runs below the roofline | error | KIVI-4: bytes promise | gained | n |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model in dict.fromkeys(c.model for _, c, *_ in runs):
        mine = [(m, c, row, s) for m, c, row, s in runs if c.model == model]
        full = {(r.concurrency, r.input_tokens): s for m, _, r, s in mine if m == "full"}
        packed = [(c, r, s) for m, c, r, s in mine if m != "full"]
        case = next(c for m, c, *_ in mine if m == "full")
        served = served_case(case, devices, times)
        token = float(_cache_bytes(served, 1.0, 1.0))
        cost, error = _cost(full)
        floor = [
            float(np.max(served.step(b, t).roofline_s)) for b, t in full
        ]  # weights and cache read once at the datasheet's rate
        below = sum(s < f for s, f in zip(full.values(), floor, strict=True))
        off = [
            _step_s(times, c, r, "ideal", 0.0) / s - 1.0 for m, c, r, s in mine if m == "full"
        ]  # of the shipped parameters
        cells = [
            served.architecture.name, f"{token / 1e3:.0f}", str(len(full)),
            f"{cost * 1e6:.2f} ± {error * 1e6:.2f}", f"{token / cost / 1e9:.0f}", str(below),
            f"{np.abs(off).mean() * 100:.1f}",
        ]  # fmt: skip
        promised, gained = _gains(served, packed, full, devices, times)
        if len(gained):
            spread = gained.std(ddof=1) / np.sqrt(gained.size)
            told = f"{gained.mean() * 100:.1f} ± {spread * 100:.1f} %"
            cells += [f"{promised.mean() * 100:.0f} %", told, str(gained.size)]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gains(
    full_case: Served,
    packed: Sequence[tuple[Case, Row, float]],
    full: dict[tuple[float, float], float],
    devices: Devices,
    times: EngineTimes,
) -> tuple[Floats, Floats]:
    """Shares of the 16-bit step that the saved bytes are worth at full bandwidth, and saved."""
    bandwidth = full_case.run.hardware.hbm_bytes_per_s
    promised, gained = [], []
    for case, row, seconds in packed:
        at = (row.concurrency, row.input_tokens)
        if at in full and at[0] * at[1] >= MANY_TOKENS:
            smaller = served_case(case, devices, times)
            saved = _cache_bytes(full_case, *at) - _cache_bytes(smaller, *at)
            promised.append(saved / bandwidth / full[at])
            gained.append(1.0 - seconds / full[at])
    return np.array(promised), np.array(gained)


def _cost(steps: dict[tuple[float, float], float]) -> tuple[float, float]:
    """Seconds per cached token and their standard error: least squares beside a constant."""
    tokens = np.array([b * (t + DECODED_TOKENS / 2) for b, t in steps])
    seconds = np.array(list(steps.values()))
    centred = tokens - tokens.mean()
    slope = float(centred @ seconds / (centred @ centred))
    rest = seconds - seconds.mean() - slope * centred
    return slope, float(np.sqrt(rest @ rest / (tokens.size - 2) / (centred @ centred)))


def _cache_bytes(served: Served, batch: float, tokens: float) -> float:
    return float(np.max(state_of(served.run, served.point(batch, np.float64(tokens)))[0]))


def _step_s(times: EngineTimes, case: Case, row: Row, level: Level, factor: float) -> float:
    parameters = replace(times.parameters, packed_attention_factor=factor)
    served = served_case(replace(case, level=level), Devices(None), times)
    return float(np.max(metric("step", times, served, load_of([row]))(parameters)))


def _decode(records: Sequence[Record]) -> list[tuple[str, Case, Row, float]]:
    """(bare method, case, row, seconds) of every decode run of the engine, full or packed."""
    out = []
    for i, record in enumerate(records):
        if "lmdeploy" not in record["hardware"].lower() or record["stage"] != "decoding":
            continue
        case, (row,) = read_rows(record, i)
        if case.method == "full" or "bits=" in case.method:
            seconds = row.concurrency / float(record["value"])
            out.append((bare_method(case.method), case, row, seconds))
    return out


def _full(table: Table) -> Table:
    """The table without runs of packed caches."""
    kept = [r for r in table.records if "bit" not in r.get("method", "").lower()]
    return replace(table, records=kept)

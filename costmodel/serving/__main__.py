"""Fit the engines that ship: ``python -m costmodel.serving --data DIR --output FILE``."""

import argparse
import datetime
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from costmodel.calibration.write import sha256, toml_value
from costmodel.errors import ConfigError
from costmodel.serving.engine_times import (
    DENSE_KEY,
    POOLED,
    SPARSE_KEY,
    EngineTimes,
    facts_of,
    known_engines,
)
from costmodel.serving.fit import Kin, Runs, Table, fit, read_runs
from costmodel.serving.judging import (
    engine_table,
    engines_of,
    gpus_of,
    joined,
    judge,
    leave_out,
    scatter_by_class,
)
from costmodel.serving.parameters import Parameters, default_parameters
from costmodel.validation import kv_methods, latency_throughput, serving
from costmodel.validation.result import Block
from costmodel.validation.serving_rows import read_rows
from costmodel.validation.table import Record, read_table

HEAD = """\
# Engines, fitted by `python -m costmodel.serving`; do not edit.
# Parameters: docstring of costmodel/serving/engine_times.py, those of dense models and, apart, of
# models with routed experts (sparse). held_out_percent: errors on runs that
# no fit had seen (both halves of 4 seeded splits by a hash of the shape columns; for "any": all
# runs of an engine by a fit to the others), by class of metric. coverage: of intervals that came
# from other runs. gpu_scatter: mean |log(observed / predicted)| of unseen runs on a GPU; scatter:
# by fits that had seen none of the GPU. Intervals are made of them (costmodel/intervals.py).
# The parameters are of all runs.
"""
#: Tables with runs of engines: name, how a row is read, how its value is.
TABLES: tuple[tuple[str, Callable[..., object], Callable[[Record, Block], float]], ...] = (
    ("serving.csv", read_rows, serving.observed),
    ("latency_throughput.csv", latency_throughput.read_rows, latency_throughput.observed),
    ("kv_methods.csv", kv_methods.read_rows, kv_methods.observed),
)


def main() -> None:
    """Fit, judge, write, print."""
    parser = argparse.ArgumentParser(prog="python -m costmodel.serving", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the tables of runs")
    parser.add_argument("--output", type=Path, required=True, help="TOML file to write")
    arguments = parser.parse_args()
    tables, sources = read_tables(arguments.data)
    missing = [name for name, *_ in TABLES if not (arguments.data / name).is_file()]
    if missing:
        print(f"fitted without {', '.join(missing)}: not in {arguments.data}", file=sys.stderr)
    lines = [HEAD + "".join(f"# {s}\n" for s in sources)]
    lines += [f'fitted = "{datetime.date.today().isoformat()}"', ""]
    runs_of = {
        name: read_runs(
            tables,
            EngineTimes(name=name, parameters=default_parameters(), facts=facts_of(name)),
            everyone=name == POOLED,
        )
        for name in (*known_engines(), POOLED)
    }
    kin = Kin([r for n, runs in runs_of.items() if facts_of(n).kin for r in runs])
    for name, runs in runs_of.items():
        if not runs:
            continue
        own_kin = kin if facts_of(name).kin else None
        if name == POOLED:
            judged = leave_out(runs, engines_of, "engine")
            here = elsewhere = scatter_by_class(judged, joined(runs, engines_of))
        else:
            judged = judge(runs, own_kin)
            here = scatter_by_class(judged)
            others = leave_out(runs, gpus_of, "GPU", own_kin)
            elsewhere = scatter_by_class(others, joined(runs, gpus_of))
        fitted = engine_table(_fits(runs, own_kin), judged, here, elsewhere)
        lines.append(f"[engine.{toml_value(name)}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in fitted.items()]
        lines.append("")
        print(name, {k: v for k, v in fitted.items() if k in (DENSE_KEY, SPARSE_KEY)}, flush=True)
        for kind, figures in fitted["held_out_percent"].items():
            print("   ", kind, figures, flush=True)
    arguments.output.write_text("\n".join(lines), encoding="utf-8")


def _fits(runs: Sequence[Runs], kin: Kin | None) -> dict[str, Parameters]:
    """Parameters by class of models, where the engine or its kin have runs of the class."""
    out: dict[str, Parameters] = {}
    for key, sparse in ((DENSE_KEY, False), (SPARSE_KEY, True)):
        own = [r for r in runs if r.is_sparse == sparse]
        if own or kin:
            start = kin.without("nothing", lambda r: r.mask, sparse=sparse) if kin else None
            out[key] = fit(own, kin=start)
    return out


def read_tables(
    folder: Path, paths: Mapping[str, Path] | None = None
) -> tuple[list[Table], list[str]]:
    """The tables of runs in a folder, or at ``paths`` by name, and what they are."""
    tables, sources = [], []
    for name, read, observed in TABLES:
        path = (paths or {}).get(name, folder / name)
        if path.is_file():
            tables.append(
                Table(records=read_table(path).records, read=read, observed=_labelled(observed))  # type: ignore[arg-type]
            )
            sources.append(f"{name}, SHA-256 {sha256(path)}")
    if not tables:
        raise ConfigError(f"{folder}: none of {', '.join(t[0] for t in TABLES)} is there")
    return tables, sources


def _labelled(observed: Callable[[Record, Block], float]) -> Callable[[Record, str], float]:
    """Observed value by the label of a metric; NaN where it cannot be read."""
    none = np.empty(0)

    def value(record: Record, label: str) -> float:
        block = Block(
            group={"metric": label},
            rows=np.empty(0, dtype=np.intp),
            low=none,
            mid=none,
            high=none,
            basis="",
        )
        try:
            return observed(record, block)
        except ConfigError:
            return float("nan")

    return value


if __name__ == "__main__":
    main()

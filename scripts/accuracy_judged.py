"""Every row of the published tables predicted by a fit that had not seen it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fit_power
import numpy as np
from numpy.typing import NDArray

from costmodel.calibration.families import LEAST_ROWS, fit_families, judged_intervals
from costmodel.calibration.tables import Rows, read_table
from costmodel.calibration.transfer import family_elsewhere, generation_spread
from costmodel.hardware import load_hardware
from costmodel.kernels.families import Family, shipped_families
from costmodel.kernels.kinds import kernel_kind
from costmodel.serving.__main__ import read_tables
from costmodel.serving.engine_times import EngineTimes, facts_of, known_engines
from costmodel.serving.fit import Kin, Runs, read_runs
from costmodel.serving.judging import engines_of, gpus_of, judge, leave_out, models_of
from costmodel.serving.parameters import default_parameters
from costmodel.validation import validate

Floats = NDArray[np.float64]

#: Table -> the operation as the page calls it.
KERNELS = {
    "gemm.csv": "GEMM",
    "decode_attention.csv": "decode attention",
    "prefill_attention.csv": "prefill attention",
    "mla.csv": "latent attention (MLA)",
    "linear_attention.csv": "linear attention",
    "sparse_attention.csv": "sparse attention (DSA)",
    "moe.csv": "mixture of experts",
    "collectives.csv": "collectives",
}
ENGINE_TABLES = ("serving.csv", "latency_throughput.csv", "kv_methods.csv")
#: First tokens of prompts this long are judged apart.
LONG_PROMPT = 10_000.0
_CLASSES = {
    "tpot_dense": "time per output token under load, dense models",
    "tpot_sparse": "time per output token under load, sparse (MoE) models",
    "step_dense": "decode step of a static batch",
    "step_sparse": "decode step of a static batch, sparse models",
    "ttft_dense": "time to first token, unloaded",
    "ttft_sparse": "time to first token, unloaded, sparse models",
    "throughput_dense": "throughput of whole runs, as time",
    "throughput_sparse": "throughput of whole runs, sparse models",
}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Judged:
    """Rows of one group; predicted_s has a row per judging split.

    operation   what the rows are of; group: hardware, engine, kernel and what else
    coverage    percent of rows inside their interval
    width       (high - low) / mid in percent: of every row (and split), or the median of them
    fitted      False where nothing was fitted
    """

    table: str
    operation: str
    group: tuple[str, ...]
    variant: str
    predicted: Floats
    observed: Floats
    roofline: Floats
    coverage: float
    width: float | Floats
    fitted: bool = True
    unit: str = "s"


def judge_tables(tables: Sequence[Path]) -> list[Judged]:
    """All tables, in the order of the page."""
    by_name = {path.name: path for path in tables}
    out: list[Judged] = []
    for name in KERNELS:
        if name in by_name:
            print(f"judging {name}", flush=True)
            out += _kernels(by_name[name])
    if any(name in by_name for name in ENGINE_TABLES):
        print("judging engines", flush=True)
        out += _engines([by_name[n] for n in ENGINE_TABLES if n in by_name])
    if "memory.csv" in by_name:
        out += _memory(by_name["memory.csv"])
    if "power_b200.csv" in by_name:
        out += _power(by_name["power_b200.csv"])
    return out


def _kernels(path: Path) -> list[Judged]:
    by_kind: dict[str, list[Rows]] = {}
    for rows in read_table(path).families:
        if len(rows) >= LEAST_ROWS:
            by_kind.setdefault(rows.key.kind, []).append(rows)
    out = []
    for families in by_kind.values():
        fitted = fit_families(families)
        for f, (coverage, width) in zip(fitted, judged_intervals(fitted), strict=True):
            out.append(
                Judged(
                    table=path.name,
                    operation=KERNELS[path.name],
                    group=(f.key.hardware, f.key.engine, f.key.kernel),
                    variant=" ".join(dict.fromkeys((*phase(f.key.kind), f.key.variant))).strip(),
                    predicted=f.held_out_s,
                    observed=f.rows.observed_s,
                    roofline=f.roofline_s,
                    coverage=coverage,
                    width=width,
                )
            )
    return out


def phase(kind: str) -> tuple[str, ...]:
    """Words that tell operation kinds of one table apart."""
    words = kind.removeprefix("mla_").removesuffix("_attention")
    return (words,) if words in ("prefill", "decode") else ()


def _runs_by_engine(paths: Sequence[Path]) -> tuple[dict[str, list[Runs]], Kin]:
    """Runs of every engine that has some, and those of the engines that are kin."""
    tables, _ = read_tables(paths[0].parent, {p.name: p for p in paths})
    runs = {
        name: read_runs(
            tables, EngineTimes(name=name, parameters=default_parameters(), facts=facts_of(name))
        )
        for name in known_engines()
    }
    kin = Kin([r for name, own in runs.items() if facts_of(name).kin for r in own])
    return {name: own for name, own in runs.items() if own}, kin


def _column(runs: Sequence[Runs], read: Callable[[Runs], Any]) -> NDArray[Any]:
    """A property of every row that counts."""
    return np.concatenate([np.broadcast_to(read(r), r.mask.shape)[r.mask] for r in runs])


def _engines(paths: Sequence[Path]) -> list[Judged]:
    out = []
    by_engine, kin = _runs_by_engine(paths)
    for name, runs in by_engine.items():
        judged = judge(runs, kin if facts_of(name).kin else None)
        hardware = _column(runs, lambda r: r.hardware)
        prompts = _column(runs, lambda r: r.prompt_tokens)
        for kind in sorted(set(judged.metric_class.tolist())):
            for hw in sorted(set(hardware[judged.metric_class == kind].tolist())):
                mine = (judged.metric_class == kind) & (hardware == hw)
                for title, mask in _by_length(kind, mine, prompts):
                    part = judged.where(mask)
                    out.append(
                        Judged(
                            table="serving.csv",
                            operation=title,
                            group=(hw, name),
                            variant="",
                            predicted=part.predicted_s,
                            observed=part.observed_s,
                            roofline=part.roofline_s,
                            coverage=float(np.mean(part.inside) * 100.0),
                            width=part.width * 100.0,
                        )
                    )
    order = list(dict.fromkeys(_titles()))
    return sorted(out, key=lambda j: order.index(j.operation))


def _titles() -> Iterable[str]:
    for kind in _CLASSES:
        for title, _ in _by_length(kind, np.ones(2, dtype=bool), np.array([0.0, LONG_PROMPT])):
            yield title


def _by_length(
    kind: str, mask: NDArray[np.bool_], prompts: Floats
) -> list[tuple[str, NDArray[np.bool_]]]:
    """First tokens by the length of the prompt; everything else as it is."""
    if not kind.startswith("ttft"):
        return [(_CLASSES[kind], mask)] if mask.any() else []
    long = mask & (prompts >= LONG_PROMPT)
    short = mask & (prompts < LONG_PROMPT)
    titles = (f"{_CLASSES[kind]}, from 10,000 tokens", f"{_CLASSES[kind]}, below 10,000 tokens")
    return [(t, m) for t, m in zip(titles, (long, short), strict=True) if m.any()]


def left_out(paths: Sequence[Path]) -> dict[str, list[Judged]]:
    """Runs of each GPU, of each model, of each engine, by fits to the runs of all others."""
    by_engine, kin = _runs_by_engine(paths)
    out: dict[str, list[Judged]] = {"GPU": [], "model": [], "engine": []}
    for name, runs in by_engine.items():
        own_kin = kin if facts_of(name).kin else None
        for what, labels in (("GPU", gpus_of), ("model", models_of)):
            judged = leave_out(runs, labels, what, own_kin)
            label = _column(runs, labels)
            out[what] += _by_label(judged, label, name, what)
    everyone = [
        r for runs in by_engine.values() for r in runs if facts_of(r.engine).with_method == "full"
    ]
    judged = leave_out(everyone, engines_of, "engine")
    out["engine"] = _by_label(judged, _column(everyone, engines_of), "any", "engine")
    return out


def _by_label(judged: Any, labels: NDArray[Any], engine: str, what: str) -> list[Judged]:
    out = []
    for kind in sorted(set(judged.metric_class.tolist())):
        for label in sorted(set(labels[judged.metric_class == kind].tolist())):
            part = judged.where((judged.metric_class == kind) & (labels == label))
            out.append(
                Judged(
                    table="serving.csv",
                    operation=_CLASSES[kind],
                    group=(label, engine),
                    variant="",
                    predicted=part.predicted_s,
                    observed=part.observed_s,
                    roofline=part.roofline_s,
                    coverage=float(np.mean(part.inside) * 100.0),
                    width=part.width * 100.0,
                )
            )
    return out


def transferred_kernels(paths: Sequence[Path]) -> list[Judged]:
    """Kernel tables predicted by the families of other GPUs: nothing of the GPU was fitted."""
    out = []
    for path in paths:
        by_kind: dict[str, list[Rows]] = {}
        for rows in read_table(path).families:
            if len(rows) >= LEAST_ROWS:
                by_kind.setdefault(rows.key.kind, []).append(rows)
        for kind, members in by_kind.items():
            for hardware in dict.fromkeys(rows.key.hardware for rows in members):
                # How much wider an interval becomes is of the other GPUs' rows as well, of which
                # this one's families may be the nearest: without them pairs are further apart, and
                # intervals wider than those that ship.
                others = [rows for rows in members if rows.key.hardware != hardware]
                spread = generation_spread(shipped_families(kind), others)
                families = [replace(f, generation_spread=spread) for f in shipped_families(kind)]
                own = [rows for rows in members if rows.key.hardware == hardware]
                judged = [_transferred(path, rows, families) for rows in own]
                out += [j for j in judged if j is not None]
    return out


def _transferred(path: Path, rows: Rows, families: Sequence[Family]) -> Judged | None:
    device, key = load_hardware(rows.key.hardware), rows.key
    family = family_elsewhere(rows, families)
    if family is None:
        return None
    low, mid, high = (
        np.broadcast_to(np.asarray(t), rows.observed_s.shape)
        for t in family.time_s(device, rows.shape, cold=False)
    )
    roofline = kernel_kind(key.kind).roofline_s(device, rows.shape, key.variant)
    return Judged(
        table=path.name,
        operation=KERNELS[path.name],
        group=(key.hardware, f"from {family.hardware}"),
        variant=" ".join(phase(key.kind)),
        predicted=mid[None, :],
        observed=rows.observed_s,
        roofline=np.broadcast_to(np.asarray(roofline), rows.observed_s.shape),
        coverage=float(np.mean((rows.observed_s >= low) & (rows.observed_s <= high)) * 100.0),
        width=float(np.median((high - low) / mid) * 100.0),
    )


def methods_by_level(path: Path) -> dict[str, Any]:
    """Cache methods in real engines: figures by stage and method, at both levels."""
    return {
        name: figures
        for name, figures in validate(path).parts.items()
        if name.startswith(("decode_", "prefill_"))
    }


def _memory(path: Path) -> list[Judged]:
    ours = _rows_of(path, None)
    roofline = _rows_of(path, "datasheet")
    names = {
        "peak_torch": "peak memory",
        "peak_profile": "peak memory",
        "state": "KV cache in memory",
    }
    by_group: dict[tuple[str, ...], list[int]] = {}
    for line, (group, *_) in ours.items():
        if group["metric"] in names:
            key = (group["hw"], group["engine"], group["method"], names[group["metric"]])
            by_group.setdefault(key, []).append(line)
    out = []
    for (hw, engine, method, name), lines in by_group.items():
        out.append(
            Judged(
                table=path.name,
                operation=name,
                group=(hw, engine, method),
                variant="",
                predicted=np.array([[ours[x][1] for x in lines]]),
                observed=np.array([ours[x][2] for x in lines]),
                roofline=np.array([roofline[x][1] for x in lines]),
                coverage=float(np.mean([ours[x][3] for x in lines]) * 100.0),
                width=float(np.median([ours[x][4] for x in lines]) * 100.0),
                fitted=False,
                unit="bytes",
            )
        )
    return out


def _rows_of(path: Path, baseline: str | None) -> dict[int, tuple[Any, float, float, bool, float]]:
    result = validate(path, baseline=baseline, n_worst=100_000)
    return {
        row["line"]: (
            row["group"],
            row["predicted"],
            row["observed"],
            row["low"] is not None and row["low"] <= row["observed"] <= row["high"],
            0.0 if row["low"] is None else (row["high"] - row["low"]) / row["predicted"],
        )
        for row in result.worst
    }


def _power(path: Path) -> list[Judged]:
    out = []
    tables = [fit_power.rows_of(path, phase) for phase in ("decode", "prefill")]
    results = zip(*(fit_power.judged(tables, seed) for seed in fit_power.SEEDS), strict=True)
    for rows, splits in zip(tables, results, strict=True):
        ratio, inside, width = (np.stack(x) for x in zip(*splits, strict=True))
        out.append(
            Judged(
                table=path.name,
                operation="power of attention kernels",
                group=("b200-sxm", rows.regime),
                variant="",
                predicted=ratio * rows.share * 1000.0,
                observed=rows.share * 1000.0,
                roofline=np.full(rows.share.shape, 1000.0),
                coverage=float(inside.mean() * 100.0),
                width=width * 100.0,
                unit="W",
            )
        )
    return out

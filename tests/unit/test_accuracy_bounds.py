"""Errors on rows that no fit had seen stay below recorded bounds.

Three checks. What ships with its held-out figures (kernel families, engines, power: written by the
fits, each row judged by a fit without it) stays below the bound of its operation. Engines are
fitted again on half of the published runs and judged on the other half, here. And the shipped
parameters, which have seen all rows, are no worse on them than the recorded held-out figure: a
change of the code that predicts worse shows there at once.
"""

import json
import lzma
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from costmodel.calibration.transfer import transfer_errors
from costmodel.serving.__main__ import read_tables
from costmodel.serving.engine_times import POOLED, EngineTimes, facts_of
from costmodel.serving.fit import Kin, Runs, read_runs
from costmodel.serving.judging import halves_of, held_out
from costmodel.serving.parameters import default_parameters
from costmodel.validation import Validation, validate

MEASURED = Path(__file__).parents[1] / "data" / "measured"
DATA = Path(__file__).parents[2] / "costmodel" / "data"

#: MAPE in percent on unseen rows, kernels replayed warm. Each bound is what the project demands of
#: itself where that is a number, else half of the datasheet roofline's error on the same rows; of
#: attention and products what was reached, with a tenth to spare.
GEMM_BF16_BOUND = 9.0
GEMM_FP8_BOUND = 15.5
DECODE_ATTENTION_BOUND = 9.0
DECODE_ATTENTION_A100_BOUND = 10.0
PREFILL_ATTENTION_BOUND = 10.5
MLA_BOUND = 9.0  # roofline 80
#: Latent attention on a GPU of which nothing was fitted, the kernel known by its name.
MLA_LEFT_OUT_BOUND = 21.0
SCAN_BOUND = 13.0  # roofline 74
SPARSE_ATTENTION_BOUND = 17.0  # roofline 76
MOE_BOUND = 18.0  # roofline 59; routing of the published rows is random, and unknown row by row
COLLECTIVES_BOUND = 16.0  # roofline 76
#: Watts of single kernels: the published counter averages over what ran around them.
POWER_BOUND = 25.0
#: Time per output token per engine (the worst has 11 runs), and over all engines.
SERVING_DENSE_BOUND, SERVING_DENSE_OVERALL_BOUND = 12.0, 8.0
SERVING_SPARSE_BOUND, SERVING_SPARSE_OVERALL_BOUND = 25.0, 15.5
#: First tokens (two in three prompts below 10,000 tokens), steps of static batches, whole runs.
FIRST_TOKEN_BOUND, STEP_BOUND, THROUGHPUT_BOUND = 9.0, 6.0, 16.0
#: Mean |log| of runs under load whose GPU was left out: 0.39 of dense models where parameters of
#: runs of sparse ones were carried over.
LEFT_OUT_SCATTER_BOUND = 0.25
#: Half a split is one of four that are judged: its figure scatters by so much.
ONE_SPLIT_SLACK = 1.15
#: Shares of unseen rows inside their intervals, percent, and width over MAPE. Of errors that are
#: all alike four in five take 3.2 times their mean; of kernels it is known which are hard: 3.0 is
#: the bar for the median over rows. Means of medians over families lie up to a tenth above it.
COVERAGE_LEAST, COVERAGE_MOST = 80.0, 95.0
WIDTH_OVER_MAPE = 3.3
ENGINE_WIDTH_OVER_MAPE = 3.8

Family = Mapping[str, Any]
FAMILIES: list[tuple[str, Callable[[Family], bool], float]] = [
    ("gemm", lambda f: f["variant"] == "bf16", GEMM_BF16_BOUND),
    ("gemm", lambda f: f["variant"] != "bf16", GEMM_FP8_BOUND),
    ("decode_attention", lambda f: True, DECODE_ATTENTION_BOUND),
    ("decode_attention", lambda f: "a100" in f["hardware"], DECODE_ATTENTION_A100_BOUND),
    ("prefill_attention", lambda f: True, PREFILL_ATTENTION_BOUND),
    ("mla_decode_attention", lambda f: True, MLA_BOUND),
    ("mla_prefill_attention", lambda f: True, MLA_BOUND),
    ("scan", lambda f: True, SCAN_BOUND),
    ("sparse_attention", lambda f: True, SPARSE_ATTENTION_BOUND),
    ("moe_gemm", lambda f: True, MOE_BOUND),
    ("collective", lambda f: True, COLLECTIVES_BOUND),
]


def families(kind: str) -> list[Family]:
    rows: list[Family] = json.loads((DATA / "families" / f"{kind}.json").read_text("utf-8"))[
        "family"
    ]
    return rows


def mean(rows: list[Family], name: str) -> float:
    """A held-out figure over families, by rows."""
    return float(
        np.average([f["held_out_percent"][name] for f in rows], weights=[f["n_rows"] for f in rows])
    )


@pytest.mark.parametrize(("kind", "keep", "bound"), FAMILIES)
def test_families_on_unseen_rows(kind: str, keep: Callable[[Family], bool], bound: float) -> None:
    rows = [f for f in families(kind) if keep(f)]
    assert mean(rows, "mape") <= bound
    assert mean(rows, "mape") <= 0.5 * mean(rows, "roofline_mape")


@pytest.mark.parametrize("kind", sorted({kind for kind, _, _ in FAMILIES}))
def test_intervals_of_families_hold_unseen_rows(kind: str) -> None:
    rows = families(kind)
    assert COVERAGE_LEAST <= mean(rows, "coverage") <= COVERAGE_MOST
    assert mean(rows, "interval_width") <= WIDTH_OVER_MAPE * mean(rows, "mape")


def engines() -> Mapping[str, Any]:
    table: Mapping[str, Any] = tomllib.loads((DATA / "serving.toml").read_text("utf-8"))["engine"]
    return table


#: Engines that serve under load.
KIN = ("vllm", "sglang", "trtllm")


@pytest.mark.parametrize("engine", KIN)
def test_engines_on_unseen_runs(engine: str) -> None:
    figures = engines()[engine]["held_out_percent"]
    assert figures["tpot_dense"]["mape"] <= SERVING_DENSE_BOUND
    assert figures["tpot_sparse"]["mape"] <= SERVING_SPARSE_BOUND


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("tpot_dense", SERVING_DENSE_OVERALL_BOUND),
        ("tpot_sparse", SERVING_SPARSE_OVERALL_BOUND),
        ("ttft_dense", FIRST_TOKEN_BOUND),
        ("step_dense", STEP_BOUND),
        ("throughput_dense", THROUGHPUT_BOUND),
    ],
)
def test_engines_together_on_unseen_runs(kind: str, bound: float) -> None:
    own = [e["held_out_percent"] for name, e in engines().items() if name != POOLED]
    judged = [f[kind] for f in own if kind in f]
    rows = [f["n"] for f in judged]
    assert np.average([f["mape"] for f in judged], weights=rows) <= bound
    if kind.startswith("tpot"):
        assert all(f["scatter"] <= LEFT_OUT_SCATTER_BOUND for f in judged)


def test_intervals_of_engines_hold_unseen_runs() -> None:
    judged = [f for e in engines().values() for f in e["held_out_percent"].values()]
    judged = [f for f in judged if "coverage" in f]
    rows = [f["n"] for f in judged]
    assert 80.0 <= np.average([f["coverage"] for f in judged], weights=rows) <= COVERAGE_MOST
    # by rows, as a class of a few has an interval that its neighbours decide
    width, mape = (
        np.average([f[n] for f in judged], weights=rows) for n in ("interval_width", "mape")
    )
    assert width <= ENGINE_WIDTH_OVER_MAPE * mape


def test_power_on_unseen_rows() -> None:
    table = tomllib.loads((DATA / "power.toml").read_text("utf-8"))
    figures = [table[regime]["held_out_percent"] for regime in ("decode", "prefill")]
    rows = [f["n"] for f in figures]
    assert np.average([f["mape"] for f in figures], weights=rows) <= POWER_BOUND
    assert 80.0 <= np.average([f["coverage"] for f in figures], weights=rows) <= COVERAGE_MOST
    width, mape = (
        np.average([f[n] for f in figures], weights=rows) for n in ("interval_width", "mape")
    )
    assert width <= WIDTH_OVER_MAPE * mape


def table(name: str, folder: Path) -> Path:
    path = MEASURED / f"{name}.csv"
    if not path.is_file():
        path = folder / f"{name}.csv"
        path.write_bytes(lzma.decompress((MEASURED / f"{name}.csv.xz").read_bytes()))
    return path


def test_engines_fitted_here_on_half_of_the_runs(tmp_path: Path) -> None:
    tables, _ = read_tables(tmp_path, {"serving.csv": table("serving", tmp_path)})
    runs: dict[str, list[Runs]] = {
        name: read_runs(
            tables, EngineTimes(name=name, parameters=default_parameters(), facts=facts_of(name))
        )
        for name in KIN
    }
    kin = Kin([r for own in runs.values() for r in own])
    bounds = {"tpot_dense": SERVING_DENSE_BOUND, "tpot_sparse": SERVING_SPARSE_BOUND}
    for engine, own in runs.items():
        predicted = held_out(own, halves_of(0), "half", kin)
        for name, bound in bounds.items():
            members = [
                (p, r) for p, r in zip(predicted, own, strict=True) if r.metric_class == name
            ]
            error = np.concatenate([np.abs(p / r.observed_s - 1.0)[r.mask] for p, r in members])
            assert error.size > 10
            assert 100.0 * error.mean() <= ONE_SPLIT_SLACK * bound, (engine, name)


def possible(validation: Validation) -> float:
    """Error on the rows that were fitted: those the device could have run as stated."""
    figures = validation.parts.get("without_impossible_rows", validation.overall)
    assert figures.mape_percent is not None
    assert figures.n > 50
    return figures.mape_percent


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("gemm", ["gemm"]),
        ("decode_attention", ["decode_attention"]),
        ("prefill_attention", ["prefill_attention"]),
        ("mla", ["mla_decode_attention", "mla_prefill_attention"]),
        ("linear_attention", ["scan"]),
        ("sparse_attention", ["sparse_attention"]),
        ("moe", ["moe_gemm"]),
        ("collectives", ["collective"]),
    ],
)
def test_shipped_families_are_no_worse_on_rows_they_have_seen(
    name: str, kinds: list[str], tmp_path: Path
) -> None:
    recorded = mean([f for kind in kinds for f in families(kind)], "mape")
    # Families of a few rows are predicted by another's: they cost a fifth more in one table.
    assert possible(validate(table(name, tmp_path))) <= 1.2 * recorded


@pytest.mark.parametrize("name", ["serving", "latency_throughput", "kv_methods"])
def test_shipped_engines_halve_the_error_of_the_datasheet(name: str, tmp_path: Path) -> None:
    path = table(name, tmp_path)
    ours, datasheet = validate(path), validate(path, baseline="datasheet")
    assert ours.overall.n == datasheet.overall.n > 50
    assert datasheet.overall.mape_percent is not None
    assert possible(ours) <= 0.5 * datasheet.overall.mape_percent


def test_latent_attention_of_a_gpu_left_out(tmp_path: Path) -> None:
    found = transfer_errors([table("mla", tmp_path)], ("h100-sxm", "b200-sxm"))
    assert {t.hardware for t in found} == {"h100-sxm", "b200-sxm"}
    rows = [t.n_rows for t in found]
    mape, coverage = (
        np.average([t.errors[n] for t in found], weights=rows) for n in ("mape", "coverage")
    )
    assert mape <= MLA_LEFT_OUT_BOUND
    assert COVERAGE_LEAST <= coverage <= COVERAGE_MOST


def test_memory_is_calculated(tmp_path: Path) -> None:
    """Nothing is fitted; peaks were read off a plot to 0.03 GiB."""
    parts = validate(table("memory", tmp_path)).parts
    peak, state = parts["peak"], parts["state"]
    assert peak.mape_percent is not None
    assert peak.mape_percent <= 1.0
    assert state.coverage_percent is not None
    assert state.coverage_percent >= 90.0

"""Reading tables, leaving bad rows out, and fitting: against small tables made by hand."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from costmodel.calibration.families import (
    as_tables,
    errors_percent,
    fit_families,
    half_of_shapes,
)
from costmodel.calibration.fit import fit_parameters, halves
from costmodel.calibration.intervals import covered_percent, intervals_of
from costmodel.calibration.schemas import SCHEMAS
from costmodel.calibration.tables import FamilyKey, Rows, read_table
from costmodel.calibration.write import document
from costmodel.errors import ConfigError
from costmodel.hardware import load_hardware
from costmodel.kernels.families import family_from_table
from costmodel.kernels.gemm import PRIORS
from costmodel.kernels.kinds import kernel_kind
from costmodel.kernels.physics import values

GEMM = ("hw", "framework", "kernel", "dtype", "m", "n", "k", "latency_us")


def table(path: Path, rows: list[tuple[object, ...]], columns: tuple[str, ...] = GEMM) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def test_rows_become_families_and_seconds(tmp_path: Path) -> None:
    t = read_table(
        table(
            tmp_path / "t.csv",
            [
                ("h100_sxm", "vLLM", "A", "bfloat16", 16, 4096, 4096, 15.0),
                ("h100_sxm", "vllm", "a", "float16", 32, 4096, 4096, 16.0),
                ("a100_sxm", "vllm", "a", "bfloat16", 16, 4096, 4096, 25.0),
            ],
        )
    )
    assert [(f.key.hardware, f.key.engine, f.key.kernel, len(f)) for f in t.families] == [
        ("a100-sxm-80gb", "vllm", "a", 1),
        ("h100-sxm", "vllm", "a", 2),
    ]
    assert t.families[1].observed_s.tolist() == pytest.approx([15e-6, 16e-6])
    assert not t.rejected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("h100_sxm", "vllm", "a", "bfloat16", 16, 4096, 4096, "fast"), "expected a number"),
        (("h100_sxm", "vllm", "a", "bfloat16", 16.5, 4096, 4096, 15), "whole number"),
        (("h100_sxm", "vllm", "a", "bfloat16", 16, 4096, 4096, -3), "above 0"),
        (("h100_sxm", "vllm", "a", "bfloat16", 16, 4096, 4096, "nan"), "finite"),
        (("h101", "vllm", "a", "bfloat16", 16, 4096, 4096, 15), "no known GPU"),
        (("h100_sxm", "vllm", "a", "int3", 16, 4096, 4096, 15), "no kernel model"),
        # 1.1 PFLOP in 15 ms: milliseconds written as microseconds.
        (("h100_sxm", "vllm", "a", "bfloat16", 8192, 8192, 8192, 1.5), "impossible"),
        # 15 us of work in 15 s: nanoseconds written as microseconds.
        (("h100_sxm", "vllm", "a", "bfloat16", 16, 4096, 4096, 15e6), "doubtful"),
    ],
)
def test_a_bad_row_is_reported_with_its_line_and_left_out(
    tmp_path: Path, row: tuple[object, ...], reason: str
) -> None:
    good = [("h100_sxm", "vllm", "a", "bfloat16", m, 4096, 4096, 15.0 + m) for m in range(1, 21)]
    t = read_table(table(tmp_path / "t.csv", [*good, row]))
    assert len(t) == 20
    assert [r.line for r in t.rejected] == [22]
    assert reason in t.rejected[0].reason


def test_a_family_that_is_mostly_impossible_is_left_out_as_a_whole(tmp_path: Path) -> None:
    rows = [("h100_sxm", "vllm", "a", "bfloat16", 8192, 8192, 8192, 1.5)] * 4
    rows += [("h100_sxm", "vllm", "a", "bfloat16", 16, 4096, 4096, 15.0)] * 6
    t = read_table(table(tmp_path / "t.csv", rows))
    assert len(t) == 0
    assert len(t.rejected) == 10
    assert "do not describe" in t.rejected[-1].reason


def test_replayed_rows_may_beat_dram_but_not_the_cache(tmp_path: Path) -> None:
    # 33.5 MB of weights fit the L40S cache: 38.9 us of DRAM, 1.5 us of cache at its limit.
    warm = ("l40s", "vllm", "a", "bfloat16", 1, 4096, 4096, 12.0)
    no = ("l40s", "vllm", "a", "bfloat16", 1, 4096, 4096, 0.5)
    rows = [warm] * 9 + [no]
    t = read_table(table(tmp_path / "t.csv", rows))
    assert [r.line for r in t.rejected] == [11]


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", [(1, 2, 3)], ("m", "n", "latency_us"))
    with pytest.raises(ConfigError, match=r"dtype, k"):
        read_table(path)


def test_an_empty_file_and_a_missing_file_say_so(tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="column names"):
        read_table(empty)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_table(tmp_path / "none.csv")


def synthetic(n: int, scatter: float, seed: int = 0) -> tuple[Rows, dict[str, float]]:
    """Calls of a kernel whose parameters are known, with log-normal scatter."""
    truth = values(PRIORS) | {"launch_s": 5e-6, "bandwidth_fraction": 0.7, "tensor_fraction": 0.5}
    generator = np.random.default_rng(seed)
    shape = {
        "m": np.exp2(generator.integers(0, 15, n)).astype(np.float64),
        "n": np.exp2(generator.integers(9, 16, n)).astype(np.float64),
        "k": np.exp2(generator.integers(8, 15, n)).astype(np.float64),
    }
    kind = kernel_kind("gemm")
    exact = kind.time_s(kind.build(truth), load_hardware("h100-sxm"), shape, "bf16", False)
    observed = exact * np.exp(generator.normal(0.0, scatter, n))
    key = FamilyKey("gemm", "bf16", "h100-sxm", "vllm", "a")
    return Rows(key, shape, observed, np.arange(n)), truth


def test_a_fit_finds_the_parameters_that_made_the_rows() -> None:
    rows, truth = synthetic(120, 0.01)
    item = (rows, load_hardware("h100-sxm"), {})
    found = fit_parameters(kernel_kind("gemm"), [item], PRIORS)
    for name in ("launch_s", "bandwidth_fraction", "tensor_fraction"):
        assert found[name] == pytest.approx(truth[name], rel=0.08), name


def test_a_few_wild_rows_do_not_move_a_fit() -> None:
    rows, truth = synthetic(120, 0.01)
    wild = rows.observed_s.copy()
    wild[::20] *= 8.0
    item = (Rows(rows.key, rows.shape, wild, rows.lines), load_hardware("h100-sxm"), {})
    found = fit_parameters(kernel_kind("gemm"), [item], PRIORS)
    assert found["bandwidth_fraction"] == pytest.approx(truth["bandwidth_fraction"], rel=0.1)


def test_fits_repeat_exactly() -> None:
    rows, _ = synthetic(40, 0.05)
    item = (rows, load_hardware("h100-sxm"), {})
    first = fit_parameters(kernel_kind("gemm"), [item], PRIORS)
    assert first == fit_parameters(kernel_kind("gemm"), [item], PRIORS)


def test_halves_are_disjoint_seeded_and_even() -> None:
    mask = halves(101, 3)
    assert mask.sum() == 51
    assert np.array_equal(mask, halves(101, 3))
    assert not np.array_equal(mask, halves(101, 4))


def test_a_repeated_call_is_never_on_both_sides() -> None:
    rng = np.random.default_rng(1)
    m, again = rng.permutation(30) + 1.0, rng.permutation(90)
    key = FamilyKey("gemm", "bf16", "h100-sxm", "vllm", "linear")
    shape = {"m": np.tile(m, 3)[again], "n": np.full(90, 64.0), "k": np.full(90, 64.0)}
    rows = Rows(key, shape, rng.random(90), np.arange(90))
    for seed in range(4):
        mask = half_of_shapes(rows, seed)
        assert mask.sum() == 45
        assert not set(shape["m"][mask]) & set(shape["m"][~mask])
    # and where nothing repeats it is a half of the rows
    once = rows.where(again < 30)
    assert np.array_equal(half_of_shapes(once, 3), halves(30, 3))


def test_held_out_rows_are_predicted_without_them() -> None:
    rows, _ = synthetic(60, 0.05)
    spoiled = rows.observed_s.copy()
    spoiled[7] *= 50.0
    fitted = fit_families([Rows(rows.key, rows.shape, spoiled, rows.lines)], seeds=(0,), starts=1)
    # The prediction of the spoiled row cannot know its value: it stays near the truth.
    assert fitted[0].held_out_s[0, 7] == pytest.approx(rows.observed_s[7], rel=0.3)
    error = errors_percent(np.delete(fitted[0].held_out_s, 7, 1), np.delete(spoiled, 7))
    assert error["mape"] < 12.0


def test_intervals_hold_their_share_of_normal_deviations() -> None:
    generator = np.random.default_rng(1)
    predicted = np.exp(generator.uniform(-12, -5, (1, 400)))
    observed = predicted[0] * np.exp(generator.normal(0.0, 0.1, 400))
    (interval,) = intervals_of([predicted], [observed])
    inside, width = covered_percent(interval, predicted, observed)
    assert 80.0 < inside < 86.0
    assert np.median(width) == pytest.approx(2 * 134 * 0.1, rel=0.15)  # normal: 1.34 sigma


def test_intervals_are_narrow_where_fits_agree_and_wide_where_they_differ() -> None:
    """Deviations of 0.05 where fits differ by 0.02 and of 0.33 where by 0.30 are covered alike."""
    generator = np.random.default_rng(3)
    hard = np.arange(600) % 2 == 1
    log_time = generator.normal(0.0, 1.0, 600)
    fits, rest = np.where(hard, 0.30, 0.02), np.where(hard, 0.137, 0.046)
    observed = np.exp(log_time + rest * generator.normal(size=600))
    predicted = np.exp(log_time + fits * generator.normal(size=(6, 600)))
    (interval,) = intervals_of([predicted[:, :300]], [observed[:300]])
    others = np.arange(600) >= 300
    covered = [
        covered_percent(interval, predicted[:, others & kind], observed[others & kind])
        for kind in (hard, ~hard)
    ]
    assert all(75.0 < inside < 90.0 for inside, _ in covered), [inside for inside, _ in covered]
    assert np.median(covered[0][1]) > 4.0 * np.median(covered[1][1])


def test_small_families_of_unlike_scatter_cover_other_rows_too() -> None:
    """Intervals from 12 rows each of 40 families hold their share of rows they were not made of."""
    generator = np.random.default_rng(2)
    sigmas = np.exp(generator.uniform(-4, -1, 40))
    predicted = [np.exp(generator.uniform(-12, -5, (1, 12))) for _ in sigmas]

    def observed(p: np.ndarray, sigma: float) -> np.ndarray:
        return p[0] * np.exp(sigma * generator.normal(0.0, 1.0, p.shape[1]))

    seen = [observed(p, s) for p, s in zip(predicted, sigmas, strict=True)]
    intervals = intervals_of(predicted, seen)
    others = [np.exp(generator.uniform(-12, -5, (1, 500))) for _ in sigmas]
    covered = [
        covered_percent(i, p, observed(p, s))[0]
        for i, p, s in zip(intervals, others, sigmas, strict=True)
    ]
    assert 80.0 < np.mean(covered) < 88.0


def test_rows_whose_columns_do_not_describe_what_ran_are_left_out_by_what_they_state() -> None:
    row = {
        "num_k_heads": "16",
        "head_k_dim": "128",
        "num_v_heads": "32",
        "head_v_dim": "128",
        "seq_len": "1024",
        "batch_size": "4",
        "phase": "context",
        "hw": "a100_sxm",
        "framework": "SGLang",
        "version": "0.5.10",
        "kernel_source": "causal_conv1d_fn",
    }
    linear = next(schema for schema in SCHEMAS if schema.name == "linear_attention")
    with pytest.raises(ConfigError, match="do not depend on the number of channels"):
        linear.shape_of(row)
    for other in ({"hw": "h100_sxm"}, {"version": "0.5.14"}, {"framework": "vLLM"}):
        assert linear.shape_of(row | other)[1] == "conv_prefill"


def test_a_written_family_reads_back(tmp_path: Path) -> None:
    rows, _ = synthetic(40, 0.05)
    tables = as_tables(fit_families([rows], seeds=(0,), starts=1), "a table: t.csv")
    text = document("gemm", tables, fitted="2026-01-01", source="t.csv", n_rejected=0, n_splits=1)
    family = family_from_table("gemm", json.loads(text)["family"][0])
    assert family.n_rows == 40
    assert family.hardware == "h100-sxm"
    assert family.ranges["m"] == (rows.shape["m"].min(), rows.shape["m"].max())
    assert 0.5 < family.parameters.bandwidth_fraction < 0.9


def test_a_row_may_leave_form_factor_and_memory_to_the_profile(tmp_path: Path) -> None:
    rows = [(gpu, "vllm", "a", "bfloat16", 16, 4096, 4096, 15.0) for gpu in ("h100", "H200", "")]
    t = read_table(table(tmp_path / "t.csv", rows), profile=load_hardware("h100-pcie"))
    assert (len(t), [r.line for r in t.rejected]) == (2, [3])
    assert "'H200', which is not h100-pcie" in t.rejected[0].reason

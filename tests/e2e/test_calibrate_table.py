"""``lccost calibrate --table``: a user's own GPU and engine, from a table of his own.

Times come from the shipped model with known parameters and 3 % of seeded scatter: what is tested is
that they are found again, that the profile works everywhere, and what happens to bad rows.
"""

import csv
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from costmodel.hardware import load_hardware
from costmodel.kernels.families import load_family, shipped_families
from lccost.cli import cli

pytest.importorskip("scipy")

COLUMNS = ("hw", "framework", "kernel", "dtype", "m", "n", "k", "latency_us")
#: A card nobody sells: three quarters of an H100.
BASE = """
name = "my-card"
title = "A card of my own"
vendor = "me"
generation = "my-generation"
n_units = 100
hbm_bytes_per_s = 2.5e12
memory_bytes = 60_000_000_000
l2_bytes = 40_000_000
clock_hz = 1.7e9
[peak_flops_per_s]
bf16 = 700e12
fp16 = 700e12
fp32 = 50e12
"""


def rows(n: int = 60) -> list[tuple[object, ...]]:
    truth = next(
        f for f in shipped_families("gemm") if (f.hardware, f.engine) == ("h100-sxm", "vllm")
    )
    device = replace(
        load_hardware("h100-sxm"),
        n_units=100,
        hbm_bytes_per_s=2.5e12,
        l2_bytes=40e6,
        clock_hz=1.7e9,
        peak_flops_per_s={"bf16": 700e12, "fp16": 700e12, "fp32": 50e12},
    )
    rng = np.random.default_rng(0)
    shape = {
        "m": 2.0 ** rng.integers(0, 14, n),
        "n": 1024.0 * rng.integers(1, 28, n),
        "k": 1024.0 * rng.integers(1, 16, n),
    }
    seconds = truth.kind.time_s(truth.parameters, device, shape, "bf16", False)
    seconds = seconds * np.exp(rng.normal(0.0, 0.03, n))
    return [
        ("My Card", "Own-Engine", "own_gemm", "bfloat16", int(m), int(n), int(k), f"{s * 1e6:.4f}")
        for m, n, k, s in zip(*shape.values(), seconds, strict=True)
    ]


def write(path: Path, lines: list[tuple[object, ...]], columns: tuple[str, ...] = COLUMNS) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *lines])
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrate")
    (path / "base.toml").write_text(BASE, encoding="utf-8")
    return path


BAD = {
    ("My Card", "Own-Engine", "own_gemm", "bfloat16", 64, 4096, 4096, "nan"): "finite number",
    ("My Card", "Own-Engine", "own_gemm", "bfloat16", 64, 4096, 4096, "-5"): "above 0",
    ("My Card", "Own-Engine", "own_gemm", "bfloat16", 64, 4096, 4096, ""): "expected a number",
    # 268 GFLOP need 383 us at 700 TFLOP/s: milliseconds in a column of microseconds
    ("My Card", "Own-Engine", "own_gemm", "bfloat16", 8192, 4096, 4096, 0.45): "impossible",
    # nanoseconds
    ("My Card", "Own-Engine", "own_gemm", "bfloat16", 64, 4096, 4096, 20000): "doubtful",
    ("My Card", "Own-Engine", "own_gemm", "bfloat16", 64, 4096, 4096, 20, 1): "got more",
    ("My Card", "Own-Engine", "own\u0007", "bfloat16", 64, 4096, 4096, 20): "printable",
    ("h100-sxm", "Own-Engine", "own_gemm", "bfloat16", 64, 4096, 4096, 20): "is not my-card",
    COLUMNS: "no kernel model",
}  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> tuple[Path, Result]:
    table = write(folder / "t.csv", [*rows(), *BAD])
    out = folder / "out.toml"
    result = run(
        *("calibrate", "--table", str(table), "--gpu", str(folder / "base.toml")),
        *("--output", str(out)),
    )
    assert result.exit_code == 0, result.output
    return out, result


def test_bad_rows_are_named_with_their_line_and_left_out(calibrated: tuple[Path, Result]) -> None:
    out, result = calibrated
    lines = result.stderr.splitlines()
    for i, reason in enumerate(BAD.values()):
        mine = [line for line in lines if f"t.csv:{62 + i}:" in line]
        assert len(mine) == 1, (i, lines)
        assert reason in mine[0]
    document = tomllib.loads(out.read_text("utf-8"))
    (family,) = document["families"].values()
    assert family["n_rows"] == 60
    assert document["calibration"]["rows_left_out"] == str(len(BAD))


def test_bad_rows_are_named_where_nothing_else_is_left(folder: Path) -> None:
    table, out = write(folder / "bad.csv", list(BAD)), folder / "never.toml"
    result = run(
        *("calibrate", "--table", str(table), "--gpu", str(folder / "base.toml")),
        *("--output", str(out)),
    )
    assert result.exit_code == 2
    for i, reason in enumerate(BAD.values()):
        assert re.search(rf"bad\.csv:{2 + i}: left out: .*{reason}", result.stderr), reason
    assert not out.exists()


def test_the_parameters_are_found_again(calibrated: tuple[Path, Result]) -> None:
    out, _ = calibrated
    device = load_hardware(out)
    family = load_family("gemm", "own-engine", device, variant="bf16")
    assert family is not None
    assert (family.basis, family.kernel, family.engine) == ("calibrated", "own_gemm", "own-engine")
    assert family.held_out["mape"] < 10.0
    truth = next(
        f for f in shipped_families("gemm") if (f.hardware, f.engine) == ("h100-sxm", "vllm")
    )
    for name in ("launch_s", "bandwidth_fraction"):
        assert getattr(family.parameters, name) == pytest.approx(
            getattr(truth.parameters, name), rel=0.15
        ), name
    low, mid, high = family.time_s(device, {"m": 512.0, "n": 4096.0, "k": 4096.0})
    assert low < mid < high
    assert family.extrapolated({"m": np.array([64.0, 1e6]), "n": 4096.0}).tolist() == [0.0, 1.0]


def test_the_profile_and_its_engine_answer_predict(calibrated: tuple[Path, Result]) -> None:
    out, _ = calibrated
    point = ("--model", "llama-3.2-1b", "--context", "2k", "--format", "json")
    found = []
    for engine in ((), ("--engine", "own-engine")):
        result = run("predict", "--gpu", str(out), *point, *engine)
        assert result.exit_code == 0, result.output
        (row,) = json.loads(result.stdout)["results"]
        found.append(row)
    assert found[0] == found[1], "the only engine of a calibration is its default"
    assert (found[0]["gpu"], found[0]["engine"]) == ("my-card", "own-engine")
    base = run("predict", "--gpu", str(out.parent / "base.toml"), *point)
    (before,) = json.loads(base.stdout)["results"]
    assert before["basis"] == "prior"
    assert before["ttft_s"] != found[0]["ttft_s"]
    assert before["state_bytes"] == found[0]["state_bytes"]


def test_a_profile_replaces_a_profile_and_says_so_but_never_a_table(
    calibrated: tuple[Path, Result], tmp_path: Path
) -> None:
    _, first = calibrated
    assert "\nwrote " in first.stderr
    table = write(tmp_path / "t.csv", rows(16))
    before = table.read_text(encoding="utf-8")
    base = ("--gpu", str(calibrated[0].parent / "base.toml"))
    for command in (("calibrate", "--table", str(table), *base), ("validate", str(table), *base)):
        result = run(*command, "--output", str(table))
        assert result.exit_code == 2
        assert "would replace the input" in result.stderr
        assert table.read_text(encoding="utf-8") == before
    output = tmp_path / "mine.toml"
    output.write_text("", encoding="utf-8")
    again = run("calibrate", "--table", str(table), *base, "--output", str(output))
    assert again.exit_code == 0, again.output
    assert f"replaced {output}" in again.stderr


def test_validate_judges_with_the_profile(calibrated: tuple[Path, Result]) -> None:
    out, _ = calibrated
    table = write(out.parent / "judged.csv", rows())
    result = run("validate", str(table), "--gpu", str(out), "--format", "json")
    assert result.exit_code == 0, result.output
    overall = json.loads(result.stdout)["results"]["overall"]
    assert overall["n"] == 60
    assert overall["mape_percent"] < 6.0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("few.csv", None, "at least 12 good rows"),
        ("again.csv", None, "at most 60 of 1 shapes"),
        ("missing.csv", "hw,m,n,k\nx,1,1,1\n", "lacks: dtype, latency_us"),
        ("twice.csv", "hw,m,n,k,m,dtype,latency_us\n", "twice: m"),
        ("empty.csv", "hw,m,n,k,dtype,latency_us\n", "no rows"),
        ("binary.csv", "\x00\x01,\x00", "cannot be read|no rows|expected the columns"),
    ],
)
def test_what_is_no_table_is_a_message(
    folder: Path, name: str, text: str | None, message: str
) -> None:
    path = folder / name
    if text is None:
        write(path, {"few.csv": rows()[:8], "again.csv": rows()[:1] * 60}[name])
    else:
        path.write_text(text, encoding="utf-8")
    out = folder / "never.toml"
    result = run(
        *("calibrate", "--table", str(path), "--gpu", str(folder / "base.toml")),
        *("--output", str(out)),
    )
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert re.search(message, result.stderr), result.stderr
    assert not out.exists()


def test_of_a_family_with_very_many_rows_some_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("costmodel.calibration.profile.MOST_ROWS", 20)
    out = folder / "some.toml"
    result = run(
        *("calibrate", "--table", str(write(folder / "many.csv", rows()))),
        *("--gpu", str(folder / "base.toml"), "--output", str(out)),
    )
    assert result.exit_code == 0, result.output
    assert "40 good rows not read" in result.stderr
    (family,) = tomllib.loads(out.read_text("utf-8"))["families"].values()
    assert family["n_rows"] == 20


def test_options_of_the_other_form_are_refused(folder: Path) -> None:
    out = ("--output", str(folder / "never.toml"))
    assert run("calibrate", "--gpu", "h100-sxm", *out).exit_code == 2
    assert run("calibrate", "--table", "x.csv", "--device", "cpu", *out).exit_code == 2
    assert run("calibrate", "--table", "x.csv", "--threads", "2", *out).exit_code == 2
    anchor = ("calibrate", "--anchor", "r.jsonl", "--gpu", "h100-sxm", *out)
    for more in (("--kind", "gemm"), ("--threads", "2"), ("--quick",)):
        assert "and nothing else" in run(*anchor, *more).stderr


def test_a_profile_that_cannot_be_written_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("measure.calibrate.calibrate", lambda **_: pytest.fail("it ran"))
    for output, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "x", "does not exist")):
        result = CliRunner().invoke(cli, ["calibrate", "--quick", "--output", str(output)])
        assert result.exit_code == 2
        assert words in result.output
    assert list(tmp_path.iterdir()) == []

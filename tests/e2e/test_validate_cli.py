"""``lccost validate`` as users run it."""

import csv
import json
import lzma
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lccost.cli import cli

MEASURED = Path(__file__).parents[1] / "data" / "measured"
FIGURES = {
    "n", "mape_percent", "median_percent", "p90_percent", "bias_percent", "coverage_percent",
}  # fmt: skip
#: kind -> keys that tell its groups apart.
KINDS = {
    "gemm": {"hw", "framework", "kernel", "metric"},
    "decode_attention": {"hw", "framework", "kernel", "metric"},
    "prefill_attention": {"hw", "framework", "kernel", "metric"},
    "mla": {"hw", "framework", "kernel", "metric", "phase"},
    "linear_attention": {"hw", "framework", "kernel", "metric", "phase"},
    "sparse_attention": {"hw", "framework", "kernel", "metric"},
    "moe": {"hw", "framework", "kernel", "metric"},
    "collectives": {"hw", "framework", "kernel", "metric"},
    "serving": {"hw", "engine", "model", "metric"},
    "latency_throughput": {"hw", "engine", "model", "metric"},
    "memory": {"hw", "engine", "model", "metric"},
    "kv_methods": {"hw", "engine", "model", "metric"},
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for packed in MEASURED.glob("*.csv.xz"):
        (folder / packed.name.removesuffix(".xz")).write_bytes(lzma.decompress(packed.read_bytes()))
    for plain in MEASURED.glob("*.csv"):
        (folder / plain.name).write_bytes(plain.read_bytes())
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["validate", *map(str, arguments)])


def as_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.mark.parametrize("kind", KINDS)
def test_the_json_of_every_kind(kind: str, tables: Path) -> None:
    document = as_json(tables / f"{kind}.csv")
    assert {"schema_version", "lccost_version", "command", "inputs", "assumptions", "results"} <= (
        document.keys()
    )
    assert document["command"] == "validate"
    results = document["results"]
    assert results["kind"] == kind
    assert results["overall"].keys() >= FIGURES
    assert results["overall"]["n"] > 0
    for group in results["groups"]:
        assert group.keys() >= FIGURES | {"group", "basis"}
        assert group["group"].keys() >= KINDS[kind]
    for entry in results["unsupported"]:
        assert entry["reason"]
        assert entry["n"] > 0
    worst = results["worst"]
    errors = [abs(w["error_percent"]) for w in worst]
    assert errors == sorted(errors, reverse=True)
    for w in worst:
        error = (w["predicted"] / w["observed"] - 1.0) * 100.0
        assert w["error_percent"] == pytest.approx(error)


def test_worst_rows_name_their_line(tables: Path) -> None:
    (worst,) = as_json(tables / "gemm.csv", "--worst", 1)["results"]["worst"]
    line = (tables / "gemm.csv").read_text().splitlines()[worst["line"] - 1]
    assert worst["row"]["row_id"] in line


def test_the_text_form(tables: Path) -> None:
    result = run(tables / "serving.csv")
    assert result.exit_code == 0
    assert "MAPE %" in result.output
    assert "trtllm dense" in result.output
    assert "multi-node" in result.output


def test_the_baseline_is_worse(tables: Path) -> None:
    ours = as_json(tables / "decode_attention.csv")["results"]
    theirs = as_json(tables / "decode_attention.csv", "--baseline", "datasheet")["results"]
    assert ours["overall"]["mape_percent"] < 0.3 * theirs["overall"]["mape_percent"]
    assert theirs["baseline"] == "datasheet"
    assert theirs["overall"]["coverage_percent"] is None
    assert {g["basis"] for g in theirs["groups"]} == {"datasheet"}


def test_another_profile_replaces_the_gpu(tables: Path) -> None:
    results = as_json(tables / "moe.csv", "--gpu", "h200-sxm")["results"]
    assert {g["group"]["hw"] for g in results["groups"]} == {"h200-sxm"}


def test_errors_are_one_line_without_a_traceback(tables: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n1,2\n")
    for arguments, words in (
        ((bad,), "no known table"),
        ((tables / "gemm.csv", "--kind", "serving"), "needs the columns"),
        ((tables / "gemm.csv", "--kind", "gem"), "gemm"),
        ((tmp_path / "absent.csv",), "cannot be read"),
        ((tables / "gemm.csv", "--gpu", "h1000"), "unknown GPU"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert words in result.output
        assert "Traceback" not in result.output


def test_json_goes_to_a_file(tables: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert run(tables / "gemm.csv", "--format", "json", "--output", out).exit_code == 0
    assert json.loads(out.read_text())["results"]["kind"] == "gemm"


def test_ten_thousand_rows_take_less_than_five_seconds(tables: Path, tmp_path: Path) -> None:
    with (tables / "serving.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    generator = random.Random(0)
    big = tmp_path / "big.csv"
    with big.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for _ in range(10_000):
            row = dict(generator.choice(rows))
            row["isl"] = str(generator.randrange(64, 16_384))
            writer.writerow(row)
    start = time.perf_counter()
    result = as_json(big)["results"]
    assert time.perf_counter() - start < 5.0
    assert result["overall"]["n"] > 8_000  # some prompts are too long for what was observed


def test_the_command_starts_as_a_module(tables: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lccost", "validate", str(tables / "collectives.csv")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "all_reduce" in done.stdout
    assert not done.stderr

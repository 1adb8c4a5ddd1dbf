"""From ``lccost init`` to a plan, through the command line alone."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lccost.cli import cli

TRACE = Path(__file__).parents[1] / "data/traces/mooncake_conversation_1000.jsonl"
SMALL = [
    "--rate", "6", "--requests", "400", "--input-tokens", "3000", "--output-tokens", "80",
    "--model", "llama-3.1-8b", "--gpu", "h100-sxm,l40s", "--method", "full,kivi", "--slo",
    "ttft_p99_s=4", "--allow-unknown-accuracy", "--max-gpus", "16", "--workers", "1", "-q",
]  # fmt: skip


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def test_init_then_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    made = run("init", str(file))
    assert made.exit_code == 0
    assert "Next: lccost plan" in made.stderr
    assert run("init", str(file)).exit_code == 2
    checked = run("plan", str(file), "--validate-only")
    assert checked.exit_code == 0
    assert "16 candidates, 6,000 requests" in checked.stdout
    found = run("plan", str(file), "--set", "workload.requests=300", "--method", "full,fp8_kv",
                "--workers", "1", "-q")  # fmt: skip
    assert found.exit_code == 0, found.output
    for part in ("rank", "Binds on h100-sxm", "TTFT: arrival to first token, queue included",
                 "Check rank 1:", "vllm serve", "holds at"):  # fmt: skip
        assert part in found.stdout, part
    # The requests of the plan as a trace that a load generator replays.
    drawn = tmp_path / "requests.jsonl"
    assert run("trace", "convert", str(file), "--output", str(drawn)).exit_code == 0
    lines = drawn.read_text("utf-8").splitlines()
    assert len(lines) == 6000
    assert set(json.loads(lines[0])) == {"timestamp", "input_length", "output_length"}


@pytest.mark.parametrize(
    ("demand", "said"),
    [
        (["--trace", str(TRACE)], "1,000 requests"),
        (["--concurrency", "8", "--requests", "50"], "50 requests"),
        (["--rate", "9", "--requests", "60"], "60 requests"),
        (["--users", "90", "--set", "workload.requests_per_minute=2"], "6,000 requests"),
    ],
)
def test_a_demand_named_as_an_option_replaces_that_of_the_file(
    tmp_path: Path, demand: list[str], said: str
) -> None:
    file = tmp_path / "plan.toml"
    assert run("init", str(file)).exit_code == 0
    done = run("plan", str(file), *demand, "--validate-only")
    assert done.exit_code == 0, done.output
    assert said in done.stdout
    both = run("plan", str(file), "--rate", "3", "--concurrency", "4", "--validate-only")
    assert both.exit_code == 2
    assert "exactly one of" in both.stderr


def test_json_follows_the_contract_and_runs_again(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = run("plan", *SMALL, "--output", str(file))
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    document = json.loads(file.read_text("utf-8"))
    assert set(document) >= {
        "schema_version", "lccost_version", "command", "inputs", "assumptions", "results"
    }  # fmt: skip
    assert document["command"] == "plan"
    best = document["results"][0]
    for key in (
        "rank", "feasible", "reason", "model", "method", "method_spec", "level", "engine", "gpu",
        "tp", "replicas", "gpus", "pools", "usd_per_hour", "usd_per_million_tokens",
        "energy_j_per_token", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p95_s", "itl_p95_s",
        "itl_p99_s", "e2e_p99_s", "goodput_rps", "kv_occupancy", "headroom", "binds",
        "accuracy_drop_points", "accuracy_source", "bound_replicas", "answered_by",
    ):  # fmt: skip
        assert key in best, key
    assert best["pools"][0]["role"] == "both"
    again = run("plan", str(file), "--format", "json", "--workers", "1", "-q")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["results"] == document["results"]
    fewer = run("plan", str(file), "--set", "candidates.methods=['full']", "--format", "json",
                "--workers", "1", "-q", "--no-details")  # fmt: skip
    assert {r["method"] for r in json.loads(fewer.stdout)["results"]} == {"full"}


def test_csv_and_markdown() -> None:
    table = run("plan", *SMALL, "--format", "csv", "--no-details")
    rows = list(csv.DictReader(io.StringIO(table.stdout)))
    assert [r["rank"] for r in rows][:1] == ["1"]
    assert len(rows) == 4
    text = run("plan", *SMALL, "--format", "md", "--no-details")
    assert re.search(r"^\|\s*rank\s*\|\s*method", text.stdout, re.M)


def test_page_and_workbook(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the report extra")
    for name, start in (("plan.html", b"<!doctype html>"), ("plan.xlsx", b"PK")):
        file = tmp_path / name
        done = run("plan", *SMALL, "--output", str(file))
        assert done.exit_code == 0, done.output
        assert file.read_bytes().startswith(start)
        assert "rank" in done.stdout


def test_a_concurrency_is_planned() -> None:
    done = run(
        "plan", "--concurrency", "32", "--requests", "300", "--input-tokens", "2000",
        "--output-tokens", "100", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--slo",
        "tpot_p95_ms=40", "--workers", "1", "-q", "--format", "json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["results"][0]["feasible"]
    assert document["results"][0]["max_rate_per_s"] is None
    assert document["curve"][0]["rate_per_s"] == 8  # a quarter of the sessions


def test_nothing_feasible_is_exit_code_3() -> None:
    done = run("plan", *SMALL, "--slo", "ttft_p99_s=0.01", "--format", "json")
    assert done.exit_code == 3
    assert "No plan meets the objectives" in done.stderr
    assert "the prompt of 3,000 tokens alone takes" in done.stderr
    rows = json.loads(done.stdout)["results"]
    assert rows
    assert not any(r["feasible"] for r in rows)


def test_a_trace_and_its_statistics(tmp_path: Path) -> None:
    stats = run("trace", "stats", str(TRACE), "--format", "json")
    row = json.loads(stats.stdout)["results"][0]
    assert row["requests"] == 1000
    assert row["input_tokens_max"] > 100_000
    assert "requests" in run("trace", "stats", str(TRACE)).stdout
    copy = tmp_path / "copy.csv"
    assert run("trace", "convert", str(TRACE), "--output", str(copy)).exit_code == 0
    again = json.loads(run("trace", "stats", str(copy), "--format", "json").stdout)["results"][0]
    same = ("requests", "input_tokens_mean", "output_tokens_max", "prefix_share")
    assert {k: again[k] for k in same} == {k: row[k] for k in same}
    done = run(
        "plan", "--trace", str(TRACE), "--prefix-cache", "ideal", "--model", "llama-3.1-8b",
        "--gpu", "h200-sxm", "--slo", "ttft_p99_s=30", "--slo", "itl_p95_ms=300",
        "--workers", "1", "-q", "--no-details",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "prefix cache ideal" in done.stdout
    assert "aiperf profile" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "none.toml"], "Make one: lccost init"),
        (["plan", "--slo", "ttft=3"], "not a key of this form"),
        (["plan", "--set", "x=3"], "expected SECTION.KEY=VALUE"),
        (["plan", *SMALL, "--tp", "two"], "whole numbers"),
        (["plan", *SMALL, "--executor", "slurm"], "executor: expected local"),
        (["plan", *SMALL, "--format", "json", "--output", "x.csv"], "do not agree"),
        (["plan", *SMALL, "--output", "x.pdf"], "ends in .json, .csv, .md, .txt, .html, .xlsx"),
        (["plan", *SMALL, "--output", "nowhere/x.json"], "no such folder"),
        (["trace", "stats", "none.jsonl"], "no such trace file"),
    ],
)
def test_bad_input_is_exit_code_2(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_a_bad_line_writes_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "bad.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,10,5\nx,10,5\n", encoding="utf-8")
    out = tmp_path / "plan.json"
    done = run("plan", "--trace", str(trace), "--model", "llama-3.1-8b", "--gpu", "h100-sxm",
               "--slo", "ttft_p99_s=3", "--output", str(out))  # fmt: skip
    assert done.exit_code == 2
    assert f"{trace}:3: arrival_s: expected a number, got 'x'" in done.stderr
    assert not out.exists()


def test_local_processes_agree_with_this_one() -> None:
    one = run("plan", *SMALL, "--format", "json", "--no-details")
    two = run("plan", *SMALL, "--format", "json", "--no-details", "--workers", "2")
    assert json.loads(one.stdout)["results"] == json.loads(two.stdout)["results"]

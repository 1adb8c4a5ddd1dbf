"""``lccost compare`` and ``lccost report`` as a user meets them."""

import csv
import io
import json
import os
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lccost.cli import cli

RECORDS = Path(__file__).parents[1] / "data" / "records_synthetic_cpu.jsonl"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two records of one method; predictions are 10 % and 30 % above what was observed."""
    base = json.loads(RECORDS.read_text("utf-8").splitlines()[0])
    lines = []
    for context, factor in ((1024, 1.1), (2048, 1.3)):
        known = base["predicted"].items()
        predicted = {k: v for k, v in known if not k.startswith(("ttft", "peak"))}
        predicted |= {"context_tokens": context, "tpot_s": 0.5 * factor}
        row = {k: v for k, v in base.items() if not k.startswith(("ttft", "peak"))}
        row |= {"context_tokens": context, "tpot_s": 0.5, "predicted": predicted}
        lines.append(json.dumps(row))
    path = tmp_path / "two.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_compare_prints_the_error_of_a_group(two: Path) -> None:
    result = run("compare", two, "--format", "json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (group,) = [g for g in document["results"] if g["metric"] == "tpot_s"]
    assert group["n"] == 2
    assert group["mape_percent"] == pytest.approx(20.0)
    assert group["worst_percent"] == pytest.approx(30.0)
    assert document["unjoined"] == []


def test_tables_leave_exact_metrics_out_and_csv_has_them(two: Path) -> None:
    table = run("compare", two).stdout
    assert "Exact in every record:" in table
    assert "exact  " not in table
    listed = list(csv.DictReader(io.StringIO(run("compare", two, "--format", "csv").stdout)))
    exact = {r["metric"] for r in listed if float(r["worst_percent"]) == 0.0}
    assert "state_bytes" in exact
    assert "tpot_s" not in exact


@pytest.mark.parametrize(
    ("tolerance", "by", "code"),
    [
        ("21%", "method", 0),  # the mean of 10 % and 30 % is inside
        ("0.21", "method", 0),
        ("19%", "method", 5),
        ("21%", "method,context", 5),  # one group of 30 %
        ("31%", "method,context", 0),
    ],
)
def test_the_tolerance_is_the_mean_error_of_a_group(
    two: Path, tolerance: str, by: str, code: int
) -> None:
    result = run("compare", two, "--max-error", tolerance, "--by", by)
    assert result.exit_code == code, result.output
    assert ("are outside" in result.output) == (code == 5)


def test_nothing_joined_is_not_inside_a_tolerance(tmp_path: Path) -> None:
    row = json.loads(RECORDS.read_text("utf-8").splitlines()[0])
    lonely = tmp_path / "lonely.jsonl"
    del row["predicted"]
    lonely.write_text(json.dumps(row | {"model": "?"}))
    assert run("compare", lonely).exit_code == 0
    result = run("compare", lonely, "--max-error", "50%")
    assert result.exit_code == 5
    assert "nothing was joined" in result.output


@pytest.mark.parametrize("wrong", ["-1%", "0", "many", "nan"])
def test_impossible_tolerances_are_refused(two: Path, wrong: str) -> None:
    assert run("compare", two, "--max-error", wrong).exit_code == 2


def test_every_ending_is_written_and_nothing_else(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    # the page itself is written by the examples below
    starts = {".md": b"# ", ".pdf": b"%PDF-", ".csv": b"rank", ".xlsx": b"PK", ".json": b"{"}
    for ending, start in starts.items():
        result = run("report", two, "--output", out / f"r{ending}", "--title", "A title")
        assert result.exit_code == 0, result.output
        assert (out / f"r{ending}").read_bytes().startswith(start), ending
    assert {p.suffix for p in out.iterdir()} == set(starts)


def test_a_full_disk_leaves_the_old_report(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "r.md"
    target.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run("report", two, "--output", target)
    assert result.exit_code == 2
    assert "No space left" in result.output
    assert target.read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none.jsonl", "--output", "r.md"), "none.jsonl"),
        ((str(RECORDS), "--output", "r.doc"), "expected an ending of .html"),
        ((str(RECORDS), "--output", "r"), "got 'none'"),
        ((str(RECORDS), "--output", "no/such/r.md"), "does not exist"),
        ((str(RECORDS), "--output", "r.md", "--gpu", "no-such-gpu"), "no-such-gpu"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("report", *arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output
    assert not any(tmp_path.iterdir())


def test_an_empty_file_makes_a_report_that_says_so(tmp_path: Path) -> None:
    empty, target = tmp_path / "empty.jsonl", tmp_path / "r.md"
    empty.write_text("")
    assert run("report", empty, "--output", target).exit_code == 0
    assert "nothing to report" in target.read_text("utf-8")


def _examples(command: str) -> list[str]:
    text = run(command, "--help").stdout.partition("Examples:")[2]
    return [line.strip() for line in re.findall(r"^ +lccost .*$", text, re.M)]


@pytest.mark.parametrize("command", ["compare", "report"])
def test_examples_of_the_help_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs.jsonl").write_bytes(RECORDS.read_bytes())
    h100 = Path(__file__).parents[2] / "hardware_profiles" / "h100-sxm.toml"
    Path("my-machine.toml").write_bytes(h100.read_bytes())
    examples = _examples(command)
    assert len(examples) == 3
    for line in examples:
        # What the fixture holds may be outside a tolerance; everything else runs.
        result = run(*shlex.split(line)[1:])
        assert result.exit_code in ((0, 5) if "--max-error" in line else (0,)), result.output
    if command == "report":
        assert Path("report.html").stat().st_size > 100_000


def test_compare_says_what_reading_left_out(tmp_path: Path) -> None:
    torn, empty = tmp_path / "torn.jsonl", tmp_path / "empty.jsonl"
    torn.write_text('{"model": "llama-3-8b", "status": "failed", "method": "full"}\n{"mod')
    empty.write_text("")
    result = run("compare", str(torn), str(empty))
    assert f"{torn}:2: the last line is incomplete; left out" in result.output
    assert f"{empty}: the file is empty" in result.output


@pytest.mark.parametrize(
    ("text", "arguments", "code", "words"),
    [
        ("[]", (), 2, "the list is empty"),
        ("", (), 2, "the file is empty"),
        (None, ("--by", ""), 2, "at least one"),
        (None, ("--max-error", "900%"), 5, "tpot_s of"),
    ],
)
def test_nothing_passes_for_a_good_answer(
    two: Path, tmp_path: Path, text: str | None, arguments: tuple[str, ...], code: int, words: str
) -> None:
    if text is not None:
        two = tmp_path / "other.json"
        two.write_text(text)
    elif "--max-error" in arguments:
        rows = [json.loads(line) for line in two.read_text("utf-8").splitlines()]
        rows[0]["tpot_s"] = float("nan")
        two.write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    result = run("compare", two, *arguments)
    assert result.exit_code == code, result.output
    assert words in result.output


def test_a_roofline_is_of_one_device(two: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in two.read_text("utf-8").splitlines()]
    for row, gpu in zip(rows, ("h100-sxm", "l40s"), strict=True):
        row["gpu"] = row["predicted"]["gpu"] = gpu
    two.write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    result = run("compare", two, "--plot", tmp_path / "r.png")
    assert result.exit_code == 2
    assert "h100-sxm, l40s" in result.output
    assert not (tmp_path / "r.png").exists()


@pytest.mark.parametrize("command", ["compare", "report", "trace stats", "trace convert"])
def test_records_are_never_replaced_by_what_is_made_of_them(two: Path, command: str) -> None:
    before = two.read_bytes()
    for output in (two, two.parent / "." / two.name):
        result = run(*command.split(), two, "--output", output)
        assert result.exit_code == 2
        assert "would replace the input" in result.stderr
    assert two.read_bytes() == before

"""Reading result files: tolerant of what sweeps leave behind, strict about everything else."""

import json

import pytest

from costmodel.errors import ConfigError
from reports.labels import safe_text, tokens
from reports.records import parse_records, read_records, rows_of

RECORD = {"model": "m", "method": "full", "batch": 1, "context_tokens": 512, "status": "ok"}


def line(**changes):
    return json.dumps({**RECORD, **changes})


def test_lines_keep_their_place(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(line() + "\n\n" + line(status="oom") + "\n")
    records = read_records([path])
    assert [r.origin for r in records.measurements] == [f"{path}:1", f"{path}:3"]
    assert [r.status for r in records.measurements] == ["ok", "oom"]


def test_a_document_of_predictions_is_not_a_measurement():
    document = {"command": "predict", "results": [{"model": "m", "method": "full", "ttft_s": 1.5}]}
    for text in (json.dumps(document), json.dumps(document, indent=2)):
        records = parse_records(text, "p.json")
        assert not records.measurements
        assert records.predictions[0].number("ttft_s") == 1.5
        assert records.headers[0].text("command") == "predict"


def test_validations_are_kept_whole():
    records = parse_records('{"kind": "memory", "overall": {"n": 3}, "groups": []}')
    assert records.validations[0].text("kind") == "memory"


def test_unknown_numbers_are_none():
    record = parse_records('{"status": "ok", "ttft_s": NaN, "tpot_s": Infinity, "x_s": null}')
    row = record.measurements[0]
    assert [row.number(k) for k in ("ttft_s", "tpot_s", "x_s", "absent")] == [None] * 4


def test_a_torn_last_line_is_noted_not_fatal():
    records = parse_records(line() + "\n" + line()[:20], "runs.jsonl")
    assert len(records.measurements) == 1
    assert records.notes == ("runs.jsonl:2: the last line is incomplete; left out",)


def test_an_empty_list_is_noted():
    assert parse_records("[]", "e.json").notes == ("e.json:1: the list is empty",)


def test_an_unknown_basis_is_refused():
    row = '{"model": "m", "method": "full", "basis": "guessed"}'
    with pytest.raises(ConfigError, match=r"r\.jsonl:1: basis: expected one of measured"):
        parse_records(row, "r.jsonl")


def test_what_is_no_number_is_remembered_and_said():
    text = '{"model": "m", "status": "ok", "tpot_s": NaN, "samples": {"x": [NaN, 1]}, '
    text += '"predicted": {"ttft_s": Infinity}}'
    records = parse_records(text, "r.jsonl")
    (row,) = records.measurements
    assert row.not_numbers == {"tpot_s", "predicted.ttft_s"}
    assert row.values["tpot_s"] is None
    assert row.values["samples"] == {"x": [None, 1]}
    assert "predicted.ttft_s, tpot_s: no number" in records.notes[0]


def test_an_empty_file_is_noted():
    records = parse_records("\n \n", "e.jsonl")
    assert records.measurements == ()
    assert records.notes == ("e.jsonl: the file is empty",)


def test_level_follows_from_the_realisation():
    row = parse_records(line(realisation="best")).measurements[0]
    assert row.text("level") == "ideal"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (line() + "\n{broken}\n" + line(), r"f:2: expected JSON"),
        (line() + "\n[1]\n", r"f:2\[1\]: expected a record \(a JSON object\), got int"),
        ("hello", "f:1: expected JSON"),
        ("3", "f:1: expected a record"),
        (line(ttft_s="fast"), "f:1: ttft_s: expected a number or null, got 'fast'"),
        (line(ttft_s=True), "f:1: ttft_s: expected a number or null, got True"),
        (line(batch=0), "f:1: batch: expected a number above 0, got 0"),
        (line(ttft_s=-1.0), "f:1: ttft_s: expected a number of 0 or more, got -1.0"),
        (line(model=["m"]), r"f:1: model: expected text, got \['m'\]"),
        (line(predicted=[]), r"f:1: predicted: expected an object, got \[\]"),
        (line(predicted={"tpot_s": "1"}), "f:1: predicted.tpot_s: expected a number or null"),
        ('{"a": 1}', "f:1: neither a measurement, a prediction nor a validation"),
        ('{"results": 4}', "f:1: results: expected a list"),
        ('{"status": ' + "[" * 100_000, "f:1: expected JSON, got nested too deep"),
        ('{"status": "ok", "ttft_s": ' + "9" * 5000 + "}", "f:1: expected JSON"),
    ],
)
def test_hostile_input_names_file_and_line(text, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_records(text, "f")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.jsonl: cannot be read \(No such file"):
        read_records([tmp_path / "absent.jsonl"])
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="expected UTF-8"):
        read_records([binary])


def test_rows_in_memory_are_checked_too():
    assert rows_of([RECORD], "predict")[0].origin == "predict:1"
    with pytest.raises(ConfigError, match="predict:1: tpot_s"):
        rows_of([{**RECORD, "tpot_s": "x"}], "predict")


def test_text_for_terminals_is_harmless():
    assert safe_text("a\x1b[31mb\u202ec\n") == "a\ufffd[31mb\ufffdc\ufffd"
    assert safe_text("x" * 100, 11) == "xxxxx…xxxxx"
    assert safe_text("short", 11) == "short"


@pytest.mark.parametrize(
    ("value", "shown"), [(131072, "128k"), (2**20, "1M"), (10000, "10,000"), (512, "512")]
)
def test_token_counts(value, shown):
    assert tokens(value) == shown

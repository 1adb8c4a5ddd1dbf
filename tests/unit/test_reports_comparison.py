"""Joins and error figures, worked by hand."""

import io
import json
import math

import pytest

from costmodel.errors import ConfigError, UnknownNameError
from reports.comparison import compare, error_groups, metric_errors, parse_fields
from reports.records import Records, parse_records, read_records
from reports.tables import error_table, point_table, render, rich_table, unjoined_table

KEY = {
    "model": "m",
    "method": "kivi",
    "method_spec": "kivi:bits=2",
    "method_parameters": {"bits": 2},
    "level": "reference",
    "engine": "torch",
    "gpu": "g",
    "dtype": "bf16",
    "batch": 1,
    "context_tokens": 1024,
    "output_tokens": 16,
}


def measurement(predicted=None, **changes):
    own = {} if predicted is None else {"predicted": predicted}
    return {**KEY, "status": "ok", **changes, **own}


def read(*rows):
    return parse_records("\n".join(json.dumps(r) for r in rows), "r.jsonl")


def test_error_is_predicted_minus_observed_over_observed():
    comparison = compare(
        read(
            measurement({"ttft_s": 3.0, "tpot_s": 0.01, "basis": "prior"}, ttft_s=2.0, tpot_s=0.02)
        )
    )
    assert {e.metric: e.error for e in comparison.errors} == {"ttft_s": 0.5, "tpot_s": -0.5}


def test_group_statistics_by_hand():
    # Observed 1 s; predictions 1.1, 0.8, 1.3 and 1.0 s: errors +10, -20, +30 and 0 percent.
    rows = [
        measurement({"ttft_s": p, "basis": "prior"}, ttft_s=1.0, context_tokens=1024 * n)
        for n, p in enumerate((1.1, 0.8, 1.3, 1.0), start=1)
    ]
    (group,) = error_groups(compare(read(*rows)), "method")
    assert group.group == {"method": "kivi"}
    assert (group.n, group.metric, group.basis) == (4, "ttft_s", "prior")
    assert group.mape_percent == pytest.approx(15.0)
    assert group.median_percent == pytest.approx(15.0)  # between 10 and 20
    assert group.p90_percent == pytest.approx(27.0)  # 0.7 of the way from 20 to 30
    assert group.bias_percent == pytest.approx(5.0)  # between 0 and +10
    assert group.worst_percent == pytest.approx(30.0)
    assert "context 3k" in group.worst_point
    assert group.worst_origin == "r.jsonl:3"


def test_bases_are_never_mixed():
    rows = [
        measurement({"ttft_s": 2.0, "basis": basis}, ttft_s=1.0, context_tokens=context)
        for context, basis in ((1024, "prior"), (2048, "calibrated"))
    ]
    table = error_table(compare(read(*rows)), "method")
    assert [d["basis"] for d in table.dicts()] == ["prior", "calibrated"]
    assert [d["n"] for d in table.dicts()] == [1, 1]
    assert any("calibrated, prior" in note for note in table.notes)


def test_a_file_prediction_of_another_basis_stands_beside_the_records_own():
    record = measurement({"ttft_s": 2.0, "basis": "calibrated"}, ttft_s=1.0)
    given = {**KEY, "ttft_s": 4.0, "basis": "datasheet"}
    comparison = compare(read(record, given))
    assert {e.pair.basis: e.error for e in comparison.errors} == {
        "calibrated": 1.0,
        "datasheet": 3.0,
    }
    same_basis = {**given, "basis": "calibrated"}
    replaced = compare(read(record, same_basis))
    assert [e.error for e in replaced.errors] == [3.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"engine": "vllm"}, "engine (torch, not vllm)"),
        ({"method_parameters": {"bits": 4}}, 'method_parameters ({"bits": 2}, not {"bits": 4})'),
        ({"context_tokens": 2048}, "context_tokens (1024, not 2048)"),
        ({"model": "other"}, "no prediction of this model and method"),
    ],
)
def test_unjoined_records_say_why(change, reason):
    given = {**KEY, "ttft_s": 4.0, "basis": "prior"}
    comparison = compare(read({**measurement(ttft_s=1.0), **change}, given))
    assert comparison.errors == ()
    assert reason in comparison.unjoined[0].reason


def test_case_and_absent_fields_do_not_keep_rows_apart():
    given = {k: v for k, v in KEY.items() if k not in ("engine", "gpu")}
    comparison = compare(read(measurement(ttft_s=1.0, model="M"), {**given, "ttft_s": 2.0}))
    assert [e.error for e in comparison.errors] == [1.0]


def test_predictions_are_computed_where_there_are_none():
    seen = []

    def predict(record):
        seen.append(record["context_tokens"])
        return {"ttft_s": 3.0, "basis": "datasheet"}

    comparison = compare(read(measurement(ttft_s=1.0)), predict)
    assert seen == [1024]
    assert comparison.errors[0].error == 2.0


def test_failed_and_refused_rows_take_no_part():
    comparison = compare(
        read(
            measurement({"ttft_s": 1.0}, status="oom", message="out of memory", ttft_s=None),
            measurement({"applicable": False, "reason": "no KV cache"}, ttft_s=1.0),
            measurement(ttft_s=1.0),
            measurement({"basis": "prior"}, ttft_s=1.0),
        )
    )
    assert comparison.errors == ()
    assert [u.reason for u in comparison.unjoined] == [
        "status oom: out of memory",
        "predicted as not applicable: no KV cache",
        "the record carries no prediction, and no predictions were given",
        "prediction and record share no known metric",
    ]


def test_zero_observed():
    both = compare(read(measurement({"state_host_bytes": 0}, state_host_bytes=0)))
    assert both.errors == ()
    promised = compare(read(measurement({"state_host_bytes": 8}, state_host_bytes=0, ttft_s=1)))
    assert promised.errors[0].error == math.inf
    assert error_table(promised).dicts()[0]["mape_percent"] is None


def test_past_tolerance_lists_the_worst_first():
    rows = [
        measurement({"ttft_s": p, "basis": "prior"}, ttft_s=1.0, context_tokens=1024 * n)
        for n, p in enumerate((1.1, 0.8, 1.3), start=1)
    ]
    comparison = compare(read(*rows))
    past = comparison.past_tolerance(0.15)
    assert [round(e.error, 6) for e in past] == [0.3, -0.2]
    assert comparison.past_tolerance(0.31) == ()


def test_fields_to_group_by():
    assert parse_fields("method, context") == ("method", "context_tokens")
    assert parse_fields("context,method,context_tokens") == ("context_tokens", "method")
    with pytest.raises(UnknownNameError, match=r"unknown field to group by 'metod'.*method"):
        parse_fields("metod")


def test_nothing_to_compare():
    comparison = compare(Records())
    assert error_table(comparison).texts == ()
    assert render(error_table(comparison), "json") == "[]\n"


def test_hostile_names_stay_in_their_cell():
    name = "=cmd|' /C calc'!A0|<script>\x1b[2J"
    record = measurement({"ttft_s": 2.0, "basis": "prior"}, ttft_s=1.0, model=name, method=name)
    record["method_spec"] = name
    comparison = compare(read(record))
    table = error_table(comparison, "model,method")
    csv_text = render(point_table(comparison), "csv")
    assert "\n'=cmd" in csv_text
    markdown = render(table, "md")
    assert "<script>" not in markdown.replace("\\<", "")
    rows = [r for r in markdown.splitlines() if r.startswith("|")]
    # Escaped bars aside, every row has as many cells as the heading.
    assert len({r.replace("\\|", "").count("|") for r in rows}) == 1
    assert "\x1b" not in markdown + render(table, "table")


def test_terminal_table_keeps_square_brackets():
    from rich.console import Console

    record = measurement({"ttft_s": 2.0, "basis": "prior"}, ttft_s=1.0, method="[red]kivi")
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(rich_table(error_table(compare(read(record)))))
    assert "[red]kivi" in console.export_text()


def test_runs_that_anchored_a_prediction_are_not_judged_by_it():
    own = {"ttft_s": 1.0, "basis": "anchored", "anchored_by": ["a" * 16]}
    comparison = compare(
        read(
            measurement(own, ttft_s=1.0, record_key="a" * 16),
            measurement(own, ttft_s=2.0, record_key="b" * 16, context_tokens=2048),
        )
    )
    assert [e.error for e in comparison.errors] == [-0.5]
    assert len(comparison.pairs) == 2  # still drawn
    (left_out,) = comparison.unjoined
    assert left_out.origin == "r.jsonl:1"
    assert "anchored by this very point" in left_out.reason


def test_fields_to_group_by_must_be_some():
    with pytest.raises(ConfigError, match="at least one"):
        parse_fields("")
    with pytest.raises(ConfigError, match="at least one"):
        parse_fields(" , ")
    assert parse_fields(()) == ()


def test_unjoined_table_has_the_reason():
    comparison = compare(read(measurement(status="timeout")))
    assert unjoined_table(comparison).dicts()[0]["reason"] == "status timeout"


def test_five_thousand_records_are_quick():
    rows = [
        measurement({"ttft_s": 1.0, "basis": "prior"}, ttft_s=1.0, context_tokens=n + 1)
        for n in range(5000)
    ]
    comparison = compare(read(*rows))
    assert len(comparison.errors) == 5000
    assert metric_errors(comparison.pairs[0])[0].error == 0.0


def test_a_record_that_cannot_be_predicted_says_why():
    def predict(record):
        raise ConfigError("unknown model")

    comparison = compare(read(measurement(ttft_s=1.0)), predict)
    assert comparison.unjoined[0].reason == "no prediction could be computed: unknown model"


def test_a_time_that_records_lack_is_said():
    predicted = {"ttft_s": 1.0, "tpot_s": 0.01, "basis": "prior"}
    rows = [measurement(predicted, ttft_s=1.0, tpot_s=0.01), measurement(predicted, tpot_s=0.01)]
    rows[1]["context_tokens"] = 2048
    assert "ttft_s is unknown in 1 of 2 records compared" in compare(read(*rows)).notes
    assert not any("tpot_s" in note for note in compare(read(*rows)).notes)


def test_a_file_given_twice_is_read_once(tmp_path):
    path = tmp_path / "r.jsonl"
    row = measurement({"ttft_s": 1.0, "basis": "prior"}, ttft_s=1.0)
    path.write_text(json.dumps(row) + "\n", "utf-8")
    records = read_records([path, str(path)])
    assert len(records.measurements) == 1
    assert f"{path}: given twice; read once" in records.notes

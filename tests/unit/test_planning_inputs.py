"""Traces, lengths, arrivals and the plan file: what they read, and what they refuse."""

import re
from pathlib import Path

import numpy as np
import pytest

from costmodel.errors import ConfigError
from costmodel.planning.arrivals import read_arrivals, read_prefix_cache
from costmodel.planning.lengths import read_lengths
from costmodel.planning.requests import Requests
from costmodel.planning.spec import parse_override, plan_from_table, read_plan
from costmodel.planning.traces import as_csv, as_mooncake, read_trace

DATA = Path(__file__).parents[1] / "data/traces"
EXAMPLE = Path(__file__).parents[2] / "examples/plan.toml"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# Traces --------------------------------------------------------------------------------------


def test_mooncake_times_lengths_and_shared_blocks(tmp_path: Path) -> None:
    lines = [
        '{"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}',
        '{"timestamp": 2500, "input_length": 1600, "output_length": 7, "hash_ids": [0, 1, 9, 3]}',
        '{"timestamp": 2500, "input_length": 900, "output_length": 1, "hash_ids": [0, 1]}',
    ]
    trace = read_trace(write(tmp_path, "t.jsonl", "\n".join(lines) + "\n"))
    assert trace.arrival_s.tolist() == [0.0, 1.5, 1.5]
    assert trace.input_tokens.tolist() == [1100, 1600, 900]
    # The second shares two blocks of 512; the third is shorter than its two blocks: all but one.
    assert trace.prefix_tokens.tolist() == [0, 1024, 899]


def test_azure_fractions_of_a_second() -> None:
    trace = read_trace(DATA / "azure2023_code_1000.csv")
    # 18:17:03.9799600 and 18:17:04.0319600
    assert trace.arrival_s[1] == pytest.approx(0.052, abs=1e-6)
    assert (trace.input_tokens[0], trace.output_tokens[0]) == (4808, 10)
    assert trace.size == 1000


def test_burstgpt_leaves_failures_out(tmp_path: Path) -> None:
    text = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "45,ChatGPT,0,0,0,Conversation log\n"
        "118,GPT-4,417,276,693,API log\n"
    )
    trace = read_trace(write(tmp_path, "b.csv", text))
    assert trace.arrival_s.tolist() == [0.0, 113.0]
    assert "1 requests without an answer left out" in trace.notes


def test_own_csv_with_prefixes(tmp_path: Path) -> None:
    text = "arrival_s,input_tokens,output_tokens,prefix_tokens\n0.5,100,10,100\n0.75,50,1,0\n"
    trace = read_trace(write(tmp_path, "own.csv", text))
    assert trace.arrival_s.tolist() == [0.0, 0.25]
    assert trace.prefix_tokens.tolist() == [99, 0]  # one token is always computed


GOOD = '{"timestamp": 0, "input_length": 5, "output_length": 2}\n'
OWN = "arrival_s,input_tokens,output_tokens\n"
BAD = [
    ("x.jsonl", GOOD + '{"timestamp": 1,\n', ":2:"),
    ("x.jsonl", '{"timestamp": 0, "input_length": "a", "output_length": 2}\n', "input_length"),
    ("x.jsonl", '{"timestamp": -5, "input_length": 5, "output_length": 2}\n', "at least 0"),
    ("x.csv", OWN + "0,5,2\n-1,5,2\n", ":3: expected a time of at least 0"),
    ("x.csv", OWN + "3,5,2\n1,5,2\n", ":3: arrives at 1 s, before the request above it"),
    ("x.csv", OWN + "0,5\n", ":2: expected 3 fields, got 2"),
    ("x.csv", OWN + "0,5.5,2\n", "whole number"),
    ("x.csv", OWN + "0,0,2\n", "expected 1 to"),
    ("x.csv", OWN + "nan,5,2\n", "finite"),
    ("x.csv", OWN + "0,5,1e300\n", "expected 1 to"),
    ("x.csv", OWN + "0,5,2\0\n", "not text"),
    ("x.csv", OWN, "at least one request"),
    ("x.csv", "", "expected a Mooncake jsonl line"),
    ("x.csv", "a,b,c\n1,2,3\n", "expected a Mooncake jsonl line"),
    ("x.json", "[[100, 0.5], [200, 1.0]]", "length distribution"),
    ("x.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,5,2\n", "date and time"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_traces_say_where_and_why(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_trace(write(tmp_path, name, text))
    assert message in str(error.value)
    assert name in str(error.value)


def test_written_traces_read_back(tmp_path: Path) -> None:
    own = OWN.strip() + ",prefix_tokens\n0,700,3,0\n1.5,1200,2,1024\n1.5,2000,9,512\n"
    first = read_trace(write(tmp_path, "own.csv", own))
    again = {}
    for name, lines in (("a.csv", as_csv(first)), ("a.jsonl", as_mooncake(first))):
        again[name] = read_trace(write(tmp_path, name, "\n".join(lines)))
    for name, read in again.items():
        assert read.arrival_s.tolist() == [0.0, 1.5, 1.5], name
        assert read.input_tokens.tolist() == first.input_tokens.tolist(), name
        assert read.output_tokens.tolist() == first.output_tokens.tolist(), name
    assert again["a.csv"].prefix_tokens.tolist() == [0, 1024, 512]
    # Shared blocks are found once somebody has named them: by the second request.
    assert again["a.jsonl"].prefix_tokens.tolist() == [0, 0, 512]
    assert len(list(as_mooncake(first, 2))) == 2


def test_statistics_by_hand() -> None:
    stream = Requests(
        name="x", arrival_s=np.array([0.0, 1.0, 3.0]), input_tokens=np.array([10.0, 20.0, 30.0]),
        output_tokens=np.array([1.0, 2.0, 3.0]), prefix_tokens=np.array([0.0, 6.0, 0.0]),
    )  # fmt: skip
    stats = stream.stats()
    assert stats["rate_per_s"] == pytest.approx(2 / 3)
    assert stats["arrival_cv"] == pytest.approx(0.5 / 1.5)
    assert stats["prefix_share"] == pytest.approx(0.1)
    assert stats["input_tokens_mean"] == 20
    assert stream.faster(2.0).arrival_s.tolist() == [0.0, 0.5, 1.5]
    assert stream.with_outputs(1.5).output_tokens.tolist() == [2, 3, 5]


# Lengths and arrivals ------------------------------------------------------------------------


def sample(value: object, n: int = 40_000) -> np.ndarray:
    return read_lengths(value, "input_tokens", Path()).sample(n, np.random.default_rng(1))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[512, 0.5], [100, 1.0]], "row 2: .* tokens fall from 512 to 100"),
        ([[1, 0.9], [2, 0.5], [3, 1.0]], "row 2: .* probabilities fall from 0.9 to 0.5"),
        ([[0, 0.5], [3, 1.0]], "row 1: .* at least 1 token"),
        ([[1, 0.5], [3, 0.9]], "last row says 0.9"),
        (10**12, "from 1 to 1,073,741,824, got"),
    ],
)
def test_bad_lengths_name_the_row_and_the_range(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_lengths(value, "input_tokens", Path())


def test_cdf_quantiles() -> None:
    drawn = sample([[100, 0.25], [200, 0.75], [400, 1.0]])
    assert np.percentile(drawn, [25, 50, 75, 100]) == pytest.approx([100, 150, 200, 400], abs=3)
    assert drawn.min() == 100


def test_lognormal_has_its_mean_and_p99() -> None:
    drawn = sample({"distribution": "lognormal", "mean": 6000, "p99": 40000}, 400_000)
    assert drawn.mean() == pytest.approx(6000, rel=0.02)
    assert np.percentile(drawn, 99) == pytest.approx(40000, rel=0.03)


def test_pareto_is_truncated() -> None:
    # Of a Pareto with alpha 1 from 100, cut at 400: median where (1 - 100/x) = 0.375, x = 160.
    drawn = sample({"distribution": "pareto", "minimum": 100, "alpha": 1.0, "maximum": 400})
    assert np.median(drawn) == pytest.approx(160, rel=0.02)
    assert drawn.max() <= 400


@pytest.mark.parametrize(
    "value",
    [0, 1.5, True, "no-such-file.json", [], [[5, 0.5]], [[5, 0.9], [3, 1.0]], [[5]],
     {"distribution": "normal"}, {"distribution": "lognormal", "mean": 100},
     {"distribution": "exponential", "mean": 100, "meen": 3},
     {"distribution": "lognormal", "mean": 100, "p99": 10_000}],
)  # fmt: skip
def test_bad_lengths_are_refused(value: object) -> None:
    with pytest.raises(ConfigError):
        read_lengths(value, "input_tokens", Path())


def test_gamma_arrivals_have_their_cv_and_rate() -> None:
    times = read_arrivals("gamma:3").times(200_000, 5.0, np.random.default_rng(0))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.05)
    for bad in ("gamma", "gamma:0", "uniform", "gamma:-1"):
        with pytest.raises(ConfigError):
            read_arrivals(bad)


def test_prefix_cache_words() -> None:
    assert [read_prefix_cache(x) for x in ("off", "ideal", "hit=0.37")] == [0.0, None, 0.37]
    for bad in ("hit=1.5", "on", "hit=-0.1", "0.3"):
        with pytest.raises(ConfigError):
            read_prefix_cache(bad)


# The plan file -------------------------------------------------------------------------------


def table(**changes: dict[str, object]) -> dict[str, object]:
    base: dict[str, dict[str, object]] = {
        "workload": {"rate_per_s": 1.0, "input_tokens": 100, "output_tokens": 10},
        "slo": {"ttft_p99_s": 5},
        "candidates": {"models": ["llama-3.1-8b"], "gpus": ["h100-sxm"]},
    }
    return {k: {**base.get(k, {}), **changes.get(k, {})} for k in {*base, *changes}}


def test_all_problems_at_once_with_near_matches_and_lines(tmp_path: Path) -> None:
    text = """
[workload]
rate_per_s = 0
trace = "nothing.jsonl"
scal = 2
[slo]
ttft_p99 = 3
itl_p95_ms = "fast"
[candidates]
models = ["lama-3.1-8b"]
gpus = ["h100"]
methods = ["kivy"]
tp = [0]
[acuracy]
"""
    with pytest.raises(ConfigError) as error:
        read_plan(write(tmp_path, "plan.toml", text))
    message = str(error.value)
    for part in (
        "line 3: workload.rate_per_s: expected exactly one of",
        "line 3: workload.rate_per_s: expected requests per second",
        "did you mean scale?",
        "did you mean ttft_p99_s?",
        "line 8: slo.itl_p95_ms: expected milliseconds, got 'fast'",
        "unknown model 'lama-3.1-8b'",
        "h100-sxm",
        "Did you mean: kivi?",
        "line 13: candidates.tp",
        "acuracy: not a key of this form; did you mean accuracy?",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workload": {"trace": "x"}}, "exactly one of"),
        ({"workload": {"rate_per_s": 0}}, "expected requests per second"),
        ({"workload": {"arrivals": "trace"}}, "there is no trace"),
        ({"workload": {"prefix_cache": "ideal"}}, "needs the blocks of a trace"),
        ({"workload": {"peak_factor": 2}}, "goes with users"),
        ({"slo": {"ttft_p99_s": -1}}, "seconds between"),
        ({"slo": {"ttft_p0_s": 1}}, "not a key"),
        ({"slo": {"attainment": 2}}, "a share"),
        ({"candidates": {"router": "hash"}}, "expected one of least_requests"),
        ({"candidates": {"levels": ["real"]}}, "ideal or reference"),
        ({"prices": {"pue": 0.5}}, "a factor between 1"),
        ({"candidates": {"tp": [1, 0]}}, "1 to 1024, got 0"),
        ({"accuracy": {"task_family": "retrival"}}, "Did you mean: retrieval"),
        ({"workload": {"output_tokens_factor": {"kivy": 1.1}}}, "Did you mean: kivi?"),
    ],
)
def test_bad_keys(changes: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_from_table(table(**changes), "plan.toml", Path())
    assert message in str(error.value)


def test_no_objective_is_an_error() -> None:
    bad = table()
    bad["slo"] = {}
    with pytest.raises(ConfigError, match="at least one"):
        plan_from_table(bad, "plan.toml", Path())


def test_users_become_a_rate() -> None:
    plan = table()
    plan["workload"] = {
        "users": 1200, "active_fraction": 0.1, "requests_per_minute": 2, "peak_factor": 1.5,
        "input_tokens": 100, "output_tokens": 10, "growth": 2,
    }  # fmt: skip
    demand = plan_from_table(plan, "plan.toml", Path()).demand
    assert demand.rate_per_s == pytest.approx(1200 * 0.1 * 2 / 60 * 1.5)
    assert demand.requests().rate_per_s == pytest.approx(2 * 6.0, rel=0.05)


def test_demand_is_the_same_for_the_same_seed() -> None:
    spec = plan_from_table(table(workload={"seed": 7, "input_tokens": [[10, 0.5], [90, 1.0]]}),
                           "plan.toml", Path())  # fmt: skip
    a, b = spec.demand.requests(), spec.demand.requests()
    assert np.array_equal(a.arrival_s, b.arrival_s)
    assert np.array_equal(a.input_tokens, b.input_tokens)


def test_prefix_share_and_ideal(tmp_path: Path) -> None:
    lines = "".join(
        f'{{"timestamp": {i}, "input_length": 1000, "output_length": 5, '
        f'"hash_ids": [0, {i + 1}]}}\n'
        for i in range(3)
    )
    trace = write(tmp_path, "t.jsonl", lines)
    for words, expected in (("off", [0, 0, 0]), ("hit=0.25", [250] * 3), ("ideal", [0, 512, 512])):
        plan = table()
        plan["workload"] = {"trace": str(trace), "prefix_cache": words}
        found = plan_from_table(plan, "plan.toml", Path()).demand.requests()
        assert found.prefix_tokens.tolist() == expected


def test_output_factor_by_method() -> None:
    plan = table(workload={"output_tokens_factor": {"snapkv": 1.2, "kivi:bits=4": 1.1}})
    demand = plan_from_table(plan, "plan.toml", Path()).demand
    assert demand.output_factor("snapkv", "snapkv:keep_tokens=99") == 1.2
    assert demand.output_factor("kivi", "kivi") == 1.0
    assert demand.output_factor("kivi", "kivi:bits=4") == 1.1
    every = plan_from_table(table(workload={"output_tokens_factor": 1.5}), "p", Path()).demand
    assert every.output_factor("full", "full") == 1.0
    assert every.output_factor("kivi", "kivi") == 1.5


def test_overrides() -> None:
    assert parse_override("slo.ttft_p99_s=3.5") == ("slo.ttft_p99_s", 3.5)
    assert parse_override("workload.arrivals=gamma:2") == ("workload.arrivals", "gamma:2")
    assert parse_override("candidates.tp=[1, 2]") == ("candidates.tp", [1, 2])
    for bad in ("ttft=3", "slo.x", "nope.key=1"):
        with pytest.raises(ConfigError):
            parse_override(bad)


def test_the_example_is_what_init_writes() -> None:
    packaged = Path(__file__).parents[2] / "lccost/data/plan.toml"
    assert EXAMPLE.read_text("utf-8") == packaged.read_text("utf-8")
    assert read_plan(EXAMPLE).size == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100-sxm = 3\n", "h100-sxm has no date"),
        ('date = "2026-01"\nh10-sxm = 3\n', "Did you mean: h100-sxm"),
        ('date = "2026-01"\nh100-sxm = -3\n', "US dollars per GPU-hour between 0"),
        ('date = "soon"\nh100-sxm = 3\n', "expected a date"),
        ('date = "2026-01"\nh100-sxm = { low = 3, mid = 2, high = 4 }\n', "low <= mid <= high"),
    ],
)
def test_bad_price_files(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, "prices.toml", text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_from_table(table(prices={"file": str(file)}), "plan.toml", Path())

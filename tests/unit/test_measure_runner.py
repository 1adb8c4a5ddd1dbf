"""Sweeps: one record a point, whatever happens; resuming; a real worker killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from costmodel.architecture import Architecture, Layer
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from costmodel.mlps import DenseMLP
from measure import runner
from measure.isolation import Outcome
from measure.observation_options import How
from measure.points import MeasurePoint
from measure.runner import Rules
from measure.store import RecordStore
from measure.timing import Budget

ROOT = Path(__file__).resolve().parents[2]
#: Keys of a record that others rely on.
KEYS = {
    "model", "method", "method_parameters", "method_spec", "level", "engine", "gpu", "tp",
    "dtype", "weight_dtype", "kv_dtype", "batch", "context_tokens", "output_tokens",
    "weights_bytes", "state_bytes", "state_host_bytes", "peak_prefill_bytes",
    "peak_decode_bytes", "executed_prefill_flops", "executed_decode_flops", "ttft_s",
    "tpot_s", "energy_j_per_token", "record_key", "status", "message", "layers", "device",
    "realisation", "samples", "statistics", "is_valid", "quality", "environment",
    "predicted",
}  # fmt: skip


def tiny(layers: int = 2) -> Architecture:
    mixer = Attention(n_heads=4, n_kv_heads=2, head_dim=32, v_head_dim=32)
    layer = Layer(mixers=(mixer,), mlps=(DenseMLP(d_ff=96),), other_parameters=128)
    return Architecture(
        name="tiny", hub_id="tiny", family="llama", d_model=64, vocab_size=100,
        layers=(layer,) * layers, other_parameters=64, tied_embeddings=True,
    )  # fmt: skip


def points(*contexts: int, method: str = "full", **changes) -> list[MeasurePoint]:
    return [
        MeasurePoint(architecture=tiny(), stack=parse_method(method), context_tokens=c, **changes)
        for c in contexts
    ]


@pytest.fixture
def outcomes(monkeypatch):
    """Workers that end as the test says; the list of points that were run."""
    run: list[int] = []
    script: dict[int, Outcome] = {}

    def fake(_, point, how):
        context = point.context_tokens
        run.append(context)
        value = {"status": "ok", "ttft_s": 0.5, "tpot_s": 0.01, "is_valid": True}
        return script.get(context, Outcome(status="ok", value=value))

    monkeypatch.setattr(runner.Workers, "observe", fake)
    return run, script


def test_every_ending_is_a_row_and_the_sweep_goes_on(tmp_path, outcomes):
    run, script = outcomes
    script[2] = Outcome(status="crashed", message="ended by signal SIGSEGV")
    script[3] = Outcome(status="timeout", message="no result after 5 s")
    script[4] = Outcome(status="oom", message="can't allocate memory")
    found = runner.run_sweep(points(1, 2, 3, 4, 5), output=tmp_path / "r.jsonl")
    assert run == [1, 2, 3, 4, 5]
    assert [r["status"] for r in found] == ["ok", "crashed", "timeout", "oom", "ok"]
    assert found[1]["message"] == "ended by signal SIGSEGV"
    assert all(set(r) >= KEYS for r in found)
    assert found[2]["ttft_s"] is None
    assert [json.loads(x) for x in (tmp_path / "r.jsonl").read_text().splitlines()] == found


def test_resuming_runs_what_has_no_result_yet(tmp_path, outcomes):
    run, script = outcomes
    script[2] = Outcome(status="crashed", message="x")
    runner.run_sweep(points(1, 2, 3), output=tmp_path / "r.jsonl")
    run.clear()
    script.clear()
    found = runner.run_sweep(points(1, 2, 3, 4), output=tmp_path / "r.jsonl", resume=True)
    assert run == [2, 4]
    assert [r["status"] for r in found] == ["ok"] * 4
    run.clear()
    runner.run_sweep(points(1), output=tmp_path / "r.jsonl")  # without resume: from the start
    assert run == [1]
    assert len(RecordStore(tmp_path / "r.jsonl").records()) == 1


def test_lines_that_lack_what_a_row_has_are_no_attempts(tmp_path, outcomes):
    (point,) = points(1)
    path, key = tmp_path / "r.jsonl", point.record_key
    lines = [{"record_key": key, "status": "oom"}, {"record_key": key}, {}]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    (found,) = runner.run_sweep([point], output=path, resume=True)
    assert outcomes[0] == []
    assert (found["status"], found["message"]) == ("oom", "")


def test_a_record_carries_its_own_prediction_or_says_why_not(tmp_path, outcomes):
    asked = []

    def predict(fields):
        asked.append(dict(fields))
        if fields["context_tokens"] == 2:
            raise NotApplicableError("no such thing")
        return {"state_bytes": 7, "ttft_s": 0.4, "tpot_s": 0.01, "basis": "calibrated"}

    first, second = runner.run_sweep(
        points(1, 2, gpu="mine.toml"), output=tmp_path / "r.jsonl", predict_point=predict
    )
    assert first["predicted"]["state_bytes"] == 7
    assert second["predicted"] is None
    assert second["message"] == "no prediction: no such thing"
    assert second["status"] == "ok"
    assert asked[0]["gpu"] == "mine.toml"
    assert asked[0]["level"] == "ideal"
    assert asked[0]["layers"] == 2


def test_points_predicted_not_to_fit_are_rows_without_a_run(tmp_path, outcomes):
    run, _ = outcomes

    def predict(_):
        return {"peak_prefill_bytes": 1e18}

    path = tmp_path / "r.jsonl"
    (found,) = runner.run_sweep(points(1), output=path, predict_point=predict)
    assert (found["status"], run) == ("skipped_oom_predicted", [])
    again = {"output": path, "predict_point": predict, "resume": True}
    (found,) = runner.run_sweep(points(1), **again)
    assert (found["status"], run) == ("skipped_oom_predicted", [])
    for _ in range(2):  # the row's message names --force: what was skipped is run then, once
        (found,) = runner.run_sweep(points(1), rules=Rules(force=True), **again)
        assert (found["status"], run) == ("ok", [1])


def test_the_key_is_of_what_runs_and_not_of_what_predicts():
    (a,), (b,) = points(8, gpu="a.toml"), points(8, gpu="b.toml")
    assert a.record_key == b.record_key
    others = [
        *points(9), *points(8, batch=2), *points(8, layers=1), *points(8, dtype="fp32"),
        *points(8, method="kivi"), *points(8, method="kivi:bits=4"), *points(8, seed=1),
    ]  # fmt: skip
    assert len({a.record_key, *(p.record_key for p in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch": 0}, ConfigError, "at least 1"),
        ({"layers": 3}, ConfigError, "expected 1 to 2"),
        ({"dtype": "int8"}, ConfigError, "int8"),
        ({"device": "tpu"}, ConfigError, "tpu"),
        ({"engine": "vllm"}, NotApplicableError, "vllm"),
        ({"tp": 3}, NotApplicableError, "heads"),
        ({"engine": "lccost", "realisation": "reference"}, NotApplicableError, "--engine torch"),
        ({"engine": "transformers", "method": "kv_offload"}, NotApplicableError, "one form"),
        ({"tp": 2, "engine": "transformers"}, NotApplicableError, "tensor parallel"),
        ({"tp": 2, "device": "cuda:1"}, ConfigError, "cuda:0 to cuda:1"),
    ],
)
def test_impossible_points_say_what_was_expected(changes, error, words):
    with pytest.raises(error, match=words):
        points(8, **changes)


def test_points_of_a_model_share_a_process_until_one_leaves_it_doubtful(tmp_path, monkeypatch):
    started = []
    endings = {
        2: Outcome(status="error", value={}, message="refused"),
        3: Outcome(status="error", message="RuntimeError: x"),
        4: Outcome(status="ok", value={"status": "ok", "tpot_s": 1.0, "graph_failed": True}),
    }

    class Process:
        alive = True

        def __init__(self, **_):
            started.append([])

        def call(self, _, arguments, *, timeout_s):
            context = arguments[0].context_tokens
            started[-1].append(context)
            value = {"status": "ok", "tpot_s": 1.0, "graph_failed": False}
            return endings.get(context, Outcome(status="ok", value=value))

        def close(self):
            pass

    monkeypatch.setattr(runner, "Worker", Process)
    rules = Rules(isolation="model")
    todo = [*points(1, 2, 3, 4, 5), *points(6, dtype="fp32")]
    runner.run_sweep(todo, output=tmp_path / "r.jsonl", rules=rules)
    assert started == [[1, 2, 3], [4], [5], [6]]
    started.clear()
    runner.run_sweep(points(1, 5), output=tmp_path / "r.jsonl")
    assert started == [[1], [5]]


_SWEEP = """
import sys
sys.path.insert(0, {tests!r})
from test_measure_runner import points, RULES
from measure.runner import run_sweep
run_sweep(points(16, 40, method="kivi:residual_tokens=32"), output={path!r}, rules=RULES)
"""
BUDGET = Budget(seconds=0.02, min_samples=3, max_samples=5, warmup_seconds=0.01)
RULES = Rules(how=How(budget=BUDGET))


def test_a_killed_sweep_resumes_without_losing_or_doubling(tmp_path):
    path = tmp_path / "r.jsonl"
    code = _SWEEP.format(tests=str(Path(__file__).parent), path=str(path))
    sweep = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n")):
        time.sleep(0.02)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    whole = path.read_bytes()
    assert whole.count(b"\n") == 1
    path.write_bytes(whole + b'{"record_key": "torn')
    found = runner.run_sweep(
        points(16, 40, method="kivi:residual_tokens=32"), output=path, resume=True, rules=RULES
    )
    assert path.read_bytes().startswith(whole)
    records = RecordStore(path).records()
    assert [r["record_key"] for r in records] == [r["record_key"] for r in found]
    for r, context in zip(records, (16, 40), strict=True):
        assert r["status"] in ("ok", "noisy")
        assert r["context_tokens"] == context
        assert r["weights_bytes"] == 2 * tiny().n_parameters
        assert r["tpot_s"] == pytest.approx(r["statistics"]["tpot_s"]["median_s"])
        assert len(r["samples"]["ttft_s"]) >= 3
    # 2 layers x 2 heads, 16 tokens, K and V of 32 in bf16: nothing is packed before 32 tokens.
    assert records[0]["state_bytes"] == 2 * 2 * 16 * 2 * 32 * 2
    # 40 tokens: 32 keys and 8 values packed (2 bits, two bf16 per 32), 8 keys and 32 values not.
    assert records[1]["state_bytes"] == 2 * 2 * (40 * (32 // 4 + 4) + 40 * 32 * 2)

"""Two sweeps on one file, both killed again and again at random moments: no row lost, none twice.

The points themselves end at once here; what is attacked is everything around them.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from test_measure_runner import points

from measure.runner import Rules, run_sweep
from measure.store import RecordStore

ROOT = Path(__file__).resolve().parents[2]
N_POINTS, KILLS = 100, 8
_SWEEP = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_measure_runner import points
from measure import runner
from measure.isolation import Outcome

def observe(workers, point, how):
    time.sleep(0.003)
    value = {{"status": "ok", "tpot_s": 0.01, "filler": "x" * 20_000}}
    return Outcome(status="ok", value=value)

runner.Workers.observe = observe
found = list(points(*range(1, {N_POINTS} + 1)))
if sys.argv[2] == "backwards":
    found.reverse()
print("ready", flush=True)
runner.run_sweep(found, output=sys.argv[1], resume=True)
"""


def sweep(path: Path, order: str) -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, "-c", _SWEEP, str(path), order], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    return child


def kill(child: "subprocess.Popen[str]") -> None:
    os.kill(child.pid, signal.SIGKILL)
    child.wait(timeout=10)
    child.stdout.close()


def test_sweeps_that_are_killed_at_any_moment_lose_and_double_nothing(tmp_path):
    path = tmp_path / "runs.jsonl"
    moment = random.Random(4)
    seen: dict[str, str] = {}
    for _ in range(KILLS // 2):
        both = [sweep(path, "forwards"), sweep(path, "backwards")]
        time.sleep(moment.uniform(0.0, 0.25))
        for child in both:
            kill(child)
            time.sleep(moment.uniform(0.0, 0.02))
        # what was there stays as it was, whatever came after it
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        lines = [json.loads(x) for x in whole.split(b"\n") if x]
        now = {r["record_key"]: r["started"] for r in lines}
        assert len(now) == len(lines)
        assert {k: now.get(k) for k in seen} == seen
        seen = now
    with path.open("ab") as file:  # and one torn line for certain
        file.write(b'{"record_key": "torn')
    last = [sweep(path, "forwards"), sweep(path, "backwards")]
    for child in last:
        assert child.wait(timeout=60) == 0
        child.stdout.close()
    records = RecordStore(path).records()
    wanted = [p.record_key for p in points(*range(1, N_POINTS + 1))]
    assert sorted(r["record_key"] for r in records) == sorted(wanted)
    assert all(len(r["filler"]) == 20_000 for r in records)


def test_a_point_that_another_writer_finished_meanwhile_is_not_written_again(tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    (point,) = points(7)

    def observe(workers, point, how):
        from measure.isolation import Outcome

        # the other writer is done while this one still measures
        store = RecordStore(path)
        store.append({"record_key": point.record_key, "status": "ok", "environment": environment})
        return Outcome(status="ok", value={"status": "ok", "tpot_s": 1.0})

    from measure import runner
    from measure.environment import fingerprint, worker_variables

    environment = fingerprint(worker_variables(1))
    monkeypatch.setattr(runner.Workers, "observe", observe)
    run_sweep([point], output=path, rules=Rules())
    assert len(RecordStore(path).records()) == 1

"""``scripts/gpu_run.sh`` without a device: its plan, and the order it works through it.

Where the script would call Python for a GPU, a stand-in writes down what it was asked for.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_run.sh"
STAND_IN = """#!/bin/sh
case "$1" in
  -) cat > /dev/null; echo h200-sxm; exit 0 ;;
  scripts/gpu_plan.py) exec {python} "$@" ;;
esac
echo "$@" >> {log}
case "$*" in *{fails}*) exit {code} ;; esac
"""


def script(*arguments, **variables):
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable, **variables},
    )


def test_the_plan_is_shown_without_a_device():
    done = script("--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "H200" in lines[0]
    rows = [re.match(r"(\S.*?)\s{2,}(\d*)\s+(\d+)\s+(\d+)\s+([\d-]+)$", x) for x in lines[2:-1]]
    assert all(rows)
    seconds = [int(r[3]) for r in rows]
    assert min(seconds) > 0
    assert int(rows[-1][4]) == pytest.approx(sum(seconds), abs=len(rows))
    # what is wanted most is in the first run, and a calibration stays under a minute
    names = [r[1].split()[0] for r in rows if r[5] == "1"]
    assert {"profile", "llama-3.1-8b", "kernels-in-place", "recurrent", "tests", "energy"} <= {
        *names
    }
    assert seconds[1] < 60
    # every point of the grid is in it: 16 specs, 5 contexts, 3 batches, less those before
    assert sum(int(r[2] or 0) for r in rows if r[1].startswith("llama-3.1-8b")) == 16 * 5 * 3
    assert f"{lines[-1].split()[0]}" == rows[-1][4]


def test_an_unknown_profile_is_a_usage_error():
    done = script("--dry-run", LCCOST_GPU="no-such-gpu")
    assert done.returncode == 2
    assert "no-such-gpu" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def stand_in(tmp_path):
    log = tmp_path / "asked.txt"

    def made(fails="nothing", code=1):
        path = tmp_path / "python"
        text = STAND_IN.format(python=sys.executable, log=log, fails=fails, code=code)
        path.write_text(text)
        path.chmod(0o755)
        log.write_text("")
        return {"PYTHON": str(path)}

    def asked():
        return log.read_text().splitlines()

    return made, asked


def test_steps_run_in_order_and_are_not_repeated(tmp_path, stand_in):
    make, asked = stand_in
    out = tmp_path / "out"
    done = script(out, **make())
    assert done.returncode == 0, done.stdout + done.stderr
    first = asked()
    assert "doctor" in first[0]
    assert "calibrate --device cuda:0 --quick --gpu h200-sxm" in first[1]
    measured = [x for x in first if " measure " in x]
    assert f"--gpu {out}/profile.toml" in measured[0]
    assert all("--resume --isolation model" in x for x in measured)
    assert "--engine lccost" in measured[1]
    make()
    assert script(out, **make()).returncode == 0
    assert asked() == []


def test_what_failed_or_ran_out_of_time_is_tried_again(tmp_path, stand_in):
    make, asked = stand_in
    out = tmp_path / "out"
    assert script(out, **make("recurrent.jsonl", 1)).returncode == 1
    n_failed = sum("recurrent.jsonl" in x for x in asked())
    done = script(out, **make("recurrent.jsonl", 124))
    assert done.returncode == 0
    assert "run again with" in done.stdout
    assert len(asked()) == n_failed > 0
    done = script(tmp_path / "other", **make(), LCCOST_GPU_SECONDS="10")
    assert done.returncode == 0
    assert "run again with" in done.stdout
    assert asked() == []


@pytest.mark.parametrize(("code", "expected"), [(124, 0), (1, 1)])
def test_kernels_alone_tell_running_out_of_time_from_failing(tmp_path, stand_in, code, expected):
    make, asked = stand_in
    done = script("kernels", tmp_path / "out", **make("kernels_gpu.py", code))
    assert done.returncode == expected
    assert ("run again with" in done.stdout) == (expected == 0)
    assert len(asked()) == 2

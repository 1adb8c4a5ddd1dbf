"""Whatever happens to a worker becomes an outcome."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from measure.isolation import run_isolated

ROOT = Path(__file__).resolve().parents[2]


def test_a_value_comes_back():
    found = run_isolated("operator:add", (2, 3), timeout_s=30)
    assert (found.status, found.value) == ("ok", 5)


def test_a_timeout_may_be_longer_than_the_system_waits():
    assert run_isolated("operator:add", (2, 3), timeout_s=1e12).value == 5


def test_a_value_larger_than_a_pipe_comes_back():
    found = run_isolated("operator:mul", ("x", 300_000), timeout_s=30)
    assert len(found.value) == 300_000


def test_the_environment_is_set_before_the_worker_starts():
    variables = {"MALLOC_TOP_PAD_": "4096"}
    found = run_isolated("os:getenv", ("MALLOC_TOP_PAD_",), timeout_s=30, variables=variables)
    assert found.value == "4096"
    assert "MALLOC_TOP_PAD_" not in os.environ


@pytest.mark.parametrize(
    ("function", "arguments", "status", "words"),
    [
        ("os:abort", (), "crashed", "SIGABRT"),
        ("os:_exit", (3,), "crashed", "exit code 3"),
        ("builtins:bytearray", (2**46,), "oom", "memory"),
        ("operator:truediv", (1, 0), "error", "division by zero"),
        ("operator:getitem", ({}, "a"), "error", "KeyError"),
        ("no_such_package:function", (), "error", "no_such_package"),
    ],
)
def test_endings_have_a_status_and_a_message(function, arguments, status, words):
    found = run_isolated(function, arguments, timeout_s=30)
    assert found.status == status
    assert words in found.message


def test_a_kill_is_a_crash_that_mentions_memory():
    # Signal 9 to itself, as the kernel's out-of-memory killer sends it.
    found = run_isolated("signal:raise_signal", (9,), timeout_s=30)
    assert found.status == "crashed"
    assert "memory" in found.message


def test_a_hang_is_ended_at_the_timeout():
    start = time.monotonic()
    found = run_isolated("time:sleep", (60,), timeout_s=0.5)
    assert found.status == "timeout"
    assert time.monotonic() - start < 10


_PARENT = """
from measure.isolation import run_isolated
print("started", flush=True)
run_isolated("time:sleep", (47.25,), timeout_s=60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_workers_die_with_a_killed_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    workers = _wait(lambda: _children(parent.pid))
    assert workers
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert _wait(lambda: not any(_alive(pid) for pid in workers))


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(x) for x in path.read_text().split()] if path.exists() else []


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait(ready, seconds: float = 10.0):
    deadline = time.monotonic() + seconds
    while not (found := ready()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found

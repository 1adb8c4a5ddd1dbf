"""Tasks in local processes: results in order, and no task lost with its process."""

import os
import signal
from pathlib import Path

import pytest

from costmodel import executors
from costmodel.errors import ConfigError
from costmodel.planning.executors import Processes, open_executor
from costmodel.planning.requests import Requests
from costmodel.planning.spec import PlanSpec, plan_from_table


def square(n: int) -> int:
    return n * n


def dies_once(n: int, flag: str) -> int:
    if n == 3 and not os.path.exists(flag):
        Path(flag).write_text("", encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)
    return n * n


def dies(n: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return n


@pytest.fixture
def plan() -> tuple[PlanSpec, Requests]:
    spec = plan_from_table(
        {
            "workload": {"rate_per_s": 1, "requests": 20, "input_tokens": 10, "output_tokens": 5},
            "slo": {"ttft_p99_s": 3},
            "candidates": {"models": ["llama-3.1-8b"], "gpus": ["h100-sxm"]},
        },
        "plan.toml",
        Path(),
    )
    return spec, spec.demand.requests()


def test_results_keep_their_order(plan: tuple[PlanSpec, Requests]) -> None:
    done: list[int] = []
    with Processes(*plan, workers=2) as executor:
        assert executor.run([(square, (n,)) for n in range(6)], done.append) == [
            n * n for n in range(6)
        ]
    assert sum(done) == 6


def test_a_killed_process_loses_nothing(plan: tuple[PlanSpec, Requests], tmp_path: Path) -> None:
    flag = str(tmp_path / "killed")
    done: list[int] = []
    with Processes(*plan, workers=2) as executor:
        found = executor.run([(dies_once, (n, flag)) for n in range(6)], done.append)
    assert os.path.exists(flag)
    assert found == [n * n for n in range(6)]
    assert sum(done) == 6


def test_processes_that_always_die_are_an_error(plan: tuple[PlanSpec, Requests]) -> None:
    with (
        Processes(*plan, workers=1) as executor,
        pytest.raises(ConfigError, match="worker processes died"),
    ):
        executor.run([(dies, (1,))], lambda n: None)


def test_which_executor(plan: tuple[PlanSpec, Requests]) -> None:
    with open_executor("local", *plan, workers=1) as one:
        assert isinstance(one, executors.Inline)
    with open_executor("local", *plan, workers=2) as two:
        assert isinstance(two, executors.Processes)
    with pytest.raises(ConfigError, match="expected local, ray"):
        open_executor("slurm", *plan)

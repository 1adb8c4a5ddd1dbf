"""Candidates evaluated on a real local Ray cluster of two nodes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from costmodel.planning.candidate import candidates
from costmodel.planning.executors import Inline, RayCluster
from costmodel.planning.plan import make_plan
from costmodel.planning.spec import PlanSpec, plan_from_table
from costmodel.planning.worker import screen_task

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def cluster():  # type: ignore[no-untyped-def]
    ray = pytest.importorskip("ray", reason="needs Ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    root = str(Path(__file__).parents[2])
    ray.init(address=made.address, runtime_env={"env_vars": {"PYTHONPATH": root}},
             log_to_driver=False)  # fmt: skip
    yield made
    ray.shutdown()
    made.shutdown()


def spec() -> PlanSpec:
    return plan_from_table(
        {
            "workload": {"rate_per_s": 5, "requests": 200, "input_tokens": 2000,
                         "output_tokens": 60},
            "slo": {"ttft_p99_s": 3},
            "candidates": {"models": ["llama-3.1-8b"], "gpus": ["h100-sxm", "l40s"],
                           "methods": ["full", "kivi"], "max_gpus": 8},
            "accuracy": {"allow_unknown": True},
        },
        "plan.toml",
        Path(),
    )  # fmt: skip


def solved(executor: Any, plan_spec: PlanSpec, requests: Any) -> list[dict[str, Any]]:
    with executor as opened:
        plan = make_plan(plan_spec, requests, opened, lambda a, b: lambda c: None, details=False)
    return plan.rows


def test_the_cluster_has_two_nodes_and_the_same_answers(cluster: Any) -> None:
    import ray

    assert len([n for n in ray.nodes() if n["Alive"]]) == 2
    plan_spec = spec()
    requests = plan_spec.demand.requests()
    here = solved(Inline(plan_spec, requests), plan_spec, requests)
    there = solved(RayCluster(plan_spec, requests, None), plan_spec, requests)
    assert there == here


def test_a_killed_worker_loses_no_candidate(cluster: Any, tmp_path: Path) -> None:
    plan_spec = spec()
    requests = plan_spec.demand.requests()
    everyone = candidates(plan_spec.grid)
    flag = str(tmp_path / "killed")

    def dies_once(candidate: Any) -> Any:
        if candidate == everyone[1] and not os.path.exists(flag):
            Path(flag).write_text("", encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        return screen_task(candidate)

    done: list[int] = []
    with RayCluster(plan_spec, requests, None) as executor:
        rows = executor.run([(dies_once, (c,)) for c in everyone], done.append)
    assert os.path.exists(flag)
    assert sum(done) == len(everyone)
    with Inline(plan_spec, requests) as inline:
        assert rows == inline.run([(screen_task, (c,)) for c in everyone], lambda n: None)

"""A sweep on a real local Ray cluster of two nodes: all points, once each, though a worker dies."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))
from test_measure_runner import RULES, points  # noqa: E402

from measure import runner  # noqa: E402
from measure.store import RecordStore  # noqa: E402

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

    # two nodes of one processor each: two points can only run on two nodes
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "unit")])
    ray.init(address=made.address, runtime_env={"env_vars": {"PYTHONPATH": path}},
             log_to_driver=False)  # fmt: skip
    yield made
    ray.shutdown()
    made.shutdown()


def test_every_point_is_measured_once_although_a_worker_is_killed(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, nodes = tmp_path / "killed", tmp_path / "nodes"
    nodes.mkdir()
    real = runner.measure

    def dies_once(point: Any, prediction: Any, rules: Any) -> Any:
        import ray

        (nodes / f"{ray.get_runtime_context().get_node_id()}-{point.context_tokens}").touch()
        if point.context_tokens == 24 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(point, prediction, rules)

    monkeypatch.setattr(runner, "measure", dies_once)
    todo = points(16, 24)
    output = tmp_path / "runs.jsonl"
    found = runner.run_sweep(todo, output=output, rules=RULES, executor="ray")
    assert flag.exists()
    assert [r["context_tokens"] for r in found] == [16, 24]
    assert {r["status"] for r in found} <= {"ok", "noisy"}
    assert len(RecordStore(output).records()) == 2
    assert len({p.name.rpartition("-")[0] for p in nodes.iterdir()}) == 2
    # measured on a cluster is measured: nothing runs again
    before = sorted(nodes.iterdir())
    runner.run_sweep(todo, output=output, rules=RULES, executor="ray", resume=True)
    assert sorted(nodes.iterdir()) == before


def test_a_gpu_point_waits_for_a_node_with_a_gpu(cluster: Any) -> None:
    """Ray is told that a node has a GPU; what it makes visible to the task is that GPU's number."""
    import ray

    from costmodel.executors import open_executor

    with open_executor("ray", (runner.no_setup, ()), num_cpus=1, num_gpus=1) as executor:
        call = (os.getenv, ("CUDA_VISIBLE_DEVICES",))
        task = executor.remote.remote(executor.setup, "x", *call)  # type: ignore[union-attr]
        ready, _ = ray.wait([task], timeout=1.5)
        assert not ready
        cluster.add_node(num_cpus=1, num_gpus=1)
        assert ray.get(task, timeout=60) == "0"

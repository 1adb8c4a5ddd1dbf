"""What memory is at hand, whether a point fits it, and that records say which limit decided."""

import pytest

from costmodel.methods.parse import parse_method
from costmodel.registry import load_architecture
from lccost.measuring import memory_predictor
from measure import memory_check, runner
from measure.available_memory import Available, available_memory
from measure.isolation import Outcome
from measure.points import MeasurePoint
from measure.runner import Rules

GIB = 2**30


@pytest.fixture
def system(tmp_path):
    """Folders as /proc and /sys/fs/cgroup, with 8 GiB available."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 8388608 kB\n")
    return proc, cgroups


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_without_a_group_the_kernel_estimates(system):
    assert available_memory(*system) == Available(8 * GIB, "MemAvailable of /proc/meminfo")


@pytest.mark.parametrize("path", ["/a/b", "/of/the/host"])
def test_the_tightest_group_counts_with_its_file_cache_given_back(system, path):
    proc, cgroups = system
    (proc / "self" / "cgroup").write_text(f"0::{path}\n")
    group(cgroups, memory__max=4 * GIB, memory__current=3 * GIB,
          memory__stat=f"anon 1\ninactive_file {GIB}")  # fmt: skip
    group(cgroups / "a" / "b", memory__max="max", memory__current=GIB)
    found = available_memory(*system)
    assert found == Available(2 * GIB, "memory.max of the control group")


def test_version_1_groups(system):
    proc, cgroups = system
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/\n4:memory:/job\n")
    group(cgroups / "memory" / "job", memory__limit_in_bytes=GIB, memory__usage_in_bytes=0)
    assert available_memory(*system).bytes == GIB


def test_a_system_that_says_nothing_decides_nothing(tmp_path):
    assert available_memory(tmp_path, tmp_path) is None
    assert memory_check.checked(1e18, None) == {"memory_check": None}
    assert memory_check.checked(None, Available(1, "x")) == {"memory_check": None}


def test_nine_tenths_may_be_used():
    fits = memory_check.checked(90.0, Available(100, "somebody"))
    assert "status" not in fits
    assert fits["memory_check"]["limit"] == "somebody"
    late = memory_check.checked(91.0, Available(100, "somebody"))
    assert late["status"] == "skipped_oom_predicted"
    assert "somebody" in late["message"]
    assert "--force" in late["message"]


def test_on_a_cpu_what_a_method_keeps_on_the_host_counts_too():
    row = {"peak_prefill_bytes": 5.0, "peak_decode_bytes": 3.0, "state_host_bytes": 2.0}
    assert memory_check.needed_bytes(row, "cpu") == 7.0
    assert memory_check.needed_bytes(row, "cuda:0") == 5.0
    assert memory_check.needed_bytes({}, "cpu") is None


def point(**changes):
    model = load_architecture("llama-3.2-1b")
    return MeasurePoint(
        architecture=model, stack=parse_method("full"), context_tokens=1000, **changes
    )


def test_without_a_profile_the_memory_at_hand_decides(tmp_path, monkeypatch):
    predict = memory_predictor("cpu", {"llama-3.2-1b": load_architecture("llama-3.2-1b")})
    monkeypatch.setattr(memory_check, "available_memory", lambda: Available(2 * GIB, "a test"))
    ran = []

    def observe(_, point, how):
        ran.append(how.needed_bytes)
        return Outcome(status="ok", value={"status": "ok", "ttft_s": 1.0, "tpot_s": 1.0})

    monkeypatch.setattr(runner.Workers, "observe", observe)
    path, options = tmp_path / "r.jsonl", {"predict_memory": predict}
    (skipped,) = runner.run_sweep([point(dtype="fp32")], output=path, **options)
    assert skipped["status"] == "skipped_oom_predicted"
    assert skipped["predicted"] is None
    # 1.236 billion parameters of 4 bytes, and a cache and activations besides
    assert skipped["memory_check"]["needed_bytes"] > 4.94e9
    assert skipped["memory_check"]["limit"] == "a test"
    assert ran == []
    forced = Rules(force=True)
    (record,) = runner.run_sweep([point(dtype="fp32")], output=path, rules=forced, **options)
    assert (record["status"], ran) == ("ok", [None])
    monkeypatch.setattr(memory_check, "available_memory", lambda: Available(20 * GIB, "a test"))
    (record,) = runner.run_sweep([point(dtype="fp32")], output=path, **options)
    assert record["status"] == "ok"
    assert record["memory_check"]["available_bytes"] == 20 * GIB


def test_on_a_gpu_the_driver_decides_and_a_context_is_counted():
    models = {"llama-3.2-1b": load_architecture("llama-3.2-1b")}
    needed = [
        memory_check.needed_bytes(memory_predictor(d, models)(point(device=d).fields), d)
        for d in ("cpu", "cuda:0")
    ]
    assert needed[1] - needed[0] == 536_870_912  # what engines.toml reserves for the context

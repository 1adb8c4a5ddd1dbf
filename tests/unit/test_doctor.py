"""``lccost doctor`` on machines with and without a driver, permissions, MIG, RAPL and packages."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from fake_nvml import FakeNvml

from lccost import doctor
from lccost.cli import cli
from measure.devices import nvml
from measure.devices.energy import Unavailable

NO_CUDA = {"torch": "2.13.0+cpu", "torch_cuda": None, "available": False, "devices": [],
           "reason": "this PyTorch is built without CUDA"}  # fmt: skip
H200 = {"torch": "2.11.0", "torch_cuda": "13.0", "available": True, "reason": None,
        "devices": [{"device": "cuda:0", "uuid": "aaaa-1"}]}  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """A machine whose driver is ``module`` and whose PyTorch says ``cuda``."""

    def set_up(module, cuda, rapl=None, foreign=0.0):
        monkeypatch.setattr(doctor, "load_nvml", lambda: nvml.load_nvml(module))
        monkeypatch.setattr(doctor, "open_nvml", lambda which: nvml.open_nvml(which, module))
        monkeypatch.setattr(doctor, "_cuda", lambda has_torch: cuda)
        monkeypatch.setattr(doctor, "open_rapl", lambda: rapl or SimpleNamespace())
        monkeypatch.setattr(doctor, "_load", lambda: {"foreign_cores": foreign, "cores": 8})

    return set_up


def run(*arguments):
    result = CliRunner().invoke(cli, ["doctor", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def facts(*arguments):
    result = run("--format", "json", *arguments)
    document = json.loads(result.stdout)
    assert set(document) == {
        "schema_version", "lccost_version", "command", "inputs", "assumptions", "results",
    }  # fmt: skip
    return result.exit_code, document["results"][0]


def limits(found):
    return {x["what"]: x["why"] for x in found["limits"]}


def test_a_gpu_is_shown_with_clocks_power_and_users(machine):
    module = FakeNvml()
    machine(module, H200)
    code, found = facts("--device", "cuda:0")
    assert code == 0
    (gpu,) = found["gpus"]
    assert gpu["device"] == "cuda:0"
    assert (gpu["driver"], gpu["sm_clock_mhz"], gpu["power_limit_w"]) == ("580.1", 1755, 700.0)
    assert gpu["energy"] == {"available": True, "scope": "gpu", "reason": None}
    assert "1 processes use the GPU now" in limits(found)["cuda:0: steady times and memory"]
    assert not [c for c in module.calls if "Set" in c]
    text = run("--device", "cuda:0").stdout
    for words in ("NVIDIA H200", "1755 MHz of 1980 MHz", "300 W of 700 W", "gpu_idle", "MIG off"):
        assert words in text


def test_what_the_driver_refuses_is_said_once_each(machine):
    machine(FakeNvml(broken={"nvmlDeviceGetClockInfo": "Insufficient Permissions"}), H200)
    _, found = facts()
    assert found["gpus"][0]["sm_clock_mhz"] is None
    assert limits(found)["cuda:0: sm_clock_mhz"] == "Insufficient Permissions"
    assert "SM clock unknown" in run().stdout


def test_mig_leaves_no_energy_per_token(machine):
    module = FakeNvml()
    module.mig = 1
    machine(module, H200)
    _, found = facts()
    assert "whole GPU" in limits(found)["cuda:0: energy per token"]
    assert found["gpus"][0]["energy"]["scope"] == "mig_parent"


def test_without_a_driver_the_cpu_is_left_and_asking_for_the_gpu_is_exit_4(machine):
    machine(FakeNvml(init_error="NVML Shared Library Not Found"), NO_CUDA,
            rapl=Unavailable("no permission to read the RAPL energy counters"))  # fmt: skip
    code, found = facts()
    assert code == 0
    assert found["gpus"] == []
    assert "Shared Library" in limits(found)["GPU facts, power and energy"]
    assert "permission" in limits(found)["energy of the CPU"]
    result = run("--device", "cuda:0")
    assert result.exit_code == 4
    assert "built without CUDA" in result.stderr
    assert "cannot be measured here" in result.stdout


def test_a_busy_machine_and_missing_packages_are_said(machine, monkeypatch):
    machine(FakeNvml(init_error="x"), NO_CUDA, foreign=3.5)
    monkeypatch.setattr(doctor, "_package", lambda module, name, needed_for, remedy: {
        "name": name, "version": None, "needed_for": needed_for, "remedy": remedy})  # fmt: skip
    _, found = facts()
    assert "3.50 of 8 cores" in limits(found)["steady times"]
    assert limits(found)["--engine transformers"] == "transformers is not installed"


def test_this_machine_as_it_is():
    code, found = facts("--device", "cpu")
    assert code == 0
    assert found["machine"]["cores"] >= 1
    assert found["cuda"]["torch"]


def test_a_device_that_is_none_is_a_usage_error():
    assert run("--device", "tpu").exit_code == 2

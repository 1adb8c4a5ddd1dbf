"""What the driver gives, and what it does not: a null with its reason, and measuring goes on."""

import pytest
from fake_nvml import FakeNvml

from measure.devices.energy import Unavailable
from measure.devices.names import cuda_index, is_device_name, visible_gpu
from measure.devices.nvml import CHANGING, FIXED, open_nvml


def gpu(**settings):
    return open_nvml(0, FakeNvml(**settings))


def test_all_facts_are_read_in_the_units_of_their_names():
    found = gpu().facts((*FIXED, *CHANGING))
    assert found["name"] == "NVIDIA H200"
    assert found["cuda_driver"] == "13.2"
    assert found["power_limit_w"] == 700.0
    assert found["power_w"] == 300.0
    assert found["event_reasons"] == ["gpu_idle"]
    assert found["memory"] == {"total": 80, "reserved": 1, "free": 50, "used": 29}
    assert found["processes"] == [{"pid": 1, "memory_bytes": None}]
    assert found["mig"] is False


def test_nothing_is_ever_set():
    module = FakeNvml()
    opened = open_nvml(0, module)
    opened.facts((*FIXED, *CHANGING))
    opened.energy_source().joules()
    assert not [c for c in module.calls if "Set" in c or "Reset" in c]


@pytest.mark.parametrize("words", ["Insufficient Permissions", "Not Supported", "Unknown Error"])
def test_a_fact_that_cannot_be_had_is_null_with_the_drivers_words(words):
    opened = gpu(broken={"nvmlDeviceGetClockInfo": words, "nvmlDeviceGetMigMode": words})
    found = opened.facts((*FIXED, *CHANGING))
    assert found["sm_clock_mhz"] is None
    assert found["mig"] is None
    assert opened.reasons["sm_clock_mhz"] == words
    assert found["temperature_c"] == 45


def test_a_binding_without_the_function_is_said_and_old_names_serve():
    opened = gpu(missing=["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetVbiosVersion"])
    assert opened.read("event_reasons") == ["gpu_idle"]
    assert opened.read("vbios") is None
    assert "nvidia-ml-py" in opened.reasons["vbios"]


def test_power_without_the_instant_field_is_the_drivers_figure():
    assert gpu(broken={"nvmlDeviceGetFieldValues": "Not Supported"}).read("power_w") == 250.0


@pytest.mark.parametrize(
    "words", ["NVML Shared Library Not Found", "Driver Not Loaded", "Driver/library mismatch"]
)
def test_without_a_driver_there_is_a_reason_and_no_error(words):
    found = gpu(init_error=words)
    assert isinstance(found, Unavailable)
    assert words in found.reason


def test_a_gpu_is_found_by_uuid_with_or_without_its_prefix_then_by_its_bus():
    module = FakeNvml(uuids=("GPU-aaaa-1", "GPU-bbbb-2"))
    assert open_nvml("bbbb-2", module)._handle == "handle1"
    assert open_nvml("GPU-bbbb-2", module)._handle == "handle1"
    assert open_nvml("cccc-3", module, bus_id="0000:01:00.0")._handle == "handle-by-bus"
    missing = open_nvml("cccc-3", module)
    assert isinstance(missing, Unavailable)
    assert "Not Found" in missing.reason


def test_the_energy_counter_says_what_it_covers():
    module = FakeNvml()
    source = open_nvml(0, module).energy_source()
    assert (source.joules(), source.watts(), source.scope) == (1000.0, 300.0, "gpu")
    module.mig = 1
    assert open_nvml(0, module).energy_source().scope == "mig_parent"
    none = gpu(broken={"nvmlDeviceGetTotalEnergyConsumption": "Not Supported"}).energy_source()
    assert isinstance(none, Unavailable)
    assert "Not Supported" in none.reason


@pytest.mark.parametrize(
    ("index", "listed", "expected"),
    [(1, None, 1), (0, "3,1", 3), (1, "3, GPU-abc", "GPU-abc"), (2, "3", 2), (0, "", 0)],
)
def test_visible_devices_are_followed(index, listed, expected):
    variables = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert visible_gpu(index, variables) == expected


def test_device_names():
    assert [cuda_index(x) for x in ("cuda", "cuda:3", "cpu", "cuda:x", "cuda:1 ")] == [
        0, 3, None, None, None,
    ]  # fmt: skip
    assert is_device_name("cpu")
    assert not is_device_name("mps")

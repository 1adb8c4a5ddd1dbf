"""Whether a profile is of the device that runs: said where it is known not to be."""

from dataclasses import replace

import pytest

from costmodel.hardware import load_hardware
from lccost import preflight

XEON = "Intel(R) Xeon(R) Processor"


@pytest.fixture
def machine(monkeypatch):
    """A CPU and a GPU as the system names them."""

    def found(device):
        gpu = {"name": "NVIDIA A100-SXM4-80GB"} if device.startswith("cuda") else None
        return {"cpu": XEON, "gpu": gpu}

    monkeypatch.setattr(preflight, "fingerprint", found)


def calibrated(name, title):
    return replace(load_hardware(name), name="mine", title=title)


@pytest.mark.parametrize(
    ("hardware", "device", "is_other"),
    [
        (load_hardware("h100-sxm"), "cpu", True),
        (load_hardware("xeon-8480plus"), "cpu", True),
        (calibrated("xeon-8480plus", f"{XEON}, 1 threads (calibrated)"), "cpu", False),
        (load_hardware("a100-sxm-80gb"), "cuda:0", False),
        (load_hardware("h100-sxm"), "cuda:0", True),
        (load_hardware("xeon-8480plus"), "cuda:0", True),
        (
            calibrated("a100-sxm-80gb", f"{load_hardware('a100-sxm-80gb').title} (calibrated)"),
            "cuda:0",
            False,
        ),
    ],
)
def test_a_profile_of_another_device_is_said(machine, hardware, device, is_other):
    found = preflight.other_device(hardware, device)
    assert bool(found) == is_other
    if is_other:
        assert hardware.title in found
        assert f"--device {device}" in found


def test_a_gpu_nobody_knows_cannot_be_told_apart(monkeypatch):
    monkeypatch.setattr(preflight, "fingerprint", lambda device: {"gpu": {"name": "GPU X"}})
    assert preflight.other_device(load_hardware("h100-sxm"), "cuda:0") == ""

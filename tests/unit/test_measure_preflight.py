"""Whether a profile is of the device that runs: said where it is known not to be."""

import json
from dataclasses import replace

import pytest

from costmodel.errors import ConfigError
from costmodel.hardware import load_hardware
from lccost import preflight
from lccost.measuring import Request, points

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


def test_a_profile_of_other_threads_is_said(machine):
    title = f"{XEON}, 1 threads (calibrated)"
    mine = replace(calibrated("xeon-8480plus", title), calibration={"threads": "1"})
    assert preflight.other_device(mine, "cpu", 1) == ""
    assert "--threads 2 --output" in preflight.other_device(mine, "cpu", 2)


def test_a_gpu_nobody_knows_cannot_be_told_apart(monkeypatch):
    monkeypatch.setattr(preflight, "fingerprint", lambda device: {"gpu": {"name": "GPU X"}})
    assert preflight.other_device(load_hardware("h100-sxm"), "cuda:0") == ""


def test_two_models_of_one_name_are_refused(tmp_path):
    """A record, and its prediction, would be of either."""
    paths = []
    for folder, width in (("a", 64), ("b", 96)):
        config = {
            "model_type": "llama", "hidden_size": width, "intermediate_size": 96,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "vocab_size": 100, "head_dim": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        }  # fmt: skip
        path = tmp_path / folder / "mine" / "config.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(config))
        paths.append(str(path))
    fields = {
        "methods": ("full",), "contexts": (16,), "batches": (1,), "layers": None, "gpu": None,
        "output_tokens": 4, "device": "cpu", "engine": "torch", "realisation": None,
        "dtype": None, "threads": 1, "seed": 0,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="different models with one name, mine"):
        points(Request(models=tuple(paths), **fields), "cpu")
    found, _ = points(Request(models=(paths[0], str(tmp_path / "a" / "mine")), **fields), "cpu")
    assert len({p.record_key for p in found}) == 1

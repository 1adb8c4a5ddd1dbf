"""The benchmark of the prompt kernels runs every case it names, at sizes an interpreter can do."""

import importlib.util
from pathlib import Path

import pytest
import torch

from costmodel.mixers.mamba2 import Mamba2
from measure.kernels import rglru_scan

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "prompt_kernels_gpu.py"


def test_forms_of_a_case_give_the_same(device, monkeypatch):
    monkeypatch.syspath_prepend(str(PATH.parent))
    spec = importlib.util.spec_from_file_location("prompt_kernels_gpu", PATH)
    assert spec is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    small = Mamba2(n_heads=2, head_dim=16, d_state=16, n_groups=1, conv_kernel=4, chunk_tokens=16)
    for name, value in {"WIDTH": 16, "N": 4, "K": 1, "MAMBA": small}.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(rglru_scan, "_CHANNELS", 16)
    outputs: dict[str, dict[str, torch.Tensor]] = {}
    for cases in (benchmark.attention_cases, benchmark.scan_cases):
        for case, form, call, work, _ in cases(40, 1, device):
            assert work > 0
            outputs.setdefault(case, {})[form] = call()
    assert set(outputs) == {"h2o_prompt_scores", "snapkv_votes", "ssd_scan", "rglru_scan"}
    received = outputs["h2o_prompt_scores"]
    torch.testing.assert_close(received["fused"], received["torch"], rtol=0.05, atol=0.05)
    assert outputs["snapkv_votes"]["fused"].sum().item() == pytest.approx(32 * 4, rel=1e-3)

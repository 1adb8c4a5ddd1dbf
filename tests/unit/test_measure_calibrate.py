"""A calibration, in miniature: it writes a profile that loads and prices everything that is run."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
import tomli_w
import torch
from torch.nn.functional import linear

from costmodel.errors import (
    ConfigError,
    MeasurementError,
    MissingExtraError,
    NotApplicableError,
    UnknownNameError,
)
from costmodel.hardware import load_hardware
from costmodel.model import Model
from costmodel.options import Options
from costmodel.registry import load_architecture, model_names
from measure import calibrate as module
from measure.calibrate import (
    calibrate,
    gpu_profile_table,
    profile_table,
    write_atomically,
)
from measure.isolation import Outcome
from measure.microbenchmarks import recurrent, run_plan
from measure.microbenchmarks.plan import FULL, QUICK
from measure.runnable import runnable_names

DEMO = Path(module.__file__).parent / "data" / "demo-decoder.json"
MINIATURE = dataclasses.replace(
    QUICK,
    seconds=0.001,
    pool_bytes=2**25,
    gemm_shapes=((320, 192),),
    rows=(1, 64),
    head_dims=(32,),
    groups=(1, 2),
    decode_tokens=(100, 400),
    prefill_tokens=(100, 300),
    kivi_tokens=(200, 400),
    quantise_tokens=(200,),
    append_heads=(1, 4),
    layer=(96, 160, 3, 1, 32),
    layer_rows=(1, 64),
    stream_bytes=(2**12, 2**16),
    windows=(40,),
    scored_tokens=(100,),
    kept_tokens=(50,),
    step_groups=(2,),
    method_tokens=(300,),
    selected_tokens=(100,),
    convolved=((1, 64), (20, 64)),
    mamba2=((2, 16, 16, 16, 40),),
    rglru=((64, 2, 40),),
    mamba=((64, 4, 40),),
    delta=((2, "gdn", 40), (2, "kda", 40)),
    rwkv5=((2, 40),),
)
#: Methods that move data over a host link, of which a CPU has none.
LINKED = ("kv_offload", "infllm")
ENVIRONMENT = {
    "id": "e", "cpu": "A CPU", "cpu_vendor": "V", "memory_bytes": 2**34,
    "last_level_cache_bytes": 2**25, "versions": {"torch": "2"},
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return run_plan(MINIATURE, 1)


def table(found, **changes):
    arguments = {"name": "mine", "quick": True, "threads": 1, "date": "2026-01-01", **changes}
    return profile_table(found, ENVIRONMENT, **arguments)


def test_the_profile_loads_and_names_its_sources(found, tmp_path):
    path = tmp_path / "mine.toml"
    write_atomically(path, tomli_w.dumps(table(found)))
    profile = load_hardware(path)
    assert (profile.name, profile.is_cpu) == ("mine", True)
    assert set(profile.peak_flops_per_s) == {"bf16", "fp32"}
    assert profile.calibration["date"] == "2026-01-01"
    for name in ("peak_flops_per_s", "hbm_bytes_per_s", "memory_bytes", "curves"):
        assert profile.sources[name]
    assert all(y > 0 for curve in profile.curves.values() for y in curve.y)


@pytest.mark.parametrize("method", [x for x in runnable_names() if x not in LINKED])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_everything_the_engine_runs_has_a_curve(found, tmp_path, method, dtype):
    path = tmp_path / "mine.toml"
    write_atomically(path, tomli_w.dumps(table(found)))
    model = Model.of(
        load_architecture(DEMO), method, load_hardware(path), Options(dtype=dtype, engine="torch")
    )
    for phase, operations in model.operations(1, 1000, 8).items():
        time = model.times(operations, decode=phase == "decode")
        assert set(time.bases) == {"calibrated"}, phase


def test_no_calibration_shape_is_a_models(request):
    shapes = {s for plan in (QUICK, FULL) for s in plan.gemm_shapes}
    for name in (*model_names(), DEMO):
        model = load_architecture(name)
        used = {(x.n_out, x.n_in) for x, _ in model.linear_groups}
        used.add((model.vocab_size, model.d_model))
        assert not shapes & used, name
        heads = {
            (m.n_kv_heads, m.head_dim)
            for m in (g.mixer for g in model.mixer_groups)
            if m.KIND == "attention"
        }
        assert not heads & {(QUICK.kv_heads, d) for d in FULL.head_dims}, name


@pytest.mark.parametrize("batch", [1, 3])
def test_a_mixer_is_timed_without_its_projections(batch):
    given = recurrent._Given(5, torch.bfloat16)
    product = linear(torch.empty(batch, 2, 0), given, torch.ones(7))
    assert (product.shape, product.dtype) == ((batch, 2, 5), torch.bfloat16)
    assert linear(torch.empty(batch, 2, 9), given) is product


def test_a_failed_calibration_leaves_the_old_profile(tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    path.write_text("old")
    crash = Outcome(status="crashed", message="ended by signal SIGSEGV")
    monkeypatch.setattr(module, "run_isolated", lambda *a, **k: crash)
    with pytest.raises(MeasurementError, match="SIGSEGV"):
        calibrate("cpu", quick=True, output=path)
    assert path.read_text() == "old"
    with pytest.raises(NotApplicableError, match="tpu"):
        calibrate("tpu", output=path)


def test_the_file_is_named_profile(found, tmp_path, monkeypatch):
    done = Outcome(status="ok", value=found)
    monkeypatch.setattr(module, "run_isolated", lambda *a, **k: done)
    path = calibrate("cpu", quick=True, output=tmp_path / "deep" / "My CPU_1.toml")
    assert tomllib.loads(path.read_text())["name"] == "my-cpu-1"
    assert [p.name for p in path.parent.iterdir()] == ["My CPU_1.toml"]


def test_a_gpu_keeps_its_datasheet_beside_its_curves(found, tmp_path):
    """The layout only: the figures are this CPU's, no GPU was measured."""
    measured = {**found, "device_title": "NVIDIA H100 80GB HBM3", "host_link_bytes_per_s": 5e10}
    base = load_hardware("h100-sxm")
    laid_out = gpu_profile_table(
        measured, ENVIRONMENT, base, name="mine", quick=True, date="2026-01-01"
    )
    path = tmp_path / "mine.toml"
    write_atomically(path, tomli_w.dumps(laid_out))
    profile = load_hardware(path)
    assert (profile.is_cpu, profile.host_link_bytes_per_s) == (False, 5e10)
    assert profile.peak_flops_per_s == base.peak_flops_per_s
    assert profile.hbm_bytes_per_s == base.hbm_bytes_per_s
    assert set(profile.curves) == set(found["curves"])
    assert "H100 80GB" in profile.sources["host_link_bytes_per_s"]
    assert profile.sources["tdp_w"] == base.sources["tdp_w"]


def test_a_gpu_that_is_not_here_is_said_before_anything_runs(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(MissingExtraError, match="cuda:0: PyTorch"):
        calibrate("cuda:0", output=tmp_path / "x.toml")


def test_a_gpu_without_a_profile_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    class Probe:
        """A machine whose GPU nobody knows."""

        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def call(self, function, *_, **__):
            return Outcome(status="ok", value="GPU X" if function.endswith("title") else "")

    monkeypatch.setattr(module, "Worker", Probe)
    monkeypatch.setattr(module, "run_isolated", lambda *a, **k: pytest.fail("it ran"))
    for gpu, error, words in (
        (None, ConfigError, "GPU X.*--gpu PROFILE"),
        ("no-such-gpu", UnknownNameError, "no-such-gpu"),
        ("xeon-8480plus", ConfigError, "profile of a GPU"),
    ):
        with pytest.raises(error, match=words):
            calibrate("cuda:0", gpu=gpu, output=tmp_path / "x.toml")

"""Records of our own kernels into a profile: ``lccost calibrate --table kernels.jsonl``.

The rows here are synthetic: times of the kernels' own model with known parameters and 2 % of seeded
scatter, made inside the tests.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_kernels_fused import CASES, GPU, MIXER, step

from costmodel.calibration.kernel_records import SCHEMA, operation_of
from costmodel.errors import ConfigError
from costmodel.fused_kernels import work_of
from costmodel.hardware import load_hardware
from costmodel.kernels import time_operation
from costmodel.kernels.families import load_family
from costmodel.kernels.fused import KIND
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Workload
from lccost.cli import cli

#: Unlike the priors in every parameter.
TRUTH = KIND.build(
    {
        "launch_s": 9e-6,
        "next_launch_s": 1.2e-6,
        "bandwidth_fraction": 0.70,
        "arithmetic_fraction": 0.80,
        "stream_bytes_per_s": 4e9,
        "unhidden_fraction": 0.35,
    }
)
POINTS = [(n, b) for n in (4096, 8192, 32_768, 65_536, 131_072) for b in (1, 8, 32)]
KINDS = {"Attention": "attention", "Mamba2": "mamba2", "RGLRU": "rglru"}


def synthetic(kernel: str, tokens: int, batch: int, rng: np.random.Generator) -> dict[str, Any]:
    """A record as the benchmarks write it, its time made up by the model."""
    spec, phase, mixer = CASES[kernel]
    work = work_of(step(kernel, float(tokens), float(batch)), GPU.n_units)
    seconds = float(KIND.time_s(TRUTH, GPU, work, kernel, True)) * np.exp(rng.normal(0, 0.02))
    return {
        "gpu": GPU.name,
        "device_name": "NVIDIA H200",
        "case": spec,
        "form": "fused",
        "status": "ok",
        "kernel": kernel,
        "method_spec": spec,
        "phase": phase,
        "mixer": {"kind": KINDS[type(mixer).__name__], **asdict(mixer)},
        "dtype": "bf16",
        "context_tokens": tokens,
        "batch": batch,
        "reserved_tokens": tokens + 256,
        "seconds": seconds,
        "samples": [seconds] * 3,
    }


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    return path


def calibrate(table: Path, output: Path, *more: str):
    arguments = ["calibrate", "--table", str(table), "--output", str(output), *more]
    return CliRunner().invoke(cli, arguments)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("scipy")
    folder = tmp_path_factory.mktemp("records")
    rng = np.random.default_rng(0)
    records = [synthetic(k, *p, rng) for k in ("kivi2", "h2o", "prompt_scores") for p in POINTS]
    # what the same file holds beside them: other forms, checks without a time
    torch_form = {**synthetic("kivi2", 8192, 1, rng), "form": "torch"}
    check = {"case": "kivi", "form": "fused", "status": "checked", "largest_error": 1e-3}
    table = written(folder / "kernels.jsonl", [check, *records, torch_form])
    result = calibrate(table, folder / "mine.toml")
    assert result.exit_code == 0, result.output
    assert "47: left out: form 'torch' is no kernel" in result.output
    return load_hardware(str(folder / "mine.toml"))


@pytest.mark.parametrize("kernel", ["kivi2", "h2o", "prompt_scores"])
def test_a_fitted_family_finds_what_made_the_times(profile, kernel: str) -> None:
    family = load_family("fused", "lccost", profile, variant=kernel)
    assert family is not None
    assert (family.engine, family.basis, family.n_rows) == ("lccost", "calibrated", len(POINTS))
    assert family.held_out["mape"] < 6
    for tokens, batch in ((16_384, 8), (100_000, 4)):
        op = step(kernel, float(tokens), float(batch))
        expected = KIND.time_s(TRUTH, GPU, work_of(op, GPU.n_units), kernel, True)
        found = time_operation(op, profile, "lccost")
        assert found.basis == "calibrated"
        assert float(found.mid_s) == pytest.approx(float(expected), rel=0.06)
        assert found.low_s <= expected <= found.high_s


def test_predictions_with_the_profile_use_it_and_the_others_stay_priors(profile) -> None:
    architecture, where = load_architecture("llama-3.1-8b"), Workload.of(8, 65_536)
    for kernel in ("kivi2", "tova"):
        op = step(kernel, 65_536.0)
        basis = time_operation(op, profile, "lccost").basis
        assert basis == ("calibrated" if kernel == "kivi2" else "prior")
    mine = predict(architecture, "kivi", where, profile, engine="lccost")
    shipped = predict(architecture, "kivi", where, load_hardware(GPU.name), engine="lccost")
    assert float(mine["tpot_s"]) != float(shipped["tpot_s"])
    assert float(mine["roofline_tpot_s"]) == float(shipped["roofline_tpot_s"])
    # a sweep with contexts of residuals alone changes no other point
    tokens = [64, 128, 1300, 65_536]
    many = predict(architecture, "kivi", Workload.of(8, tokens), profile, engine="lccost")
    assert float(many["tpot_s"][-1]) == pytest.approx(float(mine["tpot_s"]), rel=1e-12)


@pytest.mark.parametrize("kernel", CASES)
def test_a_record_is_read_back_as_the_operation_it_measured(kernel: str) -> None:
    record = synthetic(kernel, 32_768, 8, np.random.default_rng(1))
    cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()}
    built, measured = operation_of(cells), step(kernel)
    assert built.kernel == kernel
    assert work_of(built, 132.0) == work_of(measured, 132.0)
    key, shape, seconds = SCHEMA.read({**cells, "hw": record["gpu"]})
    assert key == ("fused", kernel, GPU.name, "lccost", "")
    assert seconds == record["seconds"]
    assert set(shape) == set(KIND.shape)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kernel": "kivi3"}, "kernel: expected one of"),
        ({"phase": "train"}, "phase: expected prefill or decode"),
        ({"method_spec": "kivi:bits=4"}, "does not run kivi2 in decode"),
        ({"method_spec": "kivy"}, "method_spec: "),
        ({"method_spec": "kivi+h2o"}, "do not compose"),
        ({"dtype": "fp32"}, "bf16 and fp16"),
        ({"context_tokens": -1}, "context_tokens: expected a whole number"),
        ({"seconds": -1.0}, "seconds: expected a time above 0"),
        ({"mixer": {"kind": "attention", "n_heads": 0}}, "mixer: "),
        ({"mixer": {"kind": "nothing"}}, "mixer: "),
        ({"mixer": 3}, "mixer: "),
        ({"mixer": {"kind": "attention", **asdict(MIXER), "n_heads": -32}}, "mixer: "),
        ({"gpu": "h100-sxm", "device_name": ""}, "which is not h200-sxm"),
    ],
)
def test_records_that_cannot_be_right_are_named(change: dict[str, Any], reason: str) -> None:
    record = {**synthetic("kivi2", 32_768, 8, np.random.default_rng(1)), **change}
    cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()}
    cells["device"] = cells.get("device_name", "")
    with pytest.raises(ConfigError, match=reason):
        SCHEMA.read({**cells, "hw": str(record["gpu"])}, GPU)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        '{"case": "kivi"}',
        "\x00",
        '{"seconds": 1e-5}',
        "[" * 5000,
        '{"seconds": NaN}',
    ],
)
def test_files_that_are_no_records_are_a_user_error(tmp_path: Path, content: str) -> None:
    table = tmp_path / "kernels.jsonl"
    table.write_text(content, "utf-8")
    result = calibrate(table, tmp_path / "out.toml", "--gpu", GPU.name)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out.toml").exists()


def test_plain_decode_of_what_is_kept_counts_its_own_tokens() -> None:
    record = synthetic("attention16", 6552, 8, np.random.default_rng(3))
    record |= {"form": "kept", "tokens": 6552, "context_tokens": 32_768}
    cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()}
    key, shape, _ = SCHEMA.read({**cells, "hw": record["gpu"]})
    assert key[:2] == ("fused", "attention16")
    assert shape["n_bytes"] == pytest.approx(8 * 6552 * 8 * 256 * 2, rel=1e-3)


def test_a_profile_takes_a_second_file_of_records(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    rng = np.random.default_rng(4)
    first = tmp_path / "first.toml"
    first_table = written(tmp_path / "a.jsonl", [synthetic("ring", *p, rng) for p in POINTS])
    assert calibrate(first_table, first).exit_code == 0
    scans = [synthetic("ssd_scan", *p, rng) | {"gpu": "NVIDIA H200"} for p in POINTS]
    table = written(tmp_path / "b.jsonl", scans)
    result = calibrate(table, tmp_path / "both.toml", "--gpu", str(first))
    assert result.exit_code == 0, result.output
    both = load_hardware(str(tmp_path / "both.toml"))
    for kernel in ("ring", "ssd_scan"):
        family = load_family("fused", "lccost", both, variant=kernel)
        assert family is not None
        assert family.basis == "calibrated"


def test_too_few_records_say_how_many_are_needed(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    table = written(tmp_path / "k.jsonl", [synthetic("ring", *p, rng) for p in POINTS[:5]])
    result = calibrate(table, tmp_path / "out.toml")
    assert result.exit_code == 2
    assert "expected at least 12 good rows" in result.output

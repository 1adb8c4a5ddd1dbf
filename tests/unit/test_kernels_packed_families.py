"""Families of packed decode attention: fitted from a table of kernels, used by their engine.

Times come from the decode model with known parameters and 2 % of seeded scatter.
"""

import csv
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from costmodel.architecture import MixerGroup
from costmodel.engines import load_engine
from costmodel.hardware import load_hardware
from costmodel.kernels.decode_attention import PACKED_BYTES, PRIORS, DecodeAttentionParameters
from costmodel.kernels.decode_attention import decode_attention_time_s as model_s
from costmodel.kernels.families import load_family
from costmodel.kernels.fitted import fitted_time
from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from costmodel.workload import Point
from lccost.cli import cli

pytest.importorskip("scipy")
GPU = "h200-sxm"
MIXER = Attention(n_heads=32, n_kv_heads=8, head_dim=128, v_head_dim=128)
TRUTH = DecodeAttentionParameters(
    **{name: prior.value for name, prior in PRIORS.items()} | {"fp8_stream_ratio": 0.25}
)


def operation(spec: str, context: int, batch: int):
    at = Point(
        batch=float(batch),
        prompt_tokens=float(context),
        cached_tokens=float(context),
        reserved_tokens=float(context),
        dtype="bf16",
        kv_dtype="bf16",
        level="ideal",
        engine=load_engine("lccost"),
    )
    operations = parse_method(spec).decode(MixerGroup(MIXER, 1, (0,), 1), at)
    return next(x for x in operations if x.kind == "decode_attention")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory):
    """A profile calibrated from a table as ``benchmarks/kernels_gpu.py`` writes it."""
    folder = tmp_path_factory.mktemp("packed")
    device, rng = load_hardware(GPU), np.random.default_rng(0)
    columns = (
        *("op", "hw", "framework", "kernel", "q_dtype", "kv_dtype", "batch", "q_len", "kv_len"),
        *("Hq", "Hkv", "D", "window", "latency_us"),
    )
    lines = []
    for batch in (1, 2, 4, 8, 16, 32):
        for kv_len in (4096, 8192, 32768, 131072):
            s = model_s(TRUTH, device, batch, kv_len, 32, 8, 128, PACKED_BYTES["kivi2"])
            us = float(s) * 1e6 * np.exp(rng.normal(0, 0.02))
            names = ("decode_attn", GPU, "lccost", "lccost_kivi2", "bfloat16", "kivi2")
            lines.append((*names, batch, 1, kv_len, 32, 8, 128, 0, f"{us:.3f}"))
    table: Path = folder / "kernels.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *lines])
    output = folder / "mine.toml"
    arguments = ["calibrate", "--table", str(table), "--gpu", GPU, "--output", str(output)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    return load_hardware(str(output))


def test_the_family_answers_for_its_engine(profile):
    family = load_family("decode_attention", "lccost", profile, variant="kivi2")
    assert family is not None
    assert (family.engine, family.kernel, family.basis) == ("lccost", "lccost_kivi2", "calibrated")
    for context, batch in ((8192, 8), (65536, 4), (131072, 32)):
        found = fitted_time(operation("kivi:bits=2", context, batch), profile, "lccost")
        assert found is not None
        expected = model_s(TRUTH, profile, batch, context, 32, 8, 128, PACKED_BYTES["kivi2"])
        # The residual of 128 tokens adds up to 3.5 % of bytes at 8k.
        assert float(found.mid_s) == pytest.approx(float(expected), rel=0.12)
        assert found.basis == "calibrated"


def test_without_records_packed_caches_stay_with_the_prior(profile):
    for spec in ("kivi:bits=2", "kivi:bits=4", "flexgen"):
        assert fitted_time(operation(spec, 32768, 8), load_hardware(GPU), "lccost") is None
    # Only the form that was measured has a family; short caches are mostly residual.
    assert fitted_time(operation("kivi:bits=4", 32768, 8), profile, "lccost") is None
    assert fitted_time(operation("kivi:bits=2", 512, 8), profile, "lccost") is None

"""Predictions know nothing of what was observed; a GPU left out is predicted by the others."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from costmodel.calibration.tables import FamilyKey, Rows, read_table
from costmodel.calibration.transfer import generation_spread, transfer_errors
from costmodel.hardware import load_hardware
from costmodel.kernels.families import (
    GENERATION_SPREAD,
    family_without,
    load_family,
    shipped_families,
)
from costmodel.kernels.interval import Interval

DATA = Path(__file__).resolve().parents[1] / "data" / "kernels"
TABLES = sorted(p.name for p in DATA.glob("*.csv"))


def predictions(path: Path) -> dict[int, float]:
    out = {}
    for rows in read_table(path).families:
        key = rows.key
        device = load_hardware(key.hardware)
        family = load_family(key.kind, key.engine, device, variant=key.variant, kernel=key.kernel)
        assert family is not None
        seconds = np.broadcast_to(family.time_s(device, rows.shape, cold=False)[1], len(rows))
        out |= dict(zip(rows.lines.tolist(), seconds.tolist(), strict=True))
    return out


@pytest.mark.parametrize("name", TABLES)
def test_observed_times_change_no_prediction(name: str, tmp_path: Path) -> None:
    with open(DATA / name, encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    # Slower by up to three times: no row becomes impossible, none stays what it was.
    factors = np.random.default_rng(0).uniform(1.1, 3.0, len(records))
    for record, factor in zip(records, factors, strict=True):
        record["latency_us"] = str(float(record["latency_us"]) * factor)
    path = tmp_path / name
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    before, after = predictions(DATA / name), predictions(path)
    assert before == after


def test_a_gpu_left_out_is_predicted_by_the_others() -> None:
    h100 = load_hardware("h100-sxm")
    family = family_without("h100-sxm", "gemm", "vllm", h100, variant="bf16")
    assert family is not None
    assert family.hardware != "h100-sxm"
    assert family.basis == "transferred"


def test_the_kernel_named_decides_the_form_on_a_gpu_left_out() -> None:
    """SGLang's FlashAttention-3 absorbs and converts; TensorRT-LLM's kernels do neither."""
    h100, b200 = load_hardware("h100-sxm"), load_hardware("b200-sxm")
    for kind, name in (
        ("mla_prefill_attention", "absorbed"),
        ("mla_decode_attention", "converts_cache"),
    ):
        to_h100 = family_without("h100-sxm", kind, "sglang", h100, kernel="flash_attention")
        to_b200 = family_without("b200-sxm", kind, "sglang", b200, kernel="trtllm_mla")
        unnamed = family_without("b200-sxm", kind, "sglang", b200)
        found = [getattr(f.parameters, name) for f in (to_h100, to_b200, unnamed) if f is not None]
        assert found == [1.0, 0.0, 1.0], kind


def test_transfer_between_generations_beats_the_datasheet() -> None:
    tables = [DATA / f"{n}.csv" for n in ("gemm", "decode_attention", "prefill_attention")]
    found = transfer_errors(tables, ("h100-sxm", "b200-sxm"))
    assert {(t.kind, t.hardware) for t in found} >= {("gemm", "h100-sxm"), ("gemm", "b200-sxm")}
    for t in found:
        assert t.errors["mape"] < t.errors["roofline_mape"], t


def test_the_spread_of_a_transfer_is_what_the_worst_gpu_left_out_needs() -> None:
    """Rows observed at e^+-0.5 and e^+-0.3 of their prediction, with intervals of 0.1: what is
    missing, as squares, is root(0.25 - 0.01) and root(0.09 - 0.01).
    """
    shape = {n: np.full(60, v) for n, v in (("m", 64.0), ("n", 4096.0), ("k", 4096.0))}
    certain = Interval(float(np.exp(-0.1)), float(np.exp(0.1)))
    families = [
        replace(f, interval=certain, half_fits={})
        for f in shipped_families("gemm")
        if f.engine == "vllm" and f.variant == "bf16"
    ]

    def rows(gpu: str, off: float) -> Rows:
        device = load_hardware(gpu)
        family = family_without(gpu, "gemm", "vllm", device, variant="bf16", families=families)
        assert family is not None
        seconds = family.time_s(device, shape, cold=False)[1]
        either = np.exp(off * np.where(np.arange(60) % 2 == 0, 1.0, -1.0))
        key = FamilyKey("gemm", "bf16", gpu, "vllm", family.kernel)
        return Rows(key, shape, seconds * either, np.arange(60))

    worst, better = rows("h100-sxm", 0.5), rows("l40s", 0.3)
    assert generation_spread(families, [worst, better]) == pytest.approx(0.24**0.5)
    assert generation_spread(families, [better]) == pytest.approx(0.08**0.5)
    assert generation_spread(families, []) == GENERATION_SPREAD

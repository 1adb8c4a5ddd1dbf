"""Predictions know nothing of what was observed; a GPU left out is predicted by the others."""

import csv
from pathlib import Path

import numpy as np
import pytest

from costmodel.calibration.tables import read_table
from costmodel.calibration.transfer import transfer_errors
from costmodel.hardware import load_hardware
from costmodel.kernels.families import family_without, load_family

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


def test_transfer_between_generations_beats_the_datasheet() -> None:
    tables = [DATA / f"{n}.csv" for n in ("gemm", "decode_attention", "prefill_attention")]
    found = transfer_errors(tables, ("h100-sxm", "b200-sxm"))
    assert {(t.kind, t.hardware) for t in found} >= {("gemm", "h100-sxm"), ("gemm", "b200-sxm")}
    for t in found:
        assert t.errors["mape"] < t.errors["roofline_mape"], t

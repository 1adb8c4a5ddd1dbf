"""Whole-pass rooflines of Llama-3-8B against figures worked out by hand.

By hand, batch 1, 2,048 tokens: matmul parameters 6,979,321,856 (layers) + 525,336,576 (head);
prefill 2 * 6,979,321,856 * 2048 + 2 * 32 * 32 * 128 * 2048 * 2049 + 2 * 525,336,576 = 29.69
TFLOP; decode reads 2 * 7,504,924,672 bytes of weights and 2 * 32 * 8 * 128 * 2 * 2048 bytes of
cache = 15.28 GB.
"""

import csv
from pathlib import Path

import pytest

from costmodel.hardware import load_hardware
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Workload

TABLE = Path(__file__).parents[1] / "data/first_principles_llama3_8b.csv"
ROWS = list(csv.DictReader(TABLE.read_text("utf-8").splitlines()))


def same(value: float, text: str) -> bool:
    """Equal to the table's own rounding."""
    digits = len(text.partition(".")[2])
    return f"{value:.{digits}f}" == text


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda r: f"{r['gpu']}-{r['batch']}-{r['context_tokens']}"
)
def test_rooflines_reproduce_the_table(row: dict[str, str]) -> None:
    p = predict(
        load_architecture("llama-3-8b"),
        "full",
        Workload.of(int(row["batch"]), int(row["context_tokens"])),
        load_hardware(row["gpu"]),
        solve=False,
    )
    assert same(float(p["prefill_flops"]) / 1e12, row["prefill_tflop"])
    assert same(float(p["roofline_ttft_s"]), row["prefill_s"])
    assert same(float(p["decode_flops"]) / 1e9, row["decode_gflop"])
    assert same(float(p["decode_hbm_bytes"]) / 1e9, row["decode_gb"])
    assert same(float(p["roofline_tpot_s"]), row["decode_s"])
    digits = len(row["kv_gb"].replace("0.", ""))
    assert f"{float(p['state_bytes']) / 1e9:.{digits}g}" == f"{float(row['kv_gb']):.{digits}g}"


def test_first_row_by_hand() -> None:
    p = predict(
        load_architecture("llama-3-8b"),
        "full",
        Workload.of(1, 2048),
        load_hardware("h100-sxm"),
        solve=False,
    )
    assert float(p["prefill_flops"]) == (
        2 * 6_979_321_856 * 2048 + 2 * 32 * 32 * 128 * 2048 * 2049 + 2 * 525_336_576
    )
    weights = 2 * (6_979_321_856 + 525_336_576 + 32 * 2 * 4096 + 4096)
    assert float(p["decode_hbm_bytes"]) == weights + 131_072 * 2048 + 131_072

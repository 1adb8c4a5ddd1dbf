"""What every bundled profile, alias and price promises."""

import dataclasses
from importlib import resources

import pytest

from costmodel.hardware import HardwareProfile, gpu_names, load_hardware, normalised, resolve_gpu
from costmodel.prices import bundled_prices
from costmodel.tables import read_toml

FOLDER = resources.files("hardware_profiles")

#: The devices the project promises, by the name users type.
PROMISED = [
    "a10", "a100-pcie-40gb", "a100-pcie-80gb", "a100-sxm-40gb", "a100-sxm-80gb", "a10g",
    "a30", "a40", "apple-m2-ultra", "apple-m3-ultra", "apple-m4-max", "b200-sxm", "b300-sxm",
    "epyc-9654", "gaudi-2", "gaudi-3", "gb200", "gb300", "gh200", "h100-nvl", "h100-pcie",
    "h100-sxm", "h20-sxm", "h200-nvl", "h200-sxm", "h800-sxm", "l4", "l40s", "mi250x",
    "mi300x", "mi325x", "mi355x", "rtx-3090", "rtx-4090", "rtx-5090", "rtx-6000-ada",
    "rtx-a6000",
    "rtx-pro-6000", "t4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "v100-sxm-32gb", "xeon-8480plus",
]  # fmt: skip

#: Spellings found in drivers' output and in published measurement tables.
SPELLINGS = {
    "80GB (79.22GiB; A100 or H100 not stated)": "a100-sxm-80gb",
    "A100-80GB": "a100-sxm-80gb",
    "NVIDIA A100-SXM4-80GB": "a100-sxm-80gb",
    "NVIDIA A6000 48GB (1 GPU; per paper/predictor config, LMDeploy)": "rtx-a6000",
    "NVIDIA B200": "b200-sxm",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA L40S": "l40s",
    "T4 16GB + 208GB DRAM + 1.5TB SSD": "t4",
    "a100_80g": "a100-sxm-80gb",
    "a100_80g_330w": "a100-sxm-80gb",
    "a100_sxm": "a100-sxm-80gb",
    "a100x4": "a100-sxm-80gb",
    "a6000": "rtx-a6000",
    "b200": "b200-sxm",
    "b200_sxm": "b200-sxm",
    "b300_sxm": "b300-sxm",
    "gb200": "gb200",
    "h100_80g": "h100-sxm",
    "h100_sxm": "h100-sxm",
    "h200_sxm": "h200-sxm",
    "h800": "h800-sxm",
    "l40s": "l40s",
    "rtx3090": "rtx-3090",
    "H200-SXM-141GB": "h200-sxm",
    "V100-SXM2-32GB": "v100-sxm-32gb",
    "Xeon-8480+": "xeon-8480plus",
    "H100 SXM": "h100-sxm",
}

SOURCED = (
    "n_units",
    "hbm_bytes_per_s",
    "memory_bytes",
    "memory_marketing_bytes",
    "l2_bytes",
    "clock_hz",
    "tdp_w",
    "link_bytes_per_s",
    "host_link_bytes_per_s",
    "max_gpus_per_node",
)
CONFIDENCE = {
    "sourced", "reported", "derived", "conflicting", "recalled", "aggregator", "inferred",
    "example",
}  # fmt: skip


def test_all_promised_devices_are_there() -> None:
    assert gpu_names() == sorted(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_every_number_has_a_source_and_a_confidence(name: str) -> None:
    table = read_toml(FOLDER.joinpath(f"{name}.toml"))
    for kind in ("sources", "confidence"):
        notes = table[kind]
        for field in SOURCED:
            assert (field in notes) == (field in table), f"{kind}.{field}"
        assert notes["peak_flops_per_s"]
        known = set(SOURCED) | {"peak_flops_per_s"}
        known |= {f"peak_flops_per_s.{d}" for d in table["peak_flops_per_s"]}
        assert set(notes) <= known
        assert all(len(text) > 3 for text in notes.values())
    assert set(table["confidence"].values()) <= CONFIDENCE


@pytest.mark.parametrize("name", PROMISED)
def test_figures_are_dense_and_in_si_units(name: str) -> None:
    profile = load_hardware(name)
    peaks = profile.peak_flops_per_s
    assert profile.name == name
    # Dense tensor rates double when the element halves; a ratio of 4 is a sparse headline.
    if "bf16" in peaks and "fp16" in peaks:
        assert peaks["bf16"] == peaks["fp16"]
    for wide, narrow in (("tf32", "bf16"), ("bf16", "fp8")):
        if wide in peaks and narrow in peaks:
            assert peaks[narrow] <= 2.05 * peaks[wide]
    # Consumer Blackwell runs fp8 at half rate with fp32 accumulation, fp4 at the full one.
    assert peaks.get("fp4", 0.0) <= 4.01 * peaks.get("fp8", 1e18)
    assert 0.8 <= profile.memory_bytes / profile.memory_marketing_bytes <= 1.085
    assert 1e10 < profile.hbm_bytes_per_s < 1e13
    if profile.link_bytes_per_s is not None:
        assert profile.link_bytes_per_s <= 900e9  # one direction: NVLink 5 is the fastest here
    assert profile.is_cpu == (name in ("epyc-9654", "xeon-8480plus"))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_published_tables_resolve(spelling: str) -> None:
    assert resolve_gpu(spelling) == SPELLINGS[spelling]
    assert resolve_gpu(f"  {spelling.upper()} ") == SPELLINGS[spelling]


def test_aliases_name_bundled_profiles_once() -> None:
    table = read_toml(FOLDER.joinpath("aliases.toml"))
    assert set(table) == set(gpu_names())
    spellings = [normalised(s) for row in table.values() for s in row]
    assert len(spellings) == len(set(spellings))
    assert not set(spellings) & set(gpu_names())


def test_prices_are_ranges_with_source_and_date() -> None:
    prices = bundled_prices()
    assert set(prices) <= set(gpu_names())
    assert {"h100-sxm", "h200-sxm", "a100-sxm-80gb", "b200-sxm", "l40s", "mi300x"} <= set(prices)
    for price in prices.values():
        assert 0 < price.low <= price.mid <= price.high < 20
        assert price.date[:2] == "20"
        assert len(price.source) > 10


def test_the_readme_names_every_field() -> None:
    text = FOLDER.joinpath("README.md").read_text("utf-8")
    for field in dataclasses.fields(HardwareProfile):
        assert f"`{field.name}`" in text or f"`[{field.name}" in text, field.name

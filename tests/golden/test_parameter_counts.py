"""Parameters, cache and state of every bundled model against figures that do not come from
lccost."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from costmodel.architecture import Architecture
from costmodel.engines import load_engine
from costmodel.mixers.attention import Attention
from costmodel.mixers.mla import MLA
from costmodel.registry import load_architecture, model_names
from costmodel.workload import Point

DATA = Path(__file__).parents[1] / "data"


def table(name: str) -> list[dict[str, str]]:
    lines = (DATA / name).read_text("utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


ORACLE = table("architectures_oracle.csv")


def point(tokens: float, *, batch: float = 1.0, kv_dtype: str = "bf16") -> Point:
    return Point(
        batch=batch,
        prompt_tokens=np.float64(tokens),
        cached_tokens=np.float64(tokens),
        reserved_tokens=np.float64(tokens),
        dtype="bf16",
        kv_dtype=kv_dtype,
        level="ideal",
        engine=load_engine("lccost"),
    )


def state(architecture: Architecture, at: Point, *, has_kv: bool) -> float:
    groups = [g for g in architecture.mixer_groups if g.mixer.HAS_KV is has_kv]
    return float(sum(g.n_layers * g.mixer.state_bytes(at) for g in groups))


def test_the_table_has_every_bundled_model() -> None:
    assert sorted(row["model"] for row in ORACLE) == model_names()


@pytest.mark.parametrize("row", ORACLE, ids=lambda r: r["model"])
def test_parameters_are_exact(row: dict[str, str]) -> None:
    a = load_architecture(row["model"])
    assert a.n_parameters == int(row["n_parameters"])
    if row["n_active_parameters"]:
        assert a.n_active_parameters == int(row["n_active_parameters"])


@pytest.mark.parametrize("row", ORACLE, ids=lambda r: r["model"])
def test_cache_windows_and_fixed_state_are_exact(row: dict[str, str]) -> None:
    a = load_architecture(row["model"])
    assert state(a, point(1), has_kv=False) == float(row["fixed_state_bytes"])
    if not row["kv_elements_per_token"]:
        return
    index = int(row["index_elements_per_token"])
    unbounded = [g for g in a.mixer_groups if g.mixer.max_kv_tokens() is None]
    bounded = [g for g in a.mixer_groups if g.mixer.max_kv_tokens() is not None]
    elements = sum(g.n_layers * g.mixer.kv_elements_per_token() for g in unbounded)
    assert elements == int(row["kv_elements_per_token"]) + index
    windowed = sum(g.n_layers * g.mixer.kv_elements_per_token() for g in bounded)
    assert windowed == int(row["window_elements_per_token"])
    if row["window_tokens"] and windowed:
        assert {g.mixer.max_kv_tokens() for g in bounded} == {int(row["window_tokens"])}
    # the same, as bytes of a real cache: 2 bytes an element, windows full at 1m tokens
    full_windows = windowed * int(row["window_tokens"] or 0)
    expected = 2.0 * (elements * 2**20 + full_windows)
    assert state(a, point(2**20), has_kv=True) == expected


@pytest.mark.parametrize("row", table("kv_at_32k.csv"), ids=lambda r: r["model"])
def test_cache_at_32k_tokens(row: dict[str, str]) -> None:
    a = load_architecture(row["model"])
    assert state(a, point(32768), has_kv=True) == float(row["kv_mib"]) * 2**20
    assert state(a, point(32768), has_kv=False) == float(row["fixed_state_bytes"])


# Where the digest has no figure, by hand ---------------------------------------------------------


def test_glm_45_air_active_parameters() -> None:
    """45 expert layers (46 less one dense), each 128 experts of 3 * 4096 * 1408, of which a token
    visits 8."""
    expert = 3 * 4096 * 1408
    assert load_architecture("glm-4.5-air").n_active_parameters == (
        106_851_586_048 - 45 * (128 - 8) * expert
    )


def test_gemma4_cache_by_hand() -> None:
    """5 full layers: 2 KV heads of 512, K and V kept although V is K's projection; 25 sliding
    layers: 8 KV heads of 256 with a window of 1024.
    """
    a = load_architecture("gemma-4-26b-a4b")
    kinds = [
        (m.n_kv_heads, m.head_dim, m.k_eq_v, m.window_tokens, g.n_layers)
        for g in a.mixer_groups
        if isinstance(m := g.mixer, Attention)
    ]
    assert sorted(kinds) == [(2, 512, True, None, 5), (8, 256, False, 1024, 25)]
    per_token = 5 * 2 * 2 * 512 * 2  # 20,480 bytes
    windows = 25 * 2 * 8 * 256 * 2 * 1024
    assert state(a, point(100_000), has_kv=True) == per_token * 100_000 + windows


def test_deepseek_v4_flash_state_by_hand() -> None:
    """At T = 100,003 tokens, bf16: 43 layers with a window of 128 vectors of 512 (K = V, kept
    once). 20 layers with m = 128 keep 781 entries and 35 tokens of two buffered projections. 21
    layers with m = 4 keep 25,000 entries of 512 + 128, 3 tokens of two projections of 2 (512 +
    128), and an overlap of 4 tokens of two vectors of 512 + 128. 2 layers have the window only.
    """
    a = load_architecture("deepseek-v4-flash")
    kinds = {g.mixer.ratio: g.n_layers for g in a.mixer_groups}  # type: ignore[attr-defined]
    assert kinds == {0: 2, 4: 21, 128: 20}
    window = 43 * 128 * 512
    heavy = 20 * (781 * 512 + 35 * 2 * 512)
    sparse = 21 * (25_000 * 640 + 3 * 2 * 2 * 640 + 2 * 4 * 640)
    assert state(a, point(100_003), has_kv=True) == 2 * (window + heavy + sparse)


def test_deepseek_v4_pro_grows_by_this_much_per_token() -> None:
    """30 sparse layers: 640 / 4 elements, 31 heavy ones: 512 / 128; between two multiples of
    128."""
    a = load_architecture("deepseek-v4-pro")
    growth = state(a, point(128_000 + 128), has_kv=True) - state(a, point(128_000), has_kv=True)
    assert growth == 2 * 128 * (30 * 160 + 31 * 4)


def test_rwkv5_world_7b_by_hand() -> None:
    """Per layer: time mixing 5 * 4096^2 + 4 mixes + decay and bonus of 4096 + group norm 2 * 4096;
    channel mixing 2 * 4096 * 14336 + 4096^2 + 2 mixes; two layer norms. Published: 7.52 B.
    """
    d, f = 4096, 14336
    layer = (5 * d * d + 4 * d + 2 * d + 2 * d) + (2 * d * f + d * d + 2 * d) + 4 * d
    total = 2 * 65536 * d + 32 * layer + 2 * d + 2 * d
    assert total == 7_518_044_160
    a = load_architecture("rwkv-5-world-7b")
    assert a.n_parameters == total
    # 64 heads of 64 x 64 in fp32 and two shift vectors in bf16, 32 layers
    assert state(a, point(1), has_kv=False) == 32 * (64 * 64 * 64 * 4 + 2 * 4096 * 2)


def test_fp8_latents_have_the_published_formats() -> None:
    """FlashMLA: 512 fp8 + 4 fp32 scales + 64 bf16 = 656 bytes; index keys 128 fp8 + one fp32 scale
    = 132."""
    a = load_architecture("deepseek-v3.2")
    assert state(a, point(1000, kv_dtype="fp8"), has_kv=True) == 61 * 1000 * (656 + 132)
    mixer = a.mixer_groups[0].mixer
    assert isinstance(mixer, MLA)
    assert mixer.latent_bytes(point(1, kv_dtype="fp8")) == 656
    assert mixer.index_bytes(point(1, kv_dtype="fp8")) == 132


def test_every_bundled_file_is_valid_json_with_its_provenance() -> None:
    folder = Path(__file__).parents[2] / "costmodel" / "architectures"
    for name in model_names():
        config = json.loads((folder / f"{name}.json").read_text("utf-8"))
        assert config["model_type"]
        assert config["architectures"]
        assert config["torch_dtype"] in ("bfloat16", "float16", "float32")
        assert config["_lccost"]["source"]

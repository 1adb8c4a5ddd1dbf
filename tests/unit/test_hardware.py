"""Profiles by name and by path: facts against published figures, and what broken files get."""

import os
import threading
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import costmodel.hardware as hardware_module
from costmodel.errors import ConfigError, UnknownNameError
from costmodel.hardware import Curve, load_hardware, profile_from_table, resolve_gpu
from costmodel.prices import read_prices
from costmodel.tables import MAX_FILE_BYTES, parse_toml

MINIMAL = """
name = "mine"
generation = "hopper"
hbm_bytes_per_s = 3.35e12
memory_bytes = 80e9
[peak_flops_per_s]
bf16 = 989e12
"""


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_h200_holds_what_nvidia_smi_reports() -> None:
    # nvidia-smi: 143771MiB; 143,771 * 1,048,576 = 150,754,820,096
    assert load_hardware("h200-sxm").memory_bytes == 150_754_820_096


@pytest.mark.parametrize(
    "name", ["a100-sxm-80gb", "a100-pcie-80gb", "h100-sxm", "h100-pcie", "h800-sxm"]
)
def test_80_gb_cards_hold_about_79_gib(name: str) -> None:
    assert load_hardware(name).memory_bytes / 2**30 == pytest.approx(79.2, abs=0.15)


def test_h100_ridge_point_and_links() -> None:
    h100 = load_hardware("h100-sxm")
    assert h100.ridge_flops_per_byte("bf16") == pytest.approx(295.3, abs=0.1)  # 989.4 / 3.35
    assert h100.link_bytes_per_s == 450e9  # NVLink 4: 900 GB/s in both directions together
    assert h100.host_link_bytes_per_s == 64e9  # PCI Express 5.0 x16
    assert (h100.n_units, h100.l2_bytes) == (132, 50 * 2**20)


def test_known_traps_are_avoided() -> None:
    assert load_hardware("b300-sxm").peak("int8") == 153.5e12  # INT8 was cut
    assert load_hardware("l40s").peak("fp8") == 733e12  # 1,466 is with sparsity
    assert load_hardware("mi300x").peak("fp16") == pytest.approx(1307.4e12)  # 2,615 is sparse
    assert load_hardware("a10g").peak("fp16") == 70e12  # not the A10's 125
    assert load_hardware("mi250x").hbm_bytes_per_s == pytest.approx(1.6385e12)  # one of two dies


def test_a_missing_dtype_is_an_error_that_helps() -> None:
    with pytest.raises(ConfigError, match=r"t4 has no bf16 peak.*--dtype fp16"):
        load_hardware("t4").peak("bf16")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("H100", {"h100-sxm", "h100-pcie", "h100-nvl"}),
        ("A100", {"a100-sxm-80gb", "a100-sxm-40gb", "a100-pcie-80gb", "a100-pcie-40gb"}),
        ("h100-sxn", {"h100-sxm"}),
        ("mi300", {"mi300x"}),
    ],
)
def test_unknown_names_list_their_family(typed: str, expected: set[str]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_hardware(typed)
    assert expected <= set(caught.value.near)
    assert "lccost gpus list" in str(caught.value)


@pytest.mark.parametrize("name", ["aliases", "prices-2026-11", "README", "", "..", "h100\0sxm"])
def test_other_files_of_the_folder_are_no_gpus(name: str) -> None:
    with pytest.raises(UnknownNameError):
        resolve_gpu(name)


def test_one_name_reads_one_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = hardware_module.read_toml

    def recording(path: Path) -> dict[str, object]:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(hardware_module, "read_toml", recording)
    load_hardware("h100-sxm")
    assert read == ["h100-sxm.toml"]


def test_a_users_file_works_by_path(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    for spelled in (path, str(path)):
        profile = load_hardware(spelled)
        assert (profile.name, profile.title, profile.memory_marketing_bytes) == (
            "mine",
            "mine",
            80e9,
        )
        assert profile.peak("bf16") == 989e12
        assert profile.link_bytes_per_s is None
        assert profile.price_usd_per_hour is None


def test_calibrated_profiles_bring_curves_and_families(tmp_path: Path) -> None:
    text = (
        MINIMAL
        + """
[curves.gemm_flops]
x = [1e6, 1e9]
y = [2e-12, 1e-12]
spread = 0.05
[families.decode_attention]
t0_s = 11e-6
bandwidth_fraction = 0.8
[calibration]
date = 2026-11-21
rows = 680
source = "measured"
"""
    )
    profile = load_hardware(write(tmp_path, text))
    assert profile.curves == {"gemm_flops": Curve(x=(1e6, 1e9), y=(2e-12, 1e-12), spread=0.05)}
    assert profile.families == {"decode_attention": {"t0_s": 11e-6, "bandwidth_fraction": 0.8}}
    assert profile.calibration == {"date": "2026-11-21", "rows": "680", "source": "measured"}


def test_all_bad_fields_are_reported_at_once_with_the_file(tmp_path: Path) -> None:
    text = """
name = "mine"
generation = 5
hbm_bytes_per_s = 3350
memory_bytes = -80e9
n_units = 132.5
tdp_w = true
l2_byte = 5e7
[peak_flops_per_s]
bf16 = 989
fp17 = 1e12
[curves.gemm]
x = [2.0, 1.0]
y = [1.0, 1.0]
[families.decode]
t0_s = "fast"
"""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_hardware(path)
    message = str(caught.value)
    assert str(path) in message
    for key in (
        "generation", "hbm_bytes_per_s", "memory_bytes", "n_units", "tdp_w", "l2_byte",
        "peak_flops_per_s.bf16", "peak_flops_per_s.fp17", "curves.gemm.x", "families.decode.t0_s",
    ):  # fmt: skip
        assert f"  {key}: " in message, key
    assert "not 3350 GB/s" in message
    assert "did you mean l2_bytes?" in message


def test_kilowatts_are_no_watts(tmp_path: Path) -> None:
    text = MINIMAL.replace("[peak_flops_per_s]", "tdp_w = 0.7\n[peak_flops_per_s]")
    assert text != MINIMAL
    with pytest.raises(ConfigError, match=r"tdp_w: expected watts \(700, not 0\.7 kW\)"):
        load_hardware(write(tmp_path, text))


def test_a_generation_compares_without_case(tmp_path: Path) -> None:
    profile = load_hardware(write(tmp_path, MINIMAL.replace('"hopper"', '"Hopper "')))
    assert profile.generation == "hopper"


@pytest.mark.parametrize("key", ["name", "generation", "hbm_bytes_per_s", "memory_bytes"])
def test_missing_keys_are_named(tmp_path: Path, key: str) -> None:
    text = "\n".join(line for line in MINIMAL.splitlines() if not line.startswith(key))
    with pytest.raises(ConfigError, match=rf"{key}: missing"):
        load_hardware(write(tmp_path, text))


@pytest.mark.parametrize(
    "raw",
    [
        b"name = \xff\xfe",
        b"[[[[",
        b"a = " + b"[" * 20000,
        b"a = 1" + b"0" * 5000,
        b"a = inf\nhbm_bytes_per_s = nan",
        b"\x00" * 100,
        b'name = "x"\nname = "y"',
        b"#" * (MAX_FILE_BYTES + 1),
    ],
    ids=["not-utf8", "broken", "deep", "huge-integer", "inf", "binary", "twice", "large"],
)
def test_hostile_files_get_a_clear_error(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load_hardware(path)


def test_folders_and_missing_files_and_pipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found a folder"):
        load_hardware(tmp_path)
    with pytest.raises(ConfigError, match="no such profile file"):
        load_hardware(tmp_path / "absent.toml")
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)
    outcome: list[str] = []

    def load() -> None:
        try:
            load_hardware(pipe)
        except ConfigError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=load, daemon=True)  # a pipe without a writer would block
    thread.start()
    thread.join(5)
    assert outcome


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400)
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(["x", "y", "bf16", "date"]), SCALARS, max_size=3),
)
KEYS = [
    "name", "generation", "hbm_bytes_per_s", "memory_bytes", "peak_flops_per_s", "n_units",
    "sources",
    "curves", "families", "calibration", "notes", "price_usd_per_hour", "is_cpu", "other",
]  # fmt: skip
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_any_table_is_a_profile_or_one_config_error(table: dict[str, object]) -> None:
    good = tomllib.loads(MINIMAL)
    assert profile_from_table(good, "generated").name == "mine"
    try:
        profile = profile_from_table({**good, **table}, "generated")
    except ConfigError as error:
        message = str(error)
    else:
        message = "generated" if profile.hbm_bytes_per_s >= 1e8 else "accepted a bad bandwidth"
    assert message.startswith("generated")


@QUICK
@given(st.binary(max_size=60))
def test_any_bytes_parse_or_give_a_config_error(raw: bytes) -> None:
    try:
        outcome = f"generated {parse_toml(raw, 'generated')}"
    except ConfigError as error:
        outcome = str(error)
    assert outcome.startswith("generated")


# Prices --------------------------------------------------------------------------------------


def test_bundled_prices_come_with_the_profile() -> None:
    h100 = load_hardware("h100-sxm")
    assert h100.price_usd_per_hour == (1.99, 2.95, 12.29)
    assert h100.price_date == "2026-05"
    assert "mercatus" in h100.price_source
    assert load_hardware("gaudi-3").price_usd_per_hour is None


def test_a_users_prices_go_first_and_take_aliases(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'date = "2026-10-01"\nH100_80g = 2.49\nmine = 3\n'
        "l40s = { low = 0.8, mid = 1.0, high = 1.8 }\n",
        "prices.toml",
    )
    assert load_hardware("h100-sxm", prices=path).price_usd_per_hour == (2.49, 2.49, 2.49)
    l40s = load_hardware("l40s", prices=path)
    assert (l40s.price_usd_per_hour, l40s.price_date) == ((0.8, 1.0, 1.8), "2026-10-01")
    assert load_hardware("a40", prices=path).price_usd_per_hour == (0.864, 1.03, 1.224)
    own = write(tmp_path, MINIMAL)
    assert load_hardware(own, prices=path).price_usd_per_hour == (3.0, 3.0, 3.0)


def test_a_profile_may_bring_its_own_price(tmp_path: Path) -> None:
    text = MINIMAL.replace("[peak", "price_usd_per_hour = [1, 2, 3]\n[peak").replace(
        "mine", "h100-sxm"
    )
    assert load_hardware(write(tmp_path, text)).price_usd_per_hour == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("h100-sxm = -1", "h100-sxm"),
        ('h100-sxm = "cheap"', "h100-sxm"),
        ("h100-sxm = 30000", "h100-sxm"),
        ("h100-sxm = { low = 3, mid = 2, high = 4 }", "h100-sxm.mid"),
        ("h100-sxm = { low = 3 }", "h100-sxm.high"),
        ("h100-sxm = { low = 1, mid = 2, high = 3, usd = 4 }", "h100-sxm.usd"),
        ('date = "last week"\nh100-sxm = 2', "date"),
    ],
)
def test_bad_prices_are_named(tmp_path: Path, text: str, key: str) -> None:
    path = write(tmp_path, text, "prices.toml")
    with pytest.raises(ConfigError, match=rf"prices\.toml:(.|\n)*{key}: "):
        read_prices(path)


@pytest.mark.parametrize("name", ["g" * 5000 + ".toml", "~no-such-user-here/x.toml", "a\0/b.toml"])
def test_paths_that_cannot_exist(name: str) -> None:
    with pytest.raises(ConfigError, match="no such profile file") as caught:
        load_hardware(name)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("curve", ["gemm/bf16/n=abc", "gemm/bf16/n=0", "gemm/bf16/n=nan", "gemm//"])
def test_names_of_curves_are_checked(tmp_path: Path, curve: str) -> None:
    path = write(tmp_path, MINIMAL + f'\n[curves."{curve}"]\nx = [1.0]\ny = [1e-12]\n')
    with pytest.raises(ConfigError, match="expected parameter=number"):
        load_hardware(path)


def test_a_name_is_one_printable_line(tmp_path: Path) -> None:
    text = MINIMAL.replace('name = "mine"', 'name = "mine\\u001b[31m\\n"')
    assert text != MINIMAL
    with pytest.raises(ConfigError, match="printable"):
        load_hardware(write(tmp_path, text))

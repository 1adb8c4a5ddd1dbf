"""Tables of measurements: read safely, recognised, predicted from their shape columns alone."""

import csv
import lzma
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from costmodel.errors import ConfigError, UnknownNameError
from costmodel.hardware import load_hardware, resolve_gpu
from costmodel.validation import validate
from costmodel.validation.devices import Devices
from costmodel.validation.kinds import KINDS, Options, infer_kind, kind_named
from costmodel.validation.result import figures
from costmodel.validation.run import predict_rows
from costmodel.validation.table import read_table

MEASURED = Path(__file__).parents[1] / "data" / "measured"
NAMES = sorted({p.name.split(".")[0] for p in MEASURED.glob("*.csv*")})
GEMM_HEADER = "hw,framework,kernel,dtype,m,n,k,latency_us"
GEMM_ROW = "h100_sxm,vllm,torch.nn.functional.linear,bfloat16,4096,4096,4096,220.0"


def measured(name: str, folder: Path) -> Path:
    path = MEASURED / f"{name}.csv"
    if path.is_file():
        return path
    packed = MEASURED / f"{name}.csv.xz"
    out = folder / f"{name}.csv"
    out.write_bytes(lzma.decompress(packed.read_bytes()))
    return out


def table(folder: Path, *lines: str) -> Path:
    path = folder / "t.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_predictions_do_not_see_what_was_observed(name: str, tmp_path: Path) -> None:
    """Permuting the observed columns, or taking them away, changes no prediction."""
    read = read_table(measured(name, tmp_path))
    kind = infer_kind(read)
    options = Options(kind=kind.name)
    observed = [c for c in kind.observed if c in read.columns]
    order = list(range(len(read.records)))
    random.Random(1).shuffle(order)
    permuted = [
        {**r, **{c: read.records[j][c] for c in observed}}
        for r, j in zip(read.records, order, strict=True)
    ]
    removed = [{c: v for c, v in r.items() if c not in observed} for r in read.records]
    expected = predict_rows(read.records, kind, options)
    for records in (permuted, removed):
        out = predict_rows(records, kind, options)
        assert [b.group for b in out.blocks] == [b.group for b in expected.blocks]
        for ours, theirs in zip(out.blocks, expected.blocks, strict=True):
            np.testing.assert_array_equal(ours.mid, theirs.mid)
            np.testing.assert_array_equal(ours.rows, theirs.rows)
        assert out.unsupported == expected.unsupported


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_counted(name: str, tmp_path: Path) -> None:
    """Predicted, unsupported with a reason, or both metrics of one row: nothing is dropped."""
    read = read_table(measured(name, tmp_path))
    kind = infer_kind(read)
    out = predict_rows(read.records, kind, Options(kind=kind.name))
    predicted = {int(i) for b in out.blocks for i in b.rows}
    left_out = {i for i, _ in out.unsupported}
    assert predicted | left_out == set(range(len(read.records)))
    assert not predicted & left_out
    assert all(reason for _, reason in out.unsupported)
    for block in out.blocks:
        assert np.all(np.isfinite(block.mid))
        assert np.all(block.mid > 0)
        known = np.isfinite(block.low)
        assert np.all(block.low[known] <= block.mid[known])
        assert np.all(block.high[known] >= block.mid[known])


def test_kinds_are_told_apart_by_op(tmp_path: Path) -> None:
    header = "op,hw,framework,kernel,kv_dtype,batch,q_len,kv_len,Hq,Hkv,D,window,latency_us"
    decode = "decode_attn,h100_sxm,vllm,fa3,bfloat16,1,1,4096,32,8,128,0,25"
    prefill = "prefill_attn,h100_sxm,vllm,fa3,bfloat16,1,4096,4096,32,8,128,0,450"
    path = table(tmp_path, header, decode, prefill, prefill)
    result = validate(path)
    assert result.kind == "prefill_attention"
    assert result.overall.n == 2
    ((reason, n),) = result.unsupported
    assert n == 1
    assert "decode_attn" in reason
    assert validate(path, kind="decode_attention").overall.n == 1


def test_a_column_that_is_missing_is_named(tmp_path: Path) -> None:
    path = table(tmp_path, "hw,dtype,m,n,latency_us", "h100_sxm,bfloat16,1,2,3")
    with pytest.raises(ConfigError, match=r"gemm, which lacks: k\b"):
        validate(path)
    with pytest.raises(ConfigError, match=r"kind gemm needs the columns k\b"):
        validate(path, kind="gemm")


def test_a_table_without_observed_values_says_so(tmp_path: Path) -> None:
    path = table(tmp_path, "hw,dtype,m,n,k", "h100_sxm,bfloat16,1,2,3")
    with pytest.raises(ConfigError, match="latency_us"):
        validate(path)


def test_an_unknown_kind_gets_a_hint() -> None:
    with pytest.raises(UnknownNameError, match="decode_attention"):
        kind_named("decode_atention")


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_another_unit_is_an_error(factor: float, tmp_path: Path) -> None:
    """Milliseconds or nanoseconds in latency_us."""
    rows = [
        f"h100_sxm,vllm,linear,bfloat16,{m},4096,4096,{t * factor}"
        for m, t in ((1, 15), (64, 16), (4096, 220))
    ]
    with pytest.raises(ConfigError, match="unit"):
        validate(table(tmp_path, GEMM_HEADER, *rows))


def test_rows_that_cannot_be_modelled_are_counted_with_the_reason(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        GEMM_HEADER,
        GEMM_ROW,
        GEMM_ROW.replace("h100_sxm", "abacus-9000"),
        GEMM_ROW.replace("bfloat16", "ternary"),
        GEMM_ROW.replace("220.0", "-1"),
        GEMM_ROW.replace("220.0", ""),
        GEMM_ROW.replace("220.0", "nan"),
        GEMM_ROW.replace(",4096,4096,4096", ",0,4096,4096"),
        GEMM_ROW.replace("220.0", "60.0"),  # 2.3 PFLOP/s
        GEMM_ROW + ",surplus",
    )
    result = validate(path)
    assert result.overall.n == 2
    reasons = dict(result.unsupported)
    assert sum(reasons.values()) == 7
    for words in ("abacus-9000", "ternary", "no positive number", "at least 1", "more cells"):
        assert any(words in reason for reason in reasons), words
    # 2.1 TFLOP on a peak of 0.99 PFLOP/s needs 139 us: counted like any other, and apart.
    assert result.parts["without_impossible_rows"].n == 1


@pytest.mark.parametrize("name", ["linear_attention", "latency_throughput"])
def test_what_counts_does_not_depend_on_what_was_observed(name: str, tmp_path: Path) -> None:
    """With the observed values of other rows, the same rows count and the same are left out."""
    source = measured(name, tmp_path)
    read = read_table(source)
    observed = [c for c in infer_kind(read).observed if c in read.columns]
    columns = sorted(read.columns)
    order = list(range(len(read.records)))
    random.Random(2).shuffle(order)
    shuffled = tmp_path / "shuffled.csv"
    with shuffled.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row, j in zip(read.records, order, strict=True):
            writer.writerow({**row, **{c: read.records[j][c] for c in observed}})
    before, after = validate(source), validate(shuffled)
    assert before.overall.n == after.overall.n
    assert before.unsupported == after.unsupported
    assert [g for g, _, _ in before.groups] == [g for g, _, _ in after.groups]


def test_types_without_rows_are_priced_by_the_prior(tmp_path: Path) -> None:
    result = validate(table(tmp_path, GEMM_HEADER, GEMM_ROW.replace("bfloat16", "int4_wo")))
    ((_, _, basis),) = result.groups
    assert basis == "prior"
    assert result.overall.n == 1


def test_the_datasheet_baseline_is_the_roofline(tmp_path: Path) -> None:
    # 2 * 4096^3 FLOP / 989e12 per second = 138.97 us, 36.8 % below 220 us
    result = validate(table(tmp_path, GEMM_HEADER, GEMM_ROW), baseline="datasheet")
    assert result.overall.mape_percent == pytest.approx(36.83, abs=0.01)
    assert result.overall.bias_percent == pytest.approx(-36.83, abs=0.01)
    assert result.overall.coverage_percent is None
    assert result.groups[0][2] == "datasheet"


def test_figures_by_hand() -> None:
    # errors +10, -20, +30, 0 % with intervals of 0.9 to 1.15 around the prediction
    observed = np.array([1.0, 1.0, 1.0, 1.0])
    mid = np.array([1.1, 0.8, 1.3, 1.0])
    f = figures(0.9 * mid, mid, 1.15 * mid, observed)
    assert f.n == 4
    assert f.mape_percent == pytest.approx(15.0)
    assert f.median_percent == pytest.approx(15.0)
    assert f.p90_percent == pytest.approx(27.0)  # between 20 and 30, seven tenths of the way
    assert f.bias_percent == pytest.approx(5.0)
    assert f.coverage_percent == pytest.approx(50.0)  # 0.99..1.265 and 0.9..1.15 hold 1
    assert f.interval_width_percent == pytest.approx(25.0)


def test_figures_of_nothing_are_unknown() -> None:
    none = np.empty(0)
    f = figures(none, none, none, none)
    assert (f.n, f.mape_percent, f.coverage_percent) == (0, None, None)


def test_spellings_of_hardware_make_one_group(tmp_path: Path) -> None:
    other = GEMM_ROW.replace("h100_sxm", "NVIDIA H100 80GB HBM3").replace("vllm", "VLLM")
    result = validate(table(tmp_path, GEMM_HEADER, GEMM_ROW, other))
    ((group, f, basis),) = result.groups
    assert (group["hw"], group["framework"], f.n, basis) == ("h100-sxm", "vllm", 2, "calibrated")


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "column names"),
        (b"\n\n\n", "column names"),
        (b"a,b,a\n1,2,3\n", "named twice"),
        (b"a,b\n", "no rows"),
        (b"\xff\xfe\x00\x01" * 50, "UTF-8"),
        (b"a,b\n" + b"x" * 200_000 + b",1\n", "field larger"),
        (b'{"json": true}\n{"json": false}\n', "no known table"),
    ],
)
def test_hostile_files_get_one_clear_error(raw: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.csv"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=match):
        validate(path)


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    for path, match in ((tmp_path, "folder"), (Path("/dev/zero"), "no regular file"),
                        (tmp_path / "absent", "cannot be read")):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            validate(path)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cells=st.lists(
        st.one_of(
            st.text(st.characters(exclude_characters='\r\n",', exclude_categories=["Cs"])),
            st.floats().map(str),
            st.integers().map(str),
        ),
        min_size=8,
        max_size=8,
    )
)
def test_no_row_breaks_a_validation(cells: list[str], tmp_path: Path) -> None:
    """Whatever a row holds, it is predicted, counted, or the table is refused."""
    path = tmp_path / "any.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([GEMM_HEADER.split(","), GEMM_ROW.split(","), cells])
    try:
        result = validate(path)
    except ConfigError:
        return
    counted = result.overall.n + sum(n for _, n in result.unsupported)
    assert counted in (1, 2)  # a row of blank cells is no row


def test_every_kind_is_served_by_a_module_with_both_functions() -> None:
    for kind in KINDS.values():
        module = kind.load()
        assert callable(module.predict)
        assert callable(module.observed)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_and_a_byte_order_mark_are_read(separator: str, tmp_path: Path) -> None:
    text = "\n".join([GEMM_HEADER, GEMM_ROW]).replace(",", separator)
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8-sig")
    assert validate(path).overall.n == 1


@pytest.mark.parametrize(
    ("gpu", "basis"),
    [
        ("NVIDIA H200", "transferred"),
        ("h20", "transferred"),
        ("L4", "transferred"),
        ("NVIDIA GeForce RTX 4090", "transferred"),
        ("gb300", "transferred"),
        ("AMD Instinct MI300X", "prior"),
        ("h100", "calibrated"),
    ],
)
def test_gpus_without_rows_are_predicted_and_say_so(gpu: str, basis: str, tmp_path: Path) -> None:
    """No fit saw these GPUs: a sibling's family scaled by the datasheet, or the prior."""
    peak = load_hardware(resolve_gpu("h100-sxm" if gpu == "h100" else gpu)).peak("bf16")
    row = GEMM_ROW.replace("h100_sxm", gpu).replace("220.0", f"{2e6 * 4096**3 / peak / 0.6:.1f}")
    result = validate(table(tmp_path, GEMM_HEADER, row))
    ((_, figures_of, found),) = result.groups
    assert found == basis
    assert figures_of.mape_percent is not None
    assert figures_of.mape_percent < 60.0


def test_engines_and_kernels_nobody_heard_of_are_predicted(tmp_path: Path) -> None:
    row = GEMM_ROW.replace("vllm", "engine-9").replace("torch.nn.functional.linear", "warp_gemm")
    ((_, _, basis),) = validate(table(tmp_path, GEMM_HEADER, row)).groups
    assert basis == "transferred"


@pytest.mark.parametrize("kind", ["decode_attention", "mla", "moe", "collectives",
                                  "sparse_attention", "linear_attention"])  # fmt: skip
def test_another_makers_gpu_is_priced_by_the_prior(kind: str, tmp_path: Path) -> None:
    read = read_table(measured(kind, tmp_path))
    records = [{**r, "hw": "mi300x", "device": "mi300x"} for r in read.records[:60]]
    out = predict_rows(records, kind_named(kind), Options(kind=kind))
    assert {b.basis for b in out.blocks} == {"prior"}
    assert not out.unsupported
    for block in out.blocks:
        assert np.all((block.low <= block.mid) & (block.mid <= block.high))


#: What a cell may hold in a file that was not made for this program.
HOSTILE = ("", "0", "-1", "nan", "inf", "1e300", "1e-320", "abc" * 40, "\x00", "1.5", "½",
           "power_law_200", "999999999999")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_cell_breaks_a_kind(name: str, tmp_path: Path) -> None:
    """Every column of a published row with every hostile value: predicted, or said why not."""
    read = read_table(measured(name, tmp_path))
    kind = infer_kind(read)
    row = read.records[len(read.records) // 2]
    records = [{**row, column: cell} for column in row for cell in HOSTILE]
    out = predict_rows(records, kind, Options(kind=kind.name))
    known = {int(i) for b in out.blocks for i in b.rows} | {i for i, _ in out.unsupported}
    assert known == set(range(len(records)))
    for block in out.blocks:
        assert np.all((block.mid > 0) & np.isfinite(block.mid)), block.group


@pytest.mark.parametrize(
    ("kind", "changes", "basis"),
    [
        ("gemm", {"dtype": "torch.float8_e4m3fn"}, {"calibrated", "transferred"}),
        ("gemm", {"dtype": "W4A16"}, {"prior"}),
        ("gemm", {"dtype": "float32"}, {"prior"}),
        ("moe", {"moe_dtype": "float16"}, {"calibrated", "transferred"}),
        ("moe", {"moe_dtype": "w4afp8"}, {"prior"}),
        ("moe", {"distribution": "uniform"}, {"calibrated", "transferred"}),
        ("decode_attention", {"kv_dtype": "auto"}, {"calibrated"}),
        ("decode_attention", {"kv_dtype": "nvfp4"}, {"prior"}),
        ("prefill_attention", {"kv_dtype": "int8"}, {"prior"}),
        ("mla", {"kv_cache_dtype": "int8"}, {"prior"}),
        ("collectives", {"op_name": "reduce_scatter"}, {"transferred"}),
        ("collectives", {"allreduce_dtype": "BF16"}, {"calibrated"}),
    ],
)
def test_types_and_operations_without_rows_are_predicted_and_say_so(
    kind: str, changes: dict[str, str], basis: set[str], tmp_path: Path
) -> None:
    read = read_table(measured(kind, tmp_path))
    records = [{**r, **changes} for r in read.records[:40]]
    out = predict_rows(records, kind_named(kind), Options(kind=kind))
    assert not out.unsupported
    assert {b.basis for b in out.blocks} <= basis
    for block in out.blocks:
        assert np.all((block.low <= block.mid) & (block.mid <= block.high))


@pytest.mark.parametrize(
    ("spelling", "gpu"),
    [
        ("NVIDIA H200 141GB HBM3e", "h200-sxm"),
        ("NVIDIA GB200 NVL72", "gb200"),
        ("8xH100", "h100-sxm"),
        ("H100 PCIe 80GB", "h100-pcie"),
        ("NVIDIA B300 SXM6 AC", "b300-sxm"),
        ("2 x RTX 4090 24GB", "rtx-4090"),
        ("NVIDIA RTX A6000 (48 GB)", "rtx-a6000"),
        ("RTX 6000 Ada 48GB", "rtx-6000-ada"),
        ("AMD Instinct MI300X VF", "mi300x"),
        ("A100 40GB", "a100-sxm-40gb"),
        ("NVIDIA L4 24GB", "l4"),
    ],
)
def test_gpus_with_remarks_are_known(spelling: str, gpu: str) -> None:
    assert Devices(None).name({"hw": spelling}) == gpu


@pytest.mark.parametrize("spelling", ["NVIDIA L40", "RTX 4000 Ada", "RTX 3090 Ti", "H1000", ""])
def test_other_gpus_are_not_taken_for_one_that_is_known(spelling: str) -> None:
    with pytest.raises(ConfigError, match="no profile of the GPU"):
        Devices(None).name({"hw": spelling})


def test_the_column_that_says_more_decides() -> None:
    assert Devices(None).name({"hw": "h100", "device": "NVIDIA H100 PCIe"}) == "h100-pcie"

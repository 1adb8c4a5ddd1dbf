"""The roofline draws the numbers it was given, with units, and labels that can be read."""

import json
from pathlib import Path

import numpy as np
import pytest

from costmodel.hardware import Curve, HardwareProfile
from reports.comparison import compare
from reports.figures import NARROW, WIDE, roofline, save_figure
from reports.records import parse_records, read_records

DATA = Path(__file__).parents[1] / "data"


def device(**changes):
    values = {
        "name": "toy",
        "title": "Toy",
        "vendor": "none",
        "generation": "none",
        "n_units": 1,
        "peak_flops_per_s": {"bf16": 1e15, "fp8": 2e15, "fp16": 1e15},
        "hbm_bytes_per_s": 4e12,
        "memory_bytes": 80e9,
        "memory_marketing_bytes": 80e9,
        "l2_bytes": None,
        "tdp_w": None,
        "link_bytes_per_s": None,
        "host_link_bytes_per_s": 50e9,
    }
    return HardwareProfile(**{**values, **changes})


POINT = {
    "model": "m",
    "method": "full",
    "method_spec": "full",
    "level": "ideal",
    "dtype": "bf16",
    "batch": 1,
    "context_tokens": 1024,
    "tp": 1,
    "prefill_flops": 2e13,
    "prefill_hbm_bytes": 2e10,
    "decode_flops": 3e10,
    "decode_hbm_bytes": 1.5e10,
    "ttft_s": 0.05,
    "tpot_s": 0.005,
    "basis": "prior",
}


def lines_of(figure, gid, panel=0):
    return [line for line in figure.axes[panel].get_lines() if line.get_gid() == gid]


def test_rings_and_dots_are_flops_over_bytes_and_time():
    record = {**POINT, "status": "ok", "ttft_s": 0.1, "tpot_s": 0.006, "predicted": POINT}
    pairs = compare(parse_records(json.dumps(record))).pairs
    figure = roofline(pairs, device())
    (ring,) = lines_of(figure, "predicted-prefill")
    np.testing.assert_allclose(ring.get_xydata(), [[1000.0, 4e14]])  # 2e13/2e10; 2e13/0.05
    (dot,) = lines_of(figure, "observed-prefill")
    np.testing.assert_allclose(dot.get_xydata(), [[1000.0, 2e14]])
    (ring,) = lines_of(figure, "predicted-decode")
    np.testing.assert_allclose(ring.get_xydata(), [[2.0, 6e12]])
    (dot,) = lines_of(figure, "observed-decode")
    np.testing.assert_allclose(dot.get_xydata(), [[2.0, 5e12]])
    assert len(lines_of(figure, "join")) == 2


def test_flops_of_the_model_and_bytes_of_one_gpu_meet_per_gpu():
    pairs = [{**POINT, "tp": 4}]
    (ring,) = lines_of(roofline(pairs, device()), "predicted-decode")
    np.testing.assert_allclose(ring.get_xydata(), [[0.5, 1.5e12]])


def test_roofs_ridge_and_shared_peaks():
    figure = roofline([POINT], device())
    (roof,) = lines_of(figure, "roof-bf16-fp16")
    x, y = roof.get_data()
    assert x[1] == pytest.approx(250.0)
    assert y[1] == pytest.approx(1e15)
    assert y[0] / x[0] == pytest.approx(4e12)
    assert lines_of(figure, "roof-fp8")
    (ridge,) = lines_of(figure, "ridge")
    assert ridge.get_xdata()[0] == pytest.approx(250.0)
    texts = {t.get_text() for t in figure.axes[0].texts}
    assert {"ridge 250 FLOP/B", "memory 4 TB/s", "bf16, fp16 1 PFLOP/s"} <= texts


def test_measured_roof_is_the_best_of_the_curves():
    curves = {
        # 2 FLOPs a bf16 weight of 2 bytes: 1/(1 * 2.5e12) s per FLOP at one row is 2.5 TB/s.
        "gemm/bf16/k=64/n=64": Curve(x=(1.0, 512.0), y=(1 / 2.5e12, 1 / 6e14)),
        "gemm/fp8/k=64/n=64": Curve(x=(1.0,), y=(1 / 9e14,)),
        # Small streams sit in the cache: only the largest counts.
        "stream": Curve(x=(1.0, 2.0), y=(1 / 9e12, 1 / 3e12)),
        "decode_attention/bf16/group=4/head_dim=128": Curve(x=(1e6,), y=(1 / 1e12,)),
        "dispatch": Curve(x=(1.0,), y=(5e-6,)),
    }
    figure = roofline([POINT], device(curves=curves))
    (roof,) = lines_of(figure, "measured-bf16")
    x, y = roof.get_data()
    assert y[1] == pytest.approx(6e14)
    assert x[1] == pytest.approx(200.0)
    assert not lines_of(roofline([POINT], device()), "measured-bf16")


def test_launch_ceiling():
    # 3e10 FLOPs cannot be done faster than in the 30 ms that starting the kernels takes.
    rows = [{**POINT, "decode_launch_s": 3e-2}]
    (bar,) = lines_of(roofline(rows, device()), "ceiling")
    assert bar.get_ydata()[0] == pytest.approx(1e12)
    # launches of 1 us allow 3e16 FLOP/s: above every roof, so nothing is drawn
    assert not lines_of(roofline([{**POINT, "decode_launch_s": 1e-6}], device()), "ceiling")


def test_host_link_ceiling():
    # 3e10 FLOPs behind 5e9 bytes over 50e9 bytes/s: at most 3e11 FLOP/s.
    pairs = [{**POINT, "decode_link_bytes": 5e9}]
    (bar,) = lines_of(roofline(pairs, device()), "ceiling")
    assert bar.get_ydata()[0] == pytest.approx(3e11)


@pytest.mark.parametrize("size", [WIDE, NARROW])
@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_labels_do_not_overlap_and_axes_have_units(size, name):
    comparison = compare(read_records([DATA / f"records_synthetic_{name}.jsonl"]))
    figure = roofline(comparison.pairs, device(), size=size)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        assert "FLOP" in axes.get_xlabel()
        assert "FLOP/s" in axes.get_ylabel()
        level = [t for t in axes.texts if not t.get_rotation()]
        boxes = [t.get_window_extent(renderer) for t in level]
        clashes = [
            (level[i].get_text(), level[j].get_text())
            for i in range(len(boxes))
            for j in range(i)
            if boxes[i].overlaps(boxes[j])
        ]
        assert not clashes


def test_markers_and_levels_differ_without_colour():
    figure = roofline(
        [
            POINT,
            {**POINT, "level": "reference", "tpot_s": 0.01},
            {**POINT, "method": "kivi", "method_spec": "kivi", "tpot_s": 0.004},
        ],
        device(),
    )
    rings = lines_of(figure, "predicted-decode")
    assert len({r.get_marker() for r in rings}) == 3
    by_label = {r.get_label(): r for r in rings}
    assert by_label["full (ideal)"].get_color() == by_label["full (reference)"].get_color()
    assert by_label["full (ideal)"].get_linestyle() != by_label["full (reference)"].get_linestyle()


def test_empty_input_says_so():
    figure = roofline((), device())
    assert "nothing to draw" in figure.axes[0].texts[0].get_text()


def test_hostile_and_long_names_are_drawn_as_text(tmp_path):
    rows = [{**POINT, "method_spec": "$\\frac{$" + "x" * 500, "model": "<script>"}]
    figure = roofline(rows, device(title="$\\bad{"))
    save_figure(figure, tmp_path / "a.png", dpi=50)
    assert len(figure.legends[0].get_texts()[0].get_text()) < 60


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_same_records_same_bytes(tmp_path, monkeypatch, ending):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    written = []
    for n in (1, 2):
        pairs = compare(read_records([DATA / "records_synthetic_cpu.jsonl"])).pairs
        path = save_figure(roofline(pairs, device()), tmp_path / f"{n}.{ending}", dpi=60)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert len(written[0]) > 5000

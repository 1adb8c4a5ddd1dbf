"""Every figure draws the numbers it was given, with units, and says so when there are none."""

from pathlib import Path

import numpy as np
import pytest

from costmodel.hardware import HardwareProfile
from reports import figures
from reports.comparison import as_pairs, compare
from reports.curves import crossings, curve_series
from reports.figures import NARROW, WIDE
from reports.figures.breakdown import steps_of
from reports.figures.memory import memory_bars
from reports.figures.pareto import frontier
from reports.records import read_records

DATA = Path(__file__).parents[1] / "data"
GIB = 1024.0**3
H100 = HardwareProfile(
    name="h100-sxm",
    title="H100",
    vendor="NVIDIA",
    generation="hopper",
    n_units=132,
    peak_flops_per_s={"bf16": 1e15},
    hbm_bytes_per_s=4e12,
    memory_bytes=80 * GIB,
    memory_marketing_bytes=80e9,
    l2_bytes=None,
    tdp_w=None,
    link_bytes_per_s=None,
    host_link_bytes_per_s=50e9,
)


def row(method, context, **metrics):
    key = {"model": "m", "method": method, "method_spec": method, "level": "ideal", "batch": 1}
    return {**key, "context_tokens": context, **metrics}


def drawn(figure, gid, panel=0):
    return [line for line in figure.axes[panel].get_lines() if line.get_gid() == gid]


@pytest.fixture(scope="module")
def pairs():
    return compare(read_records([DATA / "records_synthetic_gpu.jsonl"])).pairs


# Side by side --------------------------------------------------------------------------------


def test_side_by_side_sorts_by_the_better_level_and_marks_the_full_cache():
    rows = [
        row("full", 4096, tpot_s=0.020, tpot_low_s=0.018, tpot_high_s=0.026),
        row("kivi", 4096, tpot_s=0.012, tpot_low_s=0.010, tpot_high_s=0.015, basis="calibrated"),
        {**row("kivi", 4096, tpot_s=0.040), "level": "reference", "basis": "prior"},
        {
            **row("h2o", 4096, tpot_s=0.015, status="ok"),
            "predicted": row("h2o", 4096, tpot_s=0.014),
        },
    ]
    figure = figures.side_by_side(rows, "tpot_s")
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["kivi", "h2o", "full"]
    rings = {tuple(map(float, p)) for line in drawn(figure, "predicted") for p in line.get_xydata()}
    assert rings == {(0.012, 0), (0.040, 0), (0.014, 1), (0.020, 2)}
    (seen,) = drawn(figure, "observed")
    assert seen.get_xydata().tolist() == [[0.015, 1]]
    spans = {tuple(map(float, line.get_xdata())) for line in drawn(figure, "interval")}
    assert spans == {(0.018, 0.026), (0.010, 0.015)}
    (mark,) = drawn(figure, "full")
    assert mark.get_xdata()[0] == 0.020
    assert axes.get_xlabel() == "TPOT (s per token)"
    assert axes.get_title(loc="left") == "TPOT at 4k tokens of context"


def test_side_by_side_puts_more_on_top_where_more_is_better():
    rows = [row("full", 4096, tokens_per_s=50.0), row("kivi", 4096, tokens_per_s=80.0)]
    axes = figures.side_by_side(rows, "tokens_per_s").axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["kivi", "full"]


def test_models_of_one_method_stand_in_one_memory_figure():
    rows = [{**memory_row("full"), "model": name} for name in ("hybrid", "transformer")]
    axes = figures.memory(rows, H100).axes[0]
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == ["hybrid (ideal)", "transformer (ideal)"]
    assert axes.get_title(loc="left") == "Memory per device: context 4k, batch 1"


# Curves --------------------------------------------------------------------------------------


def test_curve_draws_path_interval_and_observation():
    rows = [
        row("full", 1024, tpot_s=0.010, tpot_low_s=0.008, tpot_high_s=0.013),
        row("full", 4096, tpot_s=0.020, tpot_low_s=0.016, tpot_high_s=0.026),
        {
            **row("full", 4096, tpot_s=0.025, status="ok"),
            "predicted": row("full", 4096, tpot_s=0.020),
        },
    ]
    figure = figures.tpot(rows)
    (path,) = drawn(figure, "predicted")
    np.testing.assert_allclose(path.get_xydata(), [[1024, 0.010], [4096, 0.020]])
    (seen,) = drawn(figure, "observed")
    np.testing.assert_allclose(seen.get_xydata(), [[4096, 0.025]])
    (band,) = [c for c in figure.axes[0].collections if c.get_gid() == "interval"]
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.008, 0.026)
    assert figure.axes[0].get_xlabel() == "context (tokens)"
    assert figure.axes[0].get_ylabel() == "TPOT (s per token)"


def test_break_even_is_where_straight_lines_meet():
    # In log-log: full 1 -> 4 over two octaves (slope 1), other flat at 2: they meet after one.
    rows = [
        *(row("full", c, tpot_s=t) for c, t in ((1024, 1.0), (4096, 4.0))),
        *(row("other", c, tpot_s=2.0) for c in (1024, 4096)),
    ]
    (met,) = crossings(curve_series(as_pairs(rows), "tpot_s"), "tpot_s")
    assert met.context_tokens == pytest.approx(2048)
    assert met.value == pytest.approx(2.0)
    assert (met.better, met.worse) == ("other (ideal)", "full (ideal)")
    figure = figures.tpot(rows)
    (cross,) = drawn(figure, "break-even")
    assert cross.get_xdata()[0] == pytest.approx(2048)
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert "from 2,000: other (ideal)\nbeats full (ideal)" in texts


def test_more_is_better_turns_the_winner_round():
    rows = [
        *(row("full", c, tokens_per_s=t) for c, t in ((1024, 4.0), (4096, 1.0))),
        *(row("other", c, tokens_per_s=2.0) for c in (1024, 4096)),
    ]
    (met,) = crossings(curve_series(as_pairs(rows), "tokens_per_s"), "tokens_per_s")
    assert met.better == "other (ideal)"


def test_touching_is_not_crossing():
    # A budget above the context equals full; from there on it is better: no break-even with itself.
    rows = [
        *(row("full", c, tpot_s=t) for c, t in ((1024, 1.0), (2048, 2.0), (4096, 4.0))),
        *(row("other", c, tpot_s=t) for c, t in ((1024, 1.0), (2048, 2.0), (4096, 2.0))),
    ]
    assert crossings(curve_series(as_pairs(rows), "tpot_s"), "tpot_s") == ()


def test_where_nothing_fits_is_marked():
    rows = [row("full", c, max_batch=n) for c, n in ((1024, 8), (2048, 4), (4096, 0))]
    figure = figures.max_batch(rows)
    (mark,) = drawn(figure, "nothing-fits")
    assert list(mark.get_xdata()) == [4096]
    assert any("none fits" in t.get_text() for t in figure.axes[0].texts)
    (path,) = drawn(figure, "predicted")
    assert path.get_ydata().min() == 4


def test_equal_lines_are_said_to_be_equal():
    rows = [row(m, c, ttft_s=c / 1e3) for m in ("full", "kivi") for c in (1024, 2048)]
    assert "the same for all" in figures.ttft(rows).axes[0].get_title(loc="left")
    rows.append(row("snapkv", 1024, ttft_s=9.0))
    assert "the same" not in figures.ttft(rows).axes[0].get_title(loc="left")


def test_more_series_than_can_be_told_apart_are_counted():
    rows = [row(f"m{n}", c, tpot_s=n + 1.0) for n in range(17) for c in (1024, 2048)]
    figure = figures.tpot(rows)
    assert len(drawn(figure, "predicted")) == 14
    assert "3 more series not drawn" in [t.get_text() for t in figure.legends[0].get_texts()]


# Errors --------------------------------------------------------------------------------------


def measured(method, context, predicted, observed):
    own = row(method, context, ttft_s=predicted, basis="prior")
    return {**row(method, context, ttft_s=observed, status="ok"), "predicted": own}


def test_scatter_has_observed_across_and_predicted_up():
    figure = figures.error_scatter([measured("full", 1024, 3.0, 2.0)], ["ttft_s"])
    (points,) = drawn(figure, "points")
    np.testing.assert_allclose(points.get_xydata(), [[2.0, 3.0]])
    bands = {c.get_gid(): c for c in figure.axes[0].collections}
    x, y = bands["band-10%"].get_paths()[0].vertices[1]
    assert y / x == pytest.approx(0.9)
    assert figure.axes[0].get_xlabel() == "observed TTFT (s)"
    assert figure.axes[0].get_ylabel() == "predicted TTFT (s)"


def test_errors_by_context_are_in_percent_with_their_median():
    rows = [measured("full", c, p, 1.0) for c, p in ((1024, 1.2), (1024, 0.9), (4096, 1.5))]
    figure = figures.error_by(rows, "context", ["ttft_s"])
    (points,) = drawn(figure, "points")
    np.testing.assert_allclose(sorted(points.get_ydata()), [-10, 20, 50])
    medians = [c.get_segments()[0][0][1] for c in figure.axes[0].collections]
    np.testing.assert_allclose(medians, [5.0, 50.0])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1k", "4k"]
    assert figure.axes[0].get_ylabel() == "error of TTFT (%)"


def test_errors_without_joined_records():
    for figure in (figures.error_scatter([]), figures.error_by([], "batch")):
        assert "no record" in figure.axes[0].texts[0].get_text()


# Memory --------------------------------------------------------------------------------------


def memory_row(method, context_tokens=4096, **changes):
    return row(
        method,
        context_tokens,
        **{
            "weights_bytes": 16 * GIB,
            "state_bytes": 4 * GIB,
            "state_host_bytes": 0,
            "peak_prefill_bytes": 24 * GIB,
            "peak_decode_bytes": 21 * GIB,
            **changes,
        },
    )


def test_memory_parts_add_up_to_the_worse_peak():
    (bar,) = memory_bars(as_pairs([memory_row("full")]))
    assert bar.phase == "prefill"
    assert (bar.weights_bytes, bar.state_bytes) == (16 * GIB, 4 * GIB)
    assert bar.rest_bytes == 4 * GIB
    figure = figures.memory([memory_row("full")], H100)
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    np.testing.assert_allclose(widths, [16, 4, 4])
    (capacity,) = drawn(figure, "capacity")
    assert capacity.get_xdata()[0] == pytest.approx(72)
    assert "GiB" in figure.axes[0].get_xlabel()
    assert "context 4k, batch 1, m" in figure.axes[0].get_title(loc="left")


def test_host_state_does_not_count_against_the_gpu():
    figure = figures.memory([memory_row("kv_offload", state_host_bytes=30 * GIB)], H100)
    host = [p for p in figure.axes[0].patches if "host" in p.get_gid()]
    assert host[0].get_x() + host[0].get_width() == pytest.approx(-30)
    assert "left of zero: host" in figure.axes[0].get_xlabel().replace("\n", " ")


def test_memory_compares_only_what_shares_a_point():
    rows = [memory_row("full"), memory_row("kivi"), {**memory_row("full"), "context_tokens": 8192}]
    figure = figures.memory(rows)
    assert len(figure.axes[0].get_yticklabels()) == 2
    assert "4k" in figure.axes[0].get_title(loc="left")


def test_memory_says_how_many_bars_are_left_out():
    many = [
        row(f"m{n}", 4096, weights_bytes=1e9, state_bytes=1e9, peak_decode_bytes=2e9)
        for n in range(23)
    ]
    axes = figures.memory(many).axes[0]
    assert len(axes.get_yticklabels()) == 20
    assert "3 more bars are not drawn" in " ".join(axes.get_xlabel().split())
    assert "not drawn" not in figures.memory(many[:20]).axes[0].get_xlabel()


def test_memory_sets_observed_beside_predicted():
    own = memory_row("full")
    record = {**memory_row("full", peak_prefill_bytes=25 * GIB), "status": "ok", "predicted": own}
    sides = [(b.side, b.rest_bytes / GIB) for b in memory_bars(as_pairs([record]))]
    assert sides == [("predicted", 4.0), ("observed", 5.0)]


# Cost and accuracy ---------------------------------------------------------------------------


def test_frontier_by_hand():
    assert frontier([(3, 0), (1, 5), (2, 6), (2, 2), (4, 0)]) == [(1, 5), (2, 2), (3, 0)]


def test_pareto_sets_unknown_accuracy_apart():
    cost = "usd_per_million_output_tokens"
    rows = [
        row("full", 4096, **{cost: 4.0, "accuracy_drop_points": 0.0}),
        row("kivi", 4096, **{cost: 2.0, "accuracy_drop_points": 1.5}),
        row("tova", 4096, **{cost: 1.0, "accuracy_drop_points": None}),
    ]
    figure = figures.pareto(rows)
    known = [tuple(line.get_xydata()[0]) for line in drawn(figure, "known")]
    assert known == [(4.0, 0.0), (2.0, 1.5)]
    (unknown,) = drawn(figure, "unknown")
    assert unknown.get_ydata()[0] > 1.5
    assert "accuracy unknown" in [t.get_text() for t in figure.axes[0].texts]
    assert "US$" in figure.axes[0].get_xlabel()
    assert "points" in figure.axes[0].get_ylabel()


# Breakdown -----------------------------------------------------------------------------------

OPERATIONS = [
    {"phase": "decode", "name": "mlp", "count": 32, "flops": 1e6, "dtype": "bf16",
     "weight_bytes": 4e8, "time_s": 0.0040},  # 32 * 4e8 / 4e12 = 3.2 ms of 4.0: weights
    {"phase": "decode", "name": "attention", "count": 32, "state_bytes": 1e8, "time_s": 0.0010},
    {"phase": "decode", "name": "norm", "count": 64, "activation_bytes": 1e4, "time_s": 0.0005},
    {"phase": "decode", "name": "fetch", "count": 1, "link_bytes": 5e7, "time_s": 0.0011},
    {"phase": "prefill", "name": "mlp", "count": 32, "flops": 1e13, "dtype": "bf16", "time_s": 0.4},
]  # fmt: skip


def test_steps_are_coloured_by_what_bounds_them():
    steps = {s.name: (s.bound, s.seconds) for s in steps_of(OPERATIONS, "decode", H100)}
    assert steps == {
        "mlp": ("weight", 0.0040),
        "attention": ("kv", 0.0010),
        "norm": ("launch", 0.0005),
        "fetch": ("link", 0.0011),
    }
    assert steps_of(OPERATIONS, "prefill", H100)[0].bound == "compute"


def test_waterfall_ends_at_the_sum():
    explanation = {"method_spec": "kivi:bits=2", "context_tokens": 8192, "operations": OPERATIONS}
    figure = figures.breakdown(explanation, H100)
    last = figure.axes[0].patches[-1]
    assert last.get_x() + last.get_width() == pytest.approx(0.0066)
    assert "One decode step of kivi:bits=2, context 8k: 6.6 ms" in figure.axes[0].get_title(
        loc="left"
    )
    assert "(s)" in figure.axes[0].get_xlabel()


def test_many_small_steps_become_one_and_still_add_up():
    many = [{"phase": "decode", "name": f"op{n}", "time_s": n + 1.0} for n in range(40)]
    steps = steps_of(many, "decode", H100)
    assert len(steps) == 17
    assert sum(s.seconds for s in steps) == pytest.approx(820)
    assert steps[-1].name == "24 smaller ones"


def test_hostile_explanations_draw_nothing():
    for operations in (None, "x", [], [{"phase": "decode", "time_s": "1"}]):
        figure = figures.breakdown({"operations": operations}, H100)
        assert "nothing to draw" in figure.axes[0].texts[0].get_text()


# All -----------------------------------------------------------------------------------------


def at_one_context(points):
    found = as_pairs(points)
    first = found[0].key.number("context_tokens") if found else None
    return [p for p in found if p.key.number("context_tokens") == first]


ALL = {
    "side_by_side": lambda p, **k: figures.side_by_side(at_one_context(p), "tpot_s", **k),
    "ttft": figures.ttft,
    "tpot": figures.tpot,
    "throughput": figures.throughput,
    "energy": figures.energy,
    "cost": figures.cost,
    "max_batch": figures.max_batch,
    "error_scatter": figures.error_scatter,
    "error_by": figures.error_by,
    "memory": figures.memory,
    "pareto": figures.pareto,
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_texts_do_not_overlap(name, size, pairs):
    figure = ALL[name](pairs, size=size)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        texts = [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        texts += [t for axis in (axes.xaxis, axes.yaxis) for t in axis.get_ticklabels()]
        boxes = [
            (t.get_text(), t.get_window_extent(renderer))
            for t in texts
            if t.get_text() and t.get_visible()
        ]
        boxes = [(t, b) for t, b in boxes if b.width > 0]
        clashes = [
            (a, b)
            for i, (a, box) in enumerate(boxes)
            for b, other in boxes[:i]
            if box.overlaps(other)
        ]
        assert not clashes
        assert "(" in axes.get_ylabel() + axes.get_xlabel()


@pytest.mark.parametrize("name", ALL)
def test_empty_and_single_and_hostile(name, tmp_path, pairs):
    assert ALL[name]([]).axes[0].texts
    figures.save_figure(ALL[name](pairs[:1]), tmp_path / "one.png", dpi=40)
    hostile = [{**row("$\\x{" + "y" * 300, 4096, tpot_s=1.0, ttft_s=1.0), "model": "<b>" * 100}]
    figures.save_figure(ALL[name](hostile), tmp_path / "hostile.svg")


def test_unknown_ending_is_refused(tmp_path, pairs):
    with pytest.raises(Exception, match=r"expected an ending of \.png, \.svg or \.pdf"):
        figures.save_figure(figures.tpot(pairs[:1]), tmp_path / "a.gif")


def test_importing_figures_does_not_import_matplotlib():
    import subprocess
    import sys

    code = "import sys, reports.figures, reports.tables; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_levels_are_mixed_only_where_a_method_has_no_other():
    def level(name, values, which):
        return [
            {**row(name, c, tpot_s=t), "level": which}
            for c, t in zip((1024, 4096), values, strict=True)
        ]

    # full (ideal) 1 -> 4 meets kivi (reference), flat at 2; full has no reference curve.
    mixed = [*level("full", (1.0, 4.0), "ideal"), *level("kivi", (2.0, 2.0), "reference")]
    assert len(crossings(curve_series(as_pairs(mixed), "tpot_s"), "tpot_s")) == 1
    # With one, reference is compared with reference, where nothing crosses.
    mixed += level("full", (3.0, 9.0), "reference")
    assert crossings(curve_series(as_pairs(mixed), "tpot_s"), "tpot_s") == ()


def test_bars_far_beyond_the_memory_are_cut_and_say_so():
    rows = [memory_row("full"), memory_row("h2o", peak_prefill_bytes=4096 * GIB)]
    figure = figures.memory(rows, H100)
    assert figure.axes[0].get_xlim()[1] < 120
    assert "» 4.00 TiB (prefill)" in [t.get_text() for t in figure.axes[0].texts]


def test_an_observed_median_shows_how_sure_it_is():
    record = {**row("full", 4096, tpot_s=0.02, status="ok"), "predicted": row("full", 4096)}
    record["statistics"] = {"tpot_s": {"ci_low_s": 0.019, "ci_high_s": 0.022}}
    (bars,) = [c for c in figures.tpot([record]).axes[0].collections if c.get_gid() == "confidence"]
    np.testing.assert_allclose(bars.get_segments(), [[[4096, 0.019], [4096, 0.022]]])
    record["statistics"] = {"tpot_s": [1, 2]}
    assert not figures.tpot([record]).axes[0].collections


def test_bytes_have_ticks_in_powers_of_two():
    rows = [memory_row("full", peak_prefill_bytes=p * GIB, context_tokens=c)
            for p, c in ((20, 4096), (60, 8192))]  # fmt: skip
    figure = figures.curve(rows, "peak_bytes")
    assert {"32 GiB", "24 GiB"} <= {t.get_text() for t in figure.axes[0].get_yticklabels()}

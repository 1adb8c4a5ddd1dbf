"""The page and the workbook of a plan: offline, complete, the same bytes for the same document."""

import io
import re
import zipfile
from typing import Any

import pytest

from reports.figures import planning
from reports.plan_page import html, ranked_table, xlsx


def row(rank: int | None, gpu: str, usd: float, drop: float | None) -> dict[str, Any]:
    return {
        "rank": rank, "feasible": rank is not None, "reason": None if rank else "too <b>small</b>",
        "model": "m", "method": "full", "method_spec": "full", "level": "ideal", "engine": "vllm",
        "gpu": gpu, "tp": 1, "replicas": 2, "gpus": 2, "usd_per_hour": usd,
        "usd_per_million_tokens": 0.25, "energy_j_per_token": 1.5, "ttft_p50_s": 0.1,
        "ttft_p99_s": 2.0, "tpot_p50_s": 0.02, "tpot_p95_s": 0.03, "itl_p95_s": 0.04,
        "e2e_p99_s": 9.0, "goodput_rps": 3.0, "output_tokens_per_s": 700.0, "kv_occupancy": 0.4,
        "headroom": 0.2, "breaks_first": "ttft_p99_s", "binds": "prefill", "bound_replicas": 1,
        "accuracy_drop_points": drop, "accuracy_source": "a paper",
        "binding": {"max_rate_per_replica_per_s": 2.0, "weights_bytes": 16e9,
                    "kv_pool_bytes": 50e9, "usable_bytes": 72e9},
    }  # fmt: skip


@pytest.fixture
def document() -> dict[str, Any]:
    return {
        "lccost_version": "0.1.0", "inputs": {"file": "plan.toml"},
        "results": [row(1, "a", 4.0, 0.0), row(2, "b", 5.0, None), row(None, "c", 1.0, None)],
        "verdict": "2 x a with full serve m.", "workload": {"name": "trace"}, "slo": ["TTFT"],
        "limits": [{"key": "ttft_p99_s", "metric": "ttft", "percentile": 99, "limit_s": 5.0}],
        "explanations": ["Binds on a: prefill."], "definitions": ["TTFT: queue included."],
        "assumptions": ["prior"], "deploy": ["vllm serve m"],
        "sensitivities": [{"scenario": "twice the rate", "flips": True, "cheapest": "m on b",
                           "usd_per_hour": 8.0, "basis": "closed form"}],
        "curve": [{"rate_per_s": r, "ttft_p50_s": r / 10, "ttft_p99_s": r, "tpot_p95_s": 0.03,
                   "itl_p95_s": 0.04, "e2e_p99_s": 3 * r} for r in (1.0, 2.0, 3.0)],
    }  # fmt: skip


def test_the_page_is_whole_and_offline(document: dict[str, Any]) -> None:
    page = html(document)
    for text in ("2 x a with full serve m.", "Binds on a: prefill.", "vllm serve m", "a paper",
                 "twice the rate", "TTFT: queue included.", "lccost plan plan.toml"):  # fmt: skip
        assert text in page, text
    assert "too &lt;b&gt;small&lt;/b&gt;" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert html(document) == page


def test_nothing_held_is_a_page_too(document: dict[str, Any]) -> None:
    document |= {"results": [row(None, "c", 1.0, None)], "curve": [], "sensitivities": []}
    page = html(document)
    assert "What is out, and why" in page
    assert "data-chart" not in page.partition("<script")[0]


def test_the_workbook_has_live_formulas(document: dict[str, Any]) -> None:
    with zipfile.ZipFile(io.BytesIO(xlsx(document))) as book:
        sheets = {n: book.read(n).decode() for n in book.namelist() if "worksheets/sheet" in n}
    cost = sheets["xl/worksheets/sheet2.xml"]
    # Two plans with GPUs in rows 5 and 6 of the price list, the plans from row 9.
    assert "INDEX($B$5:$B$6,MATCH(D9,$A$5:$A$6,0))*E9" in cost
    assert "<v>2920" in cost  # 4 US$/h for 730 hours


def test_unknown_is_not_zero(document: dict[str, Any]) -> None:
    held = document["results"][:2]
    table = ranked_table(held)
    place = [c.name for c in table.columns].index("accuracy_drop_points")
    assert [r[place] for r in table.texts] == ["0.0", "unknown"]
    # In the picture it stands in a strip of its own, plans of one price above each other.
    assert planning.cost_points(held) == [(4.0, 0.0, held[0])]
    top, unknown = planning.unknown_points([*held, held[1]])
    assert top > 0
    assert [x for x, _, _ in unknown] == [5.0, 5.0]
    assert top < unknown[0][1] < unknown[1][1]
    assert "above this line: accuracy unknown" in html(document)


def test_the_table_has_every_percentile_with_a_limit(document: dict[str, Any]) -> None:
    limit = {"key": "ttft_p95_s", "metric": "ttft", "percentile": 95, "limit_s": 1.0}
    table = ranked_table([{**document["results"][0], "ttft_p95_s": 0.5, "fragile": True}], [limit])
    titles = [c.title for c in table.columns]
    assert table.texts[0][titles.index("TTFT P95 with queue")] == "500 ms"
    assert table.texts[0][titles.index("replicas")] == "2*"
    assert "model" not in titles  # all plans have the same


def test_figures_draw_what_is_there(document: dict[str, Any]) -> None:
    held = document["results"][:2]
    figure = planning.plan_speed(held)
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].get_lines()}
    assert (50.0, 350.0) in points  # 1 / 20 ms, 700 tokens/s on two GPUs
    figure = planning.plan_load(document["curve"], document["limits"], "x", bound=4.0)
    levels = {tuple(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert (5.0, 5.0) in levels
    widths = [p.get_width() for p in planning.plan_memory(held).axes[0].patches]
    assert sum(widths) == pytest.approx(2 * 72e9 / 2**30)
    assert planning.plan_cost([]).axes[0].get_lines() == []  # says so instead of failing

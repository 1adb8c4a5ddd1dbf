"""Accuracy evidence: what is an answer, and what must stay unknown."""

from importlib import resources

import pytest

from costmodel.methods import method_names
from costmodel.quality import accuracy, evidence, kept_tokens, rows, scores
from costmodel.registry import model_names

KIVI2 = {"bits": 2, "group": 32, "residual_tokens": 128}
FILES = sorted(
    (f for f in resources.files("costmodel").joinpath("data/quality").iterdir()),
    key=lambda f: f.name,
)


def test_longbench_averages_are_the_papers() -> None:
    # arXiv 2407.01527, Llama-3-8B-Instruct: 45.21 full, 44.37 KIVI-2, 45.31 KIVI-4, 43.90 FlexGen
    drop, source = accuracy("llama-3-8b", "kivi", KIVI2, 7500)
    assert drop == pytest.approx(0.84)
    assert "2407.01527" in source
    assert accuracy("llama-3-8b", "kivi", {**KIVI2, "bits": 4}, 7500)[0] == pytest.approx(-0.10)
    assert accuracy("llama-3-8b", "flexgen", {"bits": 4, "group": 32}, 7500)[0] == 1.31
    # Mistral-7B-Instruct-v0.2: 43.54 full, 42.43 KIVI-2
    assert accuracy("mistral-7b-v0.2", "kivi", KIVI2, 30000)[0] == pytest.approx(1.11)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.25, 0.48), (0.125, 1.20), (0.083, 1.59), (0.0625, 1.81)]
)
def test_h2o_budgets_of_the_benchmark(share: float, expected: float) -> None:
    # 45.21 full; 44.73, 44.01, 43.62, 43.40 at 2x, 4x, 6x, 8x
    parameters = {"variant": "slot", "heavy_fraction": share, "recent_fraction": share}
    assert accuracy("llama-3-8b", "h2o", parameters, 7500)[0] == pytest.approx(expected)


def test_the_average_is_that_of_fifteen_tasks() -> None:
    # mean over 15 tasks from the category means: 3 SQA, 3 MQA, 3 summaries, 3 few-shot, 1, 2 code
    weights = {
        "single-document QA": 3, "multi-document QA": 3, "summarization": 3, "few-shot": 3,
        "synthetic": 1, "code": 2,
    }  # fmt: skip
    found = [r for r in rows("kivi") if r.model == "llama-3-8b" and r.parameters["bits"] == "2"]
    by_task = {r.task: r.value for r in found if r.metric == "LongBench score"}
    total = sum(weights[task] * by_task[task] for task in weights)
    assert total / 15 == pytest.approx(by_task["LongBench average"], abs=0.01)


@pytest.mark.parametrize(
    ("model", "method", "parameters", "context", "why"),
    [
        ("llama-3-8b", "kivi", {**KIVI2, "group": 64}, 7500, "not measured with this setting"),
        ("llama-3-8b", "kivi", {**KIVI2, "residual_tokens": 32}, 7500, "this setting"),
        ("llama-3-8b", "kivi", KIVI2, 131072, "evidence ends at 7,500"),
        ("llama-2-7b", "kivi", KIVI2, 4096, "not measured on llama-2-7b"),
        ("llama-3-70b", "kivi", KIVI2, 7500, "not measured on llama-3-70b"),
        ("llama-3-8b", "h2o", {"heavy_fraction": 0.1, "recent_fraction": 0.1}, 7500, "setting"),
        ("llama-3-8b", "flexgen", {"bits": 4, "group": 64}, 7500, "setting"),
        ("llama-3-8b", "snapkv", {"keep_tokens": 512, "window_tokens": 32}, 8000, "setting"),
        ("llama-3-8b", "gear", {}, 4096, "no comparable"),
        ("llama-3-8b", "fp8_kv", {}, 4096, "no comparable"),
        ("llama-3-8b", "kivi+minference", {"kivi": KIVI2, "minference": {}}, 4096, "combination"),
    ],
)
def test_what_nobody_measured_is_unknown(
    model: str, method: str, parameters: dict[str, object], context: int, why: str
) -> None:
    drop, source = accuracy(model, method, parameters, context)
    assert drop is None
    assert source.startswith("unknown")
    assert why in source


def test_rows_of_another_harness_are_no_drop() -> None:
    # Mistral's H2O rows beat their own baseline: other prompting, so never a gain
    half = {"heavy_fraction": 0.25, "recent_fraction": 0.25}
    assert accuracy("mistral-7b-v0.2", "h2o", half, 31500)[0] is None
    shown = [r for r in evidence("h2o") if r["model"] == "Mistral-7B-Instruct-v0.2"]
    assert any(r["value"] > r["baseline"] and r["drop"] is None for r in shown)
    # LongChat under InfLLM was run with broken positions
    broken = [r for r in evidence("infllm") if r["model"].startswith("LongChat")]
    assert broken
    assert all(r["drop"] is None for r in broken)


def test_architectures_stand_side_by_side_by_score() -> None:
    linear = scores("mamba-2.8b")
    assert {r["value"] for r in linear if r["task"] == "LongBench average"} == {20.7}
    assert all(r["context"] == 1500 for r in linear)
    assert any(r["value"] == 45.21 for r in scores("Meta-Llama-3-8B-Instruct"))
    assert all(r["drop"] is None for r in evidence("full") if r["model"].startswith("havenhq"))


def test_budgets_in_tokens() -> None:
    # PyramidKV paper, Llama-3-8B-Instruct: 41.46 full; 41.35 SnapKV, 41.49 PyramidKV with 2,048
    parameters = {"keep_tokens": 2048, "window_tokens": 32, "kernel": 5}
    assert accuracy("llama-3-8b", "snapkv", parameters, 8000)[0] == pytest.approx(0.11)
    assert accuracy("llama-3-8b", "pyramidkv", {"keep_tokens": 2048}, 8000)[0] == -0.03
    assert accuracy("llama-3-8b", "snapkv", parameters, 2048) == (
        0.0,
        "the budget holds the whole context",
    )


def test_a_budget_in_tokens_says_nothing_about_far_shorter_prompts() -> None:
    # PyramidKV's table keeps 64 of about 13,000 tokens; 64 of 512 is another question
    drop, why = accuracy("mistral-7b-v0.2", "h2o", {"preset": "8x"}, 512)
    assert drop is None
    assert "unknown at 512 tokens: evidence starts near" in why
    parameters = {"keep_tokens": 2048, "window_tokens": 32}
    assert accuracy("llama-3-8b", "snapkv", parameters, 4096)[0] is not None
    assert "ends at" in accuracy("llama-3-8b", "snapkv", parameters, 131_072)[1]


def test_task_families() -> None:
    # Llama-3.1-8B-Instruct, TOVA with half the cache: RULER 16k 93.4 -> 77.9
    half = {"keep_tokens": 8192}
    assert accuracy("llama-3.1-8b", "tova", half, 16384, task_family="retrieval")[0] == 15.5
    assert accuracy("llama-3.1-8b", "tova", half, 16384)[0] == pytest.approx(2.29)  # LongBench
    assert accuracy("llama-3-8b", "kivi", KIVI2, 7500, task_family="code")[0] is not None


@pytest.mark.parametrize("method", ["full", "kv_offload", "full+kv_offload"])
def test_lossless_methods_lose_nothing_at_any_length(method: str) -> None:
    assert accuracy("qwen3-8b", method, {}, 10**6)[0] == 0.0


def test_offload_beside_a_method_changes_nothing() -> None:
    both = {"kivi": KIVI2, "kv_offload": {}}
    assert accuracy("llama-3-8b", "kivi+kv_offload", both, 7500)[0] == pytest.approx(0.84)


def test_kept_tokens_of_every_kind_of_budget() -> None:
    assert kept_tokens({"keep_tokens": 2048}, 8192) == 2048
    assert kept_tokens({"sink_tokens": 4, "window_tokens": 1020}, 8192) == 1024
    assert kept_tokens({"heavy_fraction": 0.1, "recent_fraction": 0.1}, 5000) == pytest.approx(1000)
    assert kept_tokens({"rate": 0.5}, 3000) == 1500
    infllm = {"init_tokens": 128, "local_tokens": 4096, "topk": 16, "block_tokens": 128}
    assert kept_tokens(infllm, 10**5) == 128 + 4096 + 16 * 128
    assert kept_tokens({"preset": "4x", "sink_tokens": 4, "window_tokens": 9}, 8000) == 2000
    assert kept_tokens(KIVI2, 8192) is None


# The data itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_every_file_says_where_it_is_from(file: object) -> None:
    text = file.read_text("utf-8")  # type: ignore[attr-defined]
    for key in ("source", "url", "harness", "licence"):
        assert f"# {key}: " in text


def test_rows_belong_to_known_methods_and_models_and_have_scores() -> None:
    models = set(model_names())
    for method in method_names():
        for row in rows(method):
            if row.comparable == "exact":
                continue
            assert row.model in models | {""}, row.model
            assert row.evaluated
            assert row.comparable in ("yes", "no")
            assert row.confidence
            for value in (row.baseline, row.value):
                assert value is None or 0 <= value <= 100
            if row.comparable == "yes" and method != "full":
                assert row.baseline is not None
                assert row.value is not None
    written = {
        line.split(",")[0]
        for f in FILES
        for line in f.read_text("utf-8").splitlines()
        if not line.startswith("#")
    }
    assert written - {"method"} <= set(method_names())

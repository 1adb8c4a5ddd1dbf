"""End-to-end rows: which deployment, engine, method and load a row means; memory by hand."""

import csv
from pathlib import Path

import pytest

from costmodel.errors import ConfigError, NotApplicableError, UnknownNameError
from costmodel.serving import Deployment
from costmodel.validation import validate
from costmodel.validation.kinds import Options, kind_named
from costmodel.validation.kv_methods import read_rows as read_method_rows
from costmodel.validation.latency_throughput import read_rows as read_latency_rows
from costmodel.validation.names import engine_named, method_named, model_named
from costmodel.validation.run import predict_rows
from costmodel.validation.serving_rows import read_rows

MEASURED = Path(__file__).parents[1] / "data" / "measured"
SERVING = {
    "id": "x_tp4_ep1_1", "backend": "vllm", "model_path": "MiniMaxAI/MiniMax-M2.5",
    "system": "b200_sxm", "precision": "fp8", "isl": "1024", "osl": "1024", "batch_size": "32",
    "concurrency": "32", "tp_size": "4", "pp_size": "1", "attention_dp_size": "1",
    "moe_tp_size": "4", "moe_ep_size": "1",
}  # fmt: skip
LATENCY = {
    "hw": "a100_80g", "n_gpu": "1", "tp": "1", "model": "Llama-2-7B", "weight_prec": "fp16",
    "kv_prec": "fp16", "batch": "16", "isl": "128", "osl": "128", "metric": "output_tok_s",
    "engine": "lmdeploy-0.2.0", "source": "docs", "note": "",
}  # fmt: skip
METHOD = {
    "hardware": "NVIDIA A6000 48GB (1 GPU; LMDeploy)", "model": "Llama-2-7b-hf",
    "method": "KIVI-4bit g32 R128", "stage": "decoding", "batch": "16", "prompt_len": "2048",
    "gen_len": "", "metric": "throughput_tok_s", "source": "", "note": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Deployment(tp=4, moe_tp=4)),
        # Degrees multiplied twice: the id's tp is the number of GPUs.
        ({"id": "x_tp4_ep4_1", "tp_size": "16", "moe_tp_size": "4", "moe_ep_size": "4"},
         Deployment(tp=4, ep=4)),
        ({"id": "x_cfg1", "tp_size": "64", "moe_tp_size": "8", "moe_ep_size": "8"},
         Deployment(tp=8, ep=8)),
        ({"id": "x_tp8_ep8_1", "tp_size": "1", "attention_dp_size": "64", "moe_tp_size": "8",
          "moe_ep_size": "8", "batch_size": "4", "concurrency": "256"},
         Deployment(tp=1, dp=8, ep=8)),
        ({"id": "x_tp2_ep2_1", "tp_size": "2", "attention_dp_size": "2", "moe_tp_size": "1",
          "moe_ep_size": "4", "batch_size": "16"},
         Deployment(tp=1, dp=2, ep=2)),
        # Not doubled: two GPUs' worth of width times two groups on four GPUs that the id names.
        ({"id": "x_tp4_ep2_1", "tp_size": "4", "moe_tp_size": "2", "moe_ep_size": "2"},
         Deployment(tp=4, moe_tp=2, ep=2)),
        # The id names expert groups that the columns leave at 1.
        ({"id": "x_tp4_0_ep4_0_9", "moe_tp_size": "1"}, Deployment(tp=4, ep=4)),
        # A batch per rank: eight ranks of five.
        ({"id": "x_tp8_epnone_6", "tp_size": "8", "attention_dp_size": "", "moe_tp_size": "1",
          "moe_ep_size": "8", "batch_size": "5", "concurrency": "40"},
         Deployment(tp=1, dp=8, ep=8)),
    ],
)  # fmt: skip
def test_deployments_of_published_rows(changes: dict[str, str], expected: Deployment) -> None:
    case, rows = read_rows({**SERVING, **changes}, 0)
    assert case.deployment == expected
    assert {r.label for r in rows} == {"tpot", "ttft_unloaded"}
    assert [r.primary for r in rows] == [True, False]


@pytest.mark.parametrize("tp", ["20", "24", "28", "36", "40", "48", "72"])
def test_multi_node_rows_are_unsupported(tp: str) -> None:
    with pytest.raises(NotApplicableError, match="multi-node"):
        read_rows({**SERVING, "id": f"x_tp{tp}_ep1_1", "tp_size": tp, "moe_tp_size": tp}, 0)


def test_rows_without_a_deployment_are_unsupported() -> None:
    zeros = {"attention_dp_size": "0", "moe_tp_size": "0", "moe_ep_size": "0"}
    with pytest.raises(NotApplicableError, match="sizes of 0"):
        read_rows({**SERVING, **zeros}, 0)
    with pytest.raises(NotApplicableError, match="pipeline"):
        read_rows({**SERVING, "pp_size": "2"}, 0)


def test_a_missing_concurrency_is_the_ranks_batches() -> None:
    spread = {"tp_size": "8", "attention_dp_size": "", "moe_ep_size": "8", "moe_tp_size": "1"}
    row = {**SERVING, **spread, "id": "x_tp8_epnone_1", "concurrency": "", "batch_size": "28"}
    case, rows = read_rows(row, 0)
    assert case.deployment.dp == 8
    assert rows[0].concurrency == 28 * 8


@pytest.mark.parametrize(
    ("spelling", "engine"),
    [
        ("lmdeploy-0.2.0", "lmdeploy"),
        ("trtllm-1.0", "trtllm"),
        ("NIM-1.8.0", "trtllm"),
        ("torchao", "gpt-fast"),
        ("HF+FlashAttention-2", "transformers"),
        ("vLLM+FlashAttention-2", "vllm"),
        ("MInference-SGLang", "minference"),
        ("FlexLLMGen", "flexgen"),
        ("huggingface-transformers", "transformers"),
        ("KTransformers", "any"),
    ],
)
def test_engines_by_their_spelling(spelling: str, engine: str) -> None:
    assert engine_named(spelling) == engine


def test_an_engine_nobody_knows_has_the_parameters_of_all() -> None:
    assert engine_named("abacus-9000") == engine_named(" ") == "any"


@pytest.mark.parametrize(
    ("spelling", "method"),
    [
        ("full fp16", "full"),
        ("KIVI-4bit g32 R128", "kivi:bits=4,group=32,residual_tokens=128"),
        ("GEAR-4bit", "gear:bits=4"),
        ("StreamingLLM 64+448", "streaming_llm:sink_tokens=64,window_tokens=448"),
        # 64 + 448 tokens of a prompt of 2,048
        ("H2O 64+448", "h2o:heavy_fraction=0.03125,recent_fraction=0.21875"),
        ("H2O hh_ratio0.2 (hh 409 + recent 409)", "h2o:heavy_fraction=0.2,recent_fraction=0.2"),
        ("KnormPress cr=0.5 + quanto int4 cache", "knorm:kept_fraction=0.5+hf_quanto:bits=4"),
        ("KnormPress cr=0 + bf16 cache", "full"),
        ("MInference (vLLM)", "minference"),
        ("KIVI-2bit", "kivi:bits=2"),
        ("SnapKV 1024", "snapkv:keep_tokens=1024"),
        ("FP8 KV cache", "fp8_kv"),
        ("kivi:bits=2,group=64", "kivi:bits=2,group=64"),
    ],
)
def test_methods_by_their_spelling(spelling: str, method: str) -> None:
    assert method_named(spelling, 2048.0) == method


def test_budgets_beyond_the_prompt_keep_everything() -> None:
    assert method_named("H2O 64+448", 256.0).endswith("recent_fraction=1")


def test_methods_that_cannot_be_priced_say_why() -> None:
    with pytest.raises(NotApplicableError, match="offload"):
        method_named("DeepSpeed ZeRO-Inference", 512.0)
    with pytest.raises(ConfigError, match="unheard-of"):
        method_named("unheard-of", 512.0)


def test_static_batches_and_closed_loops() -> None:
    case, (row,) = read_latency_rows(LATENCY, 0)
    assert (case.engine, case.dtype, row.metric, row.concurrency) == ("lmdeploy", "fp16", "run", 16)
    assert not row.primary
    nim = {**LATENCY, "engine": "NIM-1.8.0", "metric": "tpot_ms", "weight_prec": "fp8"}
    _, (row,) = read_latency_rows(nim, 0)
    assert (row.metric, row.primary) == ("tpot", True)


def test_first_tokens_under_load_are_not_judged_as_unloaded_ones() -> None:
    nim = {**LATENCY, "engine": "NIM-1.8.0", "metric": "ttft_ms"}
    _, (row,) = read_latency_rows(nim, 0)
    assert (row.label, row.primary, row.concurrency) == ("ttft_unloaded", False, 1.0)


def test_reported_bugs_are_not_in_the_overall_figures() -> None:
    reported = {**LATENCY, "metric": "tpot_ms", "source": "github:x/y issue #1608"}
    _, (row,) = read_latency_rows(reported, 0)
    assert (row.label, row.primary) == ("decode_reported", False)


def test_a_model_that_is_not_bundled_is_built_from_the_row() -> None:
    own = {"model": "My-1B", "n_layers": "16", "d_model": "2048", "Hq": "32", "Hkv": "8", "D": "64",
           "d_ff": "8192", "vocab": "128256"}  # fmt: skip
    case, _ = read_latency_rows({**LATENCY, **own}, 0)
    assert dict(case.shape)["num_hidden_layers"] == 16
    with pytest.raises(ConfigError, match="not bundled"):
        read_latency_rows({**LATENCY, **own, "d_ff": ""}, 0)


def test_engines_with_kernels_of_their_own_pack_at_level_ideal() -> None:
    case, (row,) = read_method_rows(METHOD, 0)
    assert (case.engine, case.level, row.metric) == ("lmdeploy-pytorch", "ideal", "step")
    assert case.system == "NVIDIA A6000 48GB"
    offloaded = {**METHOD, "stage": "all", "method": "FlexLLMGen", "hardware": "T4 16GB"}
    with pytest.raises(NotApplicableError, match="offloaded"):
        read_method_rows(offloaded, 0)
    # A generation whose timer may hold part of the prompt: predicted, outside the overall figures.
    timed = {**METHOD, "metric": "generation_time_s_100tok", "stage": "decode", "gen_len": "100"}
    _, (row,) = read_method_rows(timed, 0)
    assert (row.metric, row.label, row.primary, row.parts) == ("step", "generation", False, ())


def test_an_engines_own_form_attends_packed_tokens_as_16_bit_ones() -> None:
    """At ``reference`` next to the 16-bit step; no second form where nothing is packed."""
    names = ("full fp16", "KIVI-4bit g32 R128", "StreamingLLM 64+448")
    rows = [{**METHOD, "method": name} for name in names]
    out = predict_rows(rows, kind_named("kv_methods"), Options(kind="kv_methods"))
    step = {(b.group.get("method"), b.group.get("level")): b.mid[0] for b in out.blocks}
    assert set(step) == {
        (None, None), ("kivi", "ideal"), ("kivi", "reference"), ("streaming_llm", "ideal"),
    }  # fmt: skip
    assert step["kivi", "reference"] == pytest.approx(step[None, None], rel=0.01)


def test_the_authors_chain_is_judged_where_their_code_ran() -> None:
    h2o = {**METHOD, "hardware": "A100-80GB", "model": "opt-6.7b", "method": "H2O hh_ratio0.2",
           "stage": "decode", "metric": "decode_tok_s", "note": "FlexGen engine"}  # fmt: skip
    out = predict_rows([h2o], kind_named("kv_methods"), Options(kind="kv_methods"))
    assert [b.group["level"] for b in out.blocks] == ["ideal", "reference"]
    assert [b.primary for b in out.blocks] == [True, False]


def test_rows_of_one_model_are_means_over_several() -> None:
    """What docs/accuracy.md says of the decode rows of full attention and KIVI-4."""

    def rows(name: str) -> list[dict[str, str]]:
        with (MEASURED / name).open(encoding="utf-8", newline="") as file:
            return [r for r in csv.DictReader(file) if "rethink" in r["source"]]

    by_shape: dict[tuple[str, ...], list[float]] = {}
    for row in rows("kv_methods_by_model.csv"):
        key = (row["method"], row["batch"], row["prompt_len"])
        by_shape.setdefault(key, []).append(float(row["value"]))
    named = [
        r for r in rows("kv_methods.csv")
        if r["stage"] == "decoding" and r["method"] in ("full fp16", METHOD["method"])
    ]  # fmt: skip
    assert len(named) == 25
    for row in named:
        values = by_shape[row["method"], row["batch"], row["prompt_len"]]
        assert len(values) == int(row["n_rows"])
        assert sum(values) / len(values) == pytest.approx(float(row["value"]), abs=1e-3)


MEMORY_HEADER = "hw,n_gpu,model,weight_prec,kv_prec,context_tokens,metric,value,unit,source,note"


def memory(folder: Path, *rows: str) -> Path:
    path = folder / "memory.csv"
    path.write_text("\n".join((MEMORY_HEADER, *rows)) + "\n", encoding="utf-8")
    return path


def test_peaks_of_compiled_and_eager_engines_by_hand(tmp_path: Path) -> None:
    """Llama-3.1-8B: 8,030,261,248 parameters, 131,072 bytes of cache per token in 16 bits.

    gpt-fast at 32,768 tokens: 16.0605 GB of weights, 4.2951 + 0.0001 GB of cache, a mask of
    1.0737 GB, and (2 * 14,336 + 2 * 4,096) * 2 bytes alive per token = 2.4159 GB: 23.845 GB.
    transformers at 16,000 tokens: 16.0605 + 2.0972 GB, and (3 * 14,336 + 4 * 4,096) * 2 bytes per
    token = 1.9005 GB: 20.058 GB, of which the cache is 2.0972 GB.
    """
    row = "a100_80g,1,Llama-3.1-8B,bf16,bf16,{context},{metric},{value},{unit},{source},{note}"
    path = memory(
        tmp_path,
        row.format(context=32768, metric="peak_memory_gb", value=23.83, unit="GB",
                   source="github:pytorch/ao README", note=""),
        row.format(context=16000, metric="peak_memory_gib", value=18.713, unit="GiB",
                   source="github:NVIDIA/kvpress", note="compression_ratio=0.0"),
        row.format(context=16000, metric="kv_cache_size_gib", value=1.975, unit="GiB",
                   source="github:NVIDIA/kvpress", note="compression_ratio=0.0"),
    )  # fmt: skip
    result = validate(path)
    predicted = {(w["row"]["metric"]): w["predicted"] for w in result.worst}
    assert predicted["peak_memory_gb"] == pytest.approx(23.845e9, rel=1e-3)
    assert predicted["peak_memory_gib"] == pytest.approx(20.058e9, rel=2e-3)
    assert predicted["kv_cache_size_gib"] == pytest.approx(16_000 * 131_072, rel=1e-9)
    assert result.parts["peak"].n == 2
    assert result.parts["state"].n == 1


def test_pools_take_what_their_notes_say(tmp_path: Path) -> None:
    """24,259 MiB * 0.9 - 16.06 GB - (3 * 14,336 + 4 * 4,096) * 2 * 20,000 bytes - 0.35 GiB."""
    path = memory(
        tmp_path,
        "rtx3090,1,Llama-3.1-8B,bf16,bf16,20000,kv_pool_gib,3.81,GiB,vllm,util 0.90 "
        "non_torch 0.35GiB",
    )
    (worst,) = validate(path, n_worst=5).groups
    assert worst[1].bias_percent == pytest.approx(-2.0, abs=2.0)
    assert not validate(path).overall.n  # pools are not part of the overall figures


def test_a_pool_that_nothing_is_left_for_is_no_number(tmp_path: Path) -> None:
    path = memory(
        tmp_path, "rtx3090,1,Llama-3.1-70B,bf16,bf16,20000,kv_pool_gib,3.81,GiB,vllm,util 0.90"
    )
    result = validate(path)
    assert not result.groups
    ((reason, n),) = result.unsupported
    assert n == 1
    assert "leave no memory" in reason


def test_an_engine_on_a_gpu_that_no_kernel_was_fitted_near_is_a_prior(tmp_path: Path) -> None:
    found = {}
    for hw in ("h100_sxm", "h200_sxm", "mi300x"):
        path = tmp_path / f"{hw}.csv"
        row = {**SERVING, "system": hw, "silicon_tpot_ms": "15", "silicon_ttft_ms": "90"}
        path.write_text(f"{','.join(row)}\n{','.join(row.values())}\n", encoding="utf-8")
        found[hw] = {basis for _, _, basis in validate(path).groups}
    assert found == {"h100_sxm": {"calibrated"}, "h200_sxm": {"transferred"}, "mi300x": {"prior"}}


@pytest.mark.parametrize(
    ("spelling", "model"),
    [
        ("RedHatAI/Meta-Llama-3.1-70B-Instruct-FP8-dynamic", "llama-3.1-70b"),
        ("nvidia/Qwen3-32B-FP4", "qwen3-32b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama-3.1-70b"),
        ("nvidia/DeepSeek-R1-0528-FP4-v2", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "qwen3-8b"),
        ("DeepSeek-R1-Distill-Qwen-7B (bf16)", "deepseek-r1-distill-qwen-7b"),
        ("nvidia/Llama-4-Maverick-17B-128E-Instruct-FP8", "llama-4-maverick"),
        ("moonshotai/Kimi-K2-Instruct-0905", "kimi-k2"),
        ("Qwen/Qwen2.5-Coder-32B-Instruct", "qwen2.5-32b"),
    ],
)
def test_checkpoints_made_of_others_are_known(spelling: str, model: str) -> None:
    assert model_named(spelling).name == model


@pytest.mark.parametrize("cell", ["org/a-model-of-nobody", "DeepSeek-R1-Distill-Qwen-3B", "/etc"])
def test_a_model_nobody_knows_asks_no_hub_and_opens_no_file(
    cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("costmodel.registry._from_hub", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.setattr("costmodel.registry._from_file", lambda *_: pytest.fail("opened a file"))
    read = {"model": cell, **{c: "" for c in ("n_layers", "d_model")}}
    out = predict_rows(
        [{**LATENCY, **read}, {**LATENCY, **read}],
        kind_named("latency_throughput"),
        Options(kind="latency_throughput"),
    )
    assert not out.blocks
    assert all("not bundled" in reason for _, reason in out.unsupported)
    with pytest.raises(UnknownNameError):
        model_named(cell)

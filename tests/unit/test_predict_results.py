"""Rows of a prediction: what tensor parallelism sends, and budgets that hold everything."""

import numpy as np
import pytest

from costmodel.errors import ConfigError, UnknownNameError
from costmodel.hardware import load_hardware
from costmodel.methods import method_names
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Workload

H100 = load_hardware("h100-sxm")
LLAMA = load_architecture("llama-3.1-8b")


def test_what_each_gpu_sends() -> None:
    # 2 all-reduces a layer, 2 * 3/4 of 4,096 elements a token sent by each of four GPUs, and 3/4 of
    # the logits; nothing passes over the host link
    p = predict(LLAMA, "full", Workload.of(2, 1000), H100, tp=4, solve=False)
    per_token = 32 * 2 * 2 * 3 / 4 * 4096 * 2
    logits = 2 * 128_256 * 2 * 3 / 4
    assert p["prefill_collective_bytes"] == 2 * 1000 * per_token + logits
    assert p["decode_collective_bytes"] == 2 * per_token + logits
    assert p["decode_link_bytes"] == 0
    alone = predict(LLAMA, "full", Workload.of(2, 1000), H100, solve=False)
    assert alone["prefill_collective_bytes"] == 0


@pytest.mark.parametrize("method", method_names())
def test_a_budget_that_holds_the_context_gives_up_nothing(method: str) -> None:
    (row,) = predict(LLAMA, method, Workload.of(1, 64), H100, solve=False).rows()
    if row["equals_full"]:
        assert row["accuracy_drop_points"] == 0.0
        assert row["accuracy_source"]
        full = predict(LLAMA, "full", Workload.of(1, 64), H100, solve=False).rows()[0]
        for key in ("state_bytes", "ttft_s", "tpot_s", "decode_hbm_bytes"):
            assert row[key] == full[key], key
    else:
        assert method in {
            "fp8_kv", "flexgen", "kivi", "kvquant", "h2o", "llmlingua2", "kv_offload", "gear",
            "knorm", "hf_quanto", "hf_hqq",
        }  # fmt: skip


def test_an_empty_engine_is_no_default() -> None:
    with pytest.raises(UnknownNameError, match="engine"):
        predict(LLAMA, "full", Workload.of(), H100, engine="")
    with pytest.raises(ConfigError, match="level"):
        predict(LLAMA, "full", Workload.of(), H100, level="best")  # type: ignore[arg-type]


def test_starting_the_kernels_is_a_time_of_its_own() -> None:
    # one token of a short context in transformers: the GPU waits for the host, so the step takes
    # exactly as long as the launches do; 32 layers of more than ten kernels and about 5 us each
    p = predict(
        LLAMA, "full", Workload.of(1, 128), H100, level="reference", engine="transformers",
        solve=False,
    )  # fmt: skip
    assert str(p.decode_bound) == "launch"
    assert p["decode_launch_s"] == p["tpot_s"]
    assert 32 * 10 * 2e-6 < p["decode_launch_s"] < 32 * 100 * 20e-6
    # the number of kernels does not depend on the tokens
    longer = predict(
        LLAMA, "full", Workload.of(8, 65_536), H100, level="reference", engine="transformers",
        solve=False,
    )  # fmt: skip
    assert longer["prefill_launch_s"] == p["prefill_launch_s"]
    assert longer["prefill_launch_s"] < longer["ttft_s"] / 100
    (row,) = p.rows()
    assert row["decode_launch_s"] == p["decode_launch_s"]


@pytest.mark.parametrize("batch", ["a", None, [[1], [2, 3]], 0, -1, 1.5, np.nan, np.inf])
def test_a_workload_is_whole_numbers(batch: object) -> None:
    with pytest.raises(ConfigError, match="batch: expected"):
        Workload.of(batch)  # type: ignore[arg-type]


@pytest.mark.parametrize("tp", ["2", 1.5, 0, None])
def test_tp_is_a_whole_number(tp: object) -> None:
    with pytest.raises(ConfigError, match="tp: expected"):
        predict(LLAMA, "full", Workload.of(), H100, tp=tp)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers", "lccost"])
@pytest.mark.parametrize("level", ["ideal", "reference"])
@pytest.mark.parametrize(
    ("spec", "tokens", "why"),
    [
        # just beyond what they keep: pairs and windows look like those of measured kernels
        ("infllm", [6300, 32_768, 131_072], "InfLLM"),
        ("minference", [3010, 3050, 131_072], "MInference"),
    ],
)
def test_methods_without_measured_kernels_are_priors_with_a_reason(
    engine: str, level: str, spec: str, tokens: list[int], why: str
) -> None:
    for gpu in ("h100-sxm", "a100-sxm-80gb"):
        for context in tokens:
            prediction = predict(
                load_architecture("llama-3.1-70b"),
                spec,
                Workload.of(1, context),
                load_hardware(gpu),
                engine=engine,
                level=level,
                tp=8,
                solve=False,
            )
            assert prediction.basis == "prior"
            (row,) = prediction.rows()
            assert any(n.startswith("prior: ") and why in n for n in row["notes"]), row["notes"]


def test_where_a_budget_holds_everything_nothing_is_unfitted() -> None:
    for spec in ("infllm", "minference", "full"):
        at = Workload.of(1, 2048)
        prediction = predict(
            load_architecture("llama-3.1-8b"), spec, at, load_hardware("h100-sxm"), engine="vllm"
        )
        assert prediction.basis == "calibrated"
        assert prediction.unfitted == ()

"""Peaks and capacity, worked by hand."""

import pytest

from costmodel.hardware import load_hardware
from costmodel.model import Model
from costmodel.options import Options
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Workload

H100 = load_hardware("h100-sxm")
LLAMA = load_architecture("llama-3.1-8b")
WEIGHTS = 16_060_522_496


def peak(method: str, batch: int, context: int, **options: object) -> tuple[float, float]:
    p = predict(LLAMA, method, Workload.of(batch, context), H100, solve=False, **options)  # type: ignore[arg-type]
    return float(p["peak_prefill_bytes"]), float(p["peak_decode_bytes"])


@pytest.mark.parametrize(
    ("method", "sequences"), [("full", 3), ("fp8_kv", 6), ("flexgen:group=32", 10)]
)
def test_sequences_of_128k_on_one_h100(method: str, sequences: int) -> None:
    """(0.9 * 85.03e9 - 16.06e9 of weights) / (17.2, 8.6, 5.4) GB a sequence, less what chunks of
    8,192 tokens and one layer of 16-bit cache (0.54 GB a sequence) need meanwhile.
    """
    p = predict(LLAMA, method, Workload.of(1, 131_072), H100)
    assert p["max_batch"] == sequences


def test_only_one_chunk_of_activations_is_alive() -> None:
    # whole prompts of 64k tokens: 3 * 14,336 + 2 * 4,096 elements a token on our own engine, which
    # lets go of the layer's input, 2 * 4,096 more elsewhere; in chunks of 8,192 an eighth
    cache = 65_536 * 131_072
    whole, _ = peak("full", 1, 65_536, engine="lccost")
    assert whole == WEIGHTS + 536_870_912 + cache + 256 * 131_072 + 65_536 * 51_200 * 2
    chunked, _ = peak("full", 1, 65_536, engine="sglang")
    assert chunked == WEIGHTS + 289_910_292 + cache + 8_192 * 59_392 * 2


@pytest.mark.parametrize(
    ("model", "gpu", "tp"),
    [
        ("llama-3.1-8b", "h100-sxm", 1),
        ("deepseek-v3", "h200-sxm", 8),
        ("deepseek-v3.2", "h200-sxm", 8),
        ("mamba2-2.7b", "h100-sxm", 1),
        ("qwen3-next-80b-a3b", "h200-sxm", 4),
        ("jamba-v0.1", "h200-sxm", 2),
    ],
)
def test_chunks_bound_what_a_prompt_needs_besides_its_cache(model: str, gpu: str, tp: int) -> None:
    """A hundred chunks need as much beside the cache as ten (index scores: ten times, one chunk of
    queries against all keys), never a hundred times.
    """
    run = Model.of(load_architecture(model), "full", load_hardware(gpu), Options(tp=tp))

    def transient(context: float) -> float:
        operations = run.operations(1.0, context, 1.0)["prefill"]
        return max(float(op.transient_bytes) for op in operations if op.name != "index_score")

    assert transient(819_200) == pytest.approx(transient(81_920), rel=1e-3)
    for op in run.operations(1.0, 819_200, 1.0)["prefill"]:
        if op.name == "index_score":
            assert op.transient_bytes == 8_192 * 819_200 * 4


def test_infllm_brings_its_own_chunks() -> None:
    """A million tokens ran on one 80 GB card (MInference README, kv_cache on the host)."""
    p = predict(
        load_architecture("llama-3-8b-gradient-1048k"),
        "infllm",
        Workload.of(1, 1_000_000),
        load_hardware("a100-sxm-80gb"),
        level="reference",
        solve=False,
    )
    assert p["peak_prefill_bytes"] < 30e9
    assert p["fits"]


def test_decode_holds_the_widest_of_a_step() -> None:
    # Mixtral: two experts of 3 * 14,336 elements and 4 * 4,096 a token are wider than 32,000 logits
    # of 6 bytes
    p = predict(
        load_architecture("mixtral-8x7b"),
        "full",
        Workload.of(64, 1024, 16),
        load_hardware("b200-sxm"),
        engine="sglang",
        solve=False,
    )
    cache = 64 * 1040 * 131_072
    besides = float(p["peak_decode_bytes"] - p["weights_bytes"]) - 289_910_292 - cache
    assert besides == 64 * (2 * 3 * 14_336 + 4 * 4_096) * 2

"""Executed FLOPs of every family against torch's flop counter on the model transformers runs.

Eager attention, eager experts, logits of the last token only. The matrices are summed here; what
happens between them is what the mixers say for the engine "transformers" at level "reference".
"""

import json
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from small_configs import FAMILIES

from costmodel.architecture import Architecture
from costmodel.engines import load_engine
from costmodel.mlps import MoE
from costmodel.registry import architecture_from_config
from costmodel.workload import Point

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BATCH, PROMPT = 2, 13

# All kinds of mixers, MLPs and layer patterns.
RUN = [
    "bamba", "cohere2", "deepseek_v2", "deepseek_v32", "deepseek_v4", "ernie4_5_moe",
    "falcon_h1", "falcon_mamba", "gemma2", "gemma4_text", "glm_moe_dsa", "gpt_oss", "gptj",
    "granitemoehybrid", "jamba", "kimi_linear", "llama", "mamba", "mamba2", "mimo_v2_flash",
    "minimax", "nemotron_h", "opt", "qwen2_moe", "qwen3_5_text", "qwen3_next", "zamba2",
]  # fmt: skip
# Gemma 4 runs the layers that share a cache for the last prompt token only.
DECODE_ONLY = {"gemma4_text"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(name: str) -> tuple[Architecture, float, float]:
    """(architecture, FLOPs of the prompt, FLOPs of one step) as counted."""
    from torch.utils.flop_counter import FlopCounterMode

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(name, **FAMILIES[name](random.Random(f"{name}0")))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        ids = torch.randint(3, 60, (BATCH, PROMPT))
        with FlopCounterMode(display=False) as prompt:
            out = model.eval()(ids, use_cache=True, logits_to_keep=1)
        cache: dict[str, Any] = {"past_key_values": getattr(out, "past_key_values", None)}
        if cache["past_key_values"] is None:
            cache = {"cache_params": out.cache_params}
        with FlopCounterMode(display=False) as step:
            model(ids[:, :1], use_cache=True, logits_to_keep=1, **cache)
    saved = json.loads(json.dumps(config.to_dict()))
    architecture = architecture_from_config(saved, name)
    return architecture, prompt.get_total_flops(), step.get_total_flops()


def matrices(architecture: Architecture, tokens: int) -> float:
    """2 m n k of every matrix a token visits, and the head for the last tokens."""
    per_token = sum(n * 2.0 * x.n_in * x.n_out for x, n in architecture.linear_groups)
    for mlp, n in architecture.mlp_groups:
        if isinstance(mlp, MoE):
            experts = mlp.expert_linears(architecture.d_model)
            per_token += n * mlp.top_k * sum(2.0 * x.n_in * x.n_out for x in experts)
    return tokens * per_token + BATCH * 2.0 * architecture.d_model * architecture.vocab_size


def between(architecture: Architecture, phase: str) -> float:
    tokens = np.float64(PROMPT)
    point = Point(
        batch=float(BATCH),
        prompt_tokens=tokens,
        cached_tokens=tokens,
        reserved_tokens=tokens,
        dtype="bf16",
        kv_dtype="bf16",
        level="reference",
        engine=load_engine("transformers"),
    )
    return sum(
        g.n_layers * op.count * float(op.counted_flops)
        for g in architecture.mixer_groups
        for op in getattr(g.mixer, phase)(point)
    )


@pytest.mark.parametrize("name", RUN)
def test_executed_flops_equal_the_flop_counter(name: str) -> None:
    architecture, prompt, step = run(name)
    if name not in DECODE_ONLY:
        expected = matrices(architecture, BATCH * PROMPT) + between(architecture, "prefill")
        assert prompt == pytest.approx(expected, rel=1e-12)
    expected = matrices(architecture, BATCH) + between(architecture, "decode")
    assert step == pytest.approx(expected, rel=1e-12)

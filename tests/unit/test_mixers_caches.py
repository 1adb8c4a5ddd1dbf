"""State of every family against the cache a real model of transformers holds, to the byte.

Each family runs on the CPU with random weights in bf16; the tensors of its cache are counted. fp32
states show because the model is bf16; windows and convolutions because transformers keeps W - 1 and
k columns.
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
from costmodel.registry import architecture_from_config
from costmodel.workload import Point

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BATCH, SHORT, LONG = 2, 3, 13


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are tiny: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# One family per kind of cache and layer pattern; the others differ only in their projections.
CACHES = [
    "bamba", "deepseek_v32", "deepseek_v4", "falcon_h1", "gemma2", "gemma4_text", "gpt_oss",
    "jamba", "kimi_linear", "llama", "llama4_text", "mamba", "mamba2", "mimo_v2_flash", "minimax",
    "nemotron_h", "opt", "qwen3_next", "zamba2",
]  # fmt: skip
DRAWS = {"deepseek_v4": 3, "gemma4_text": 2}


def build(name: str, seed: int) -> tuple[Any, Architecture]:
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(
        name, **FAMILIES[name](random.Random(f"{name}{seed}"))
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config)
    saved = json.loads(json.dumps(config.to_dict()))
    return model.to(torch.bfloat16).eval(), architecture_from_config(saved, name)


def collect(value: Any, found: dict[Any, Any], depth: int = 0) -> None:
    """Every tensor in a cache object, once; scalars are counters."""
    if torch.is_tensor(value):
        if value.dim() > 1:
            found[(value.data_ptr(), tuple(value.shape)) if value.numel() else id(value)] = value
    elif isinstance(value, dict):
        for item in value.values():
            collect(item, found, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            collect(item, found, depth + 1)
    elif hasattr(value, "__dict__") and depth < 6 and "onfig" not in type(value).__name__:
        collect(vars(value), found, depth + 1)


def held_bytes(model: Any, n_tokens: int) -> int:
    ids = torch.randint(3, 60, (BATCH, n_tokens))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(ids, use_cache=True)
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        cache = out.cache_params
    found: dict[Any, Any] = {}
    collect(cache, found)
    return sum(t.numel() * t.element_size() for t in found.values())


def predicted_bytes(architecture: Architecture, n_tokens: int) -> float:
    tokens = np.float64(n_tokens)
    point = Point(
        batch=float(BATCH),
        prompt_tokens=tokens,
        cached_tokens=tokens,
        reserved_tokens=tokens,
        dtype="bf16",
        kv_dtype="bf16",
        level="ideal",
        engine=load_engine("transformers"),
    )
    return float(sum(g.n_layers * g.mixer.state_bytes(point) for g in architecture.mixer_groups))


@pytest.mark.parametrize("name", CACHES)
def test_state_equals_the_cache_of_a_real_model(name: str) -> None:
    for seed in range(DRAWS.get(name, 1)):
        model, architecture = build(name, seed)
        for n_tokens in (SHORT, LONG):
            assert held_bytes(model, n_tokens) == predicted_bytes(architecture, n_tokens)


def test_recurrent_gemma_keeps_its_states_on_its_modules() -> None:
    model, architecture = build("recurrent_gemma", 1)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, 60, (BATCH, LONG)), use_cache=True, past_key_values=cache)
    found: dict[Any, Any] = {}
    collect(cache, found)
    for module in model.modules():
        for attribute in ("conv1d_state", "recurrent_states"):
            tensor = getattr(module, attribute, None)
            if torch.is_tensor(tensor):
                found[id(tensor)] = tensor
    held = sum(t.numel() * t.element_size() for t in found.values())
    assert held == predicted_bytes(architecture, LONG)

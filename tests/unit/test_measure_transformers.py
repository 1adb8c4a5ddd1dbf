"""Points run by transformers' own models and caches: what they hold equals what is predicted."""

import importlib.util
import json
import random

import pytest
import torch
from small_configs import FAMILIES

from costmodel.errors import MissingExtraError, NotApplicableError
from costmodel.hardware import load_hardware
from costmodel.methods.parse import parse_method
from costmodel.registry import load_architecture
from lccost.measuring import memory_predictor, predictor
from measure.flops import count_flops
from measure.observation import observe
from measure.observation_options import How
from measure.points import MeasurePoint
from measure.timing import Budget
from measure.transformers_engine.session import TransformersSession

transformers = pytest.importorskip("transformers")
HOW = How(budget=Budget(seconds=0.01, min_samples=2, max_samples=2, max_warmups=1))
#: Heads of 64, so that groups of 64 fill them.
LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "head_dim": 64,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Threads only wait for each other, and the test process stays where the system puts it."""
    before = torch.get_num_threads()
    monkeypatch.setattr("measure.devices.cpu.pin", lambda threads: None)
    yield
    torch.set_num_threads(before)


def point(tmp_path, method="full", family=None, **settings):
    path = tmp_path / "config.json"
    config = LLAMA
    if family is not None:
        drawn = FAMILIES[family](random.Random(family))
        config = transformers.AutoConfig.for_model(family, **drawn).to_dict()
    path.write_text(json.dumps(config, default=str), "utf-8")
    fields = {"context_tokens": 96, "batch": 2, "output_tokens": 4, "realisation": "reference"}
    return MeasurePoint(
        architecture=load_architecture(str(path)), stack=parse_method(method),
        engine="transformers", model_source=str(path), **{**fields, **settings},
    )  # fmt: skip


def both(point):
    """(observed, predicted) of one point."""
    known = {point.architecture.name: point.architecture}
    return observe(point, HOW), predictor(load_hardware("a100-sxm-80gb"), known)(point.fields)


def installed(package):
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("family", ["llama", "mistral", "jamba", "mamba2", "recurrent_gemma"])
def test_state_and_weights_equal_the_prediction(tmp_path, family):
    """Windows hold W - 1 tokens here, convolutions all their columns."""
    observed, predicted = both(point(tmp_path, family=family, context_tokens=40))
    assert observed["state_bytes"] == predicted["state_bytes"] > 0
    assert observed["weights_bytes"] == predicted["weights_bytes"]
    assert predicted["level"] == "reference"
    assert predicted["engine"] == "transformers"
    assert observed["cache_class"] == "DynamicCache"
    assert observed["executed_prefill_flops"] > 0
    assert observed["tpot_s"] > 0


def test_the_best_form_is_the_preallocated_cache(tmp_path):
    observed, predicted = both(point(tmp_path, realisation="best"))
    assert observed["cache_class"] == "StaticCache"
    assert observed["state_bytes"] == predicted["state_bytes"]
    # room for 96 + 4 tokens: 2 layers, K and V, 2 heads of 64 in bf16, batch 2
    assert observed["state_allocated_bytes"] == 2 * 2 * 2 * 2 * 64 * 2 * 100


@pytest.mark.parametrize(
    ("method", "package"),
    [
        *((f"hf_quanto:bits={b}", "optimum.quanto") for b in (2, 4)),
        *((f"hf_hqq:bits={b}", "hqq") for b in (1, 2, 3, 4, 8)),
    ],
)
def test_quantised_caches_hold_what_is_predicted(tmp_path, method, package):
    if not installed(package):
        with pytest.raises(MissingExtraError, match="pip install"):
            observe(point(tmp_path, method), HOW)
        pytest.skip(f"{package} is not installed")
    observed, predicted = both(point(tmp_path, method))
    assert observed["state_bytes"] == predicted["state_bytes"]
    assert observed["cache_class"] == "QuantizedCache"


def test_a_missing_backend_names_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("measure.runnable.installed", lambda package: False)
    with pytest.raises(MissingExtraError, match="pip install optimum-quanto"):
        observe(point(tmp_path, "hf_quanto"), HOW)


def test_methods_without_a_cache_class_are_refused(tmp_path):
    with pytest.raises(NotApplicableError, match="transformers has caches for full"):
        observe(point(tmp_path, "h2o"), HOW)
    with pytest.raises(NotApplicableError, match="CUDA device"):
        observe(point(tmp_path, "kv_offload"), HOW)


def test_some_layers_only(tmp_path):
    observed, predicted = both(point(tmp_path, layers=1))
    assert observed["state_bytes"] == predicted["state_bytes"]
    assert observed["weights_bytes"] == predicted["weights_bytes"]
    assert predicted["whole_model"]["state_bytes"] == 2 * predicted["state_bytes"]


def test_a_prompt_that_takes_too_long_is_filled_in(tmp_path):
    how = How(budget=HOW.budget, max_prefill_s=0.5, predicted_ttft_s=9.0)
    observed = observe(point(tmp_path), how)
    assert observed["ttft_s"] is None
    assert "was not run" in observed["message"]
    assert observed["state_bytes"] == 2 * 2 * 2 * 2 * 64 * 2 * 96


@pytest.mark.gpu
def test_offloading_on_a_real_device(tmp_path):
    observed, predicted = both(point(tmp_path, "kv_offload", device="cuda:0"))
    assert observed["state_host_bytes"] > 0
    assert observed["weights_bytes"] == predicted["weights_bytes"]
    assert observed["tpot_s"] > 0


@pytest.mark.parametrize("realisation", ["reference", "best"])
@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "gemma2", "gpt_oss", "mixtral", "deepseek_v3", "qwen3_next",
     "recurrent_gemma", "jamba", "llama4_text"],
)  # fmt: skip
def test_executed_flops_are_what_torch_counts(tmp_path, family, realisation):
    """Grouped experts, masked windows and the room of a static cache included."""
    p = point(tmp_path, family=family, context_tokens=40, realisation=realisation, dtype="fp32")
    session = TransformersSession(p, torch.device("cpu"))
    session.prepare()
    square = realisation == "reference"
    counted = [count_flops(call, square=square) for call in (session.prefill, session.decode)]
    predicted = memory_predictor("cpu", {p.architecture.name: p.architecture})(p.fields)
    names = ("executed_prefill_flops", "executed_decode_flops")
    assert counted == pytest.approx([predicted[n] for n in names], rel=1e-3)
    if realisation == "best" and not any(m.max_kv_tokens() for m in session._mixers):
        assert session.allocated_bytes == predicted["state_allocated_bytes"]


def test_a_family_with_a_cache_of_its_own_is_refused(tmp_path):
    with pytest.raises(NotApplicableError, match="cache class of its own"):
        observe(point(tmp_path, family="minimax"), HOW)

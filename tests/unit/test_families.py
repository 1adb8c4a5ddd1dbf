"""Every family against the model that transformers builds from the same config, and its traps."""

import json
import random
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_configs import FAMILIES

from costmodel.architecture import Architecture
from costmodel.errors import (
    ConfigError,
    MissingExtraError,
    UnknownNameError,
    UnsupportedArchitectureError,
)
from costmodel.families import MODULES, WRAPPED, known_families
from costmodel.mixers.attention import Attention
from costmodel.registry import architecture_from_config, load_architecture, model_names
from measure.config_numerics import numerics_of

BUNDLED = Path(__file__).parents[2] / "costmodel" / "architectures"


def transformers_config(name: str, seed: int) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers.AutoConfig.for_model(name, **FAMILIES[name](random.Random(f"{name}{seed}")))


def count(model: Any) -> tuple[int, int]:
    """(all parameters, those of routed experts), every tensor once."""
    named = {id(p): (n, p.numel()) for n, p in model.named_parameters()}.values()
    routed = sum(k for n, k in named if ".experts." in n and "shared" not in n)
    return sum(k for _, k in named), routed


def top_k_of(config: Any) -> tuple[int, int]:
    """(experts per token, experts) under whatever names the family gives them."""
    keys = ("top_k_experts", "moe_k", "moe_topk", "num_experts_per_tok", "num_experts_per_token")
    top_k = next((getattr(config, k) for k in keys if getattr(config, k, None)), 0)
    keys = ("moe_num_experts", "n_routed_experts", "num_local_experts", "num_experts")
    return top_k, next((getattr(config, k) for k in keys if getattr(config, k, None)), 1)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_parameters_equal_the_model_transformers_builds(name: str) -> None:
    torch = pytest.importorskip("torch")
    for seed in range(4):
        config = transformers_config(name, seed)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoModelForCausalLM

            total, routed = count(AutoModelForCausalLM.from_config(config))
        top_k, n_experts = top_k_of(config)
        saved = json.loads(json.dumps(config.to_dict()))
        architecture = architecture_from_config(saved, name)
        assert architecture.n_parameters == total, saved
        assert architecture.n_active_parameters == total - routed + routed * top_k // n_experts


def test_every_family_is_counted_or_is_another_name_for_one_that_is() -> None:
    other_names = {
        "gemma3": "gemma3_text",
        "gemma4": "gemma4_text",
        "kimi_k2": "deepseek_v3",
        "kimi_k25": "deepseek_v3",
        "llama4": "llama4_text",
        "minimax_text_01": "minimax",
        "qwen2_5_vl": "qwen2",
        "qwen2_5_vl_text": "qwen2",
        "qwen2_vl": "qwen2",
        "qwen2_vl_text": "qwen2",
        "qwen3_5": "qwen3_5_text",
        "qwen3_5_moe": "qwen3_5_moe_text",
        "qwen3_vl_moe_text": "qwen3_moe",
        "qwen3_vl_text": "qwen3",
        "glm4v_moe_text": "glm4_moe",
        "mamba_ssm": "mamba, mamba2 in mamba_ssm's own form",
        "rwkv5": "no transformers class; counted by hand in the golden test",
    }
    assert set(MODULES) == set(FAMILIES) | set(other_names)
    assert set(WRAPPED.values()) <= set(MODULES)


WRAPPERS = {
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "gemma3": "gemma3_text",
    "mistral3": "mistral",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_read_through_their_text_config(name: str) -> None:
    text = FAMILIES[WRAPPERS[name]](random.Random(5))
    alone = architecture_from_config({"model_type": WRAPPERS[name], **text}, "text")
    wrapped = architecture_from_config(
        {"model_type": name, "vision_config": {"hidden_size": 1152}, "text_config": text}, "vlm"
    )
    assert wrapped.layers == alone.layers
    assert wrapped.n_parameters == alone.n_parameters
    assert any("text tower" in note for note in wrapped.notes)


def test_the_wrapper_ties_when_its_text_config_says_nothing() -> None:
    text = FAMILIES["qwen3"](random.Random(0))
    text.pop("tie_word_embeddings")
    text["model_type"] = "qwen3"
    tied = architecture_from_config({"tie_word_embeddings": True, "text_config": text}, "x")
    untied = architecture_from_config({"text_config": text}, "x")
    assert untied.n_parameters - tied.n_parameters == text["vocab_size"] * text["hidden_size"]


# Traps ---------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}


def attention_of(architecture: Architecture, index: int = 0) -> Attention:
    mixer = architecture.layers[index].mixers[0]
    assert isinstance(mixer, Attention)
    return mixer


def test_absent_kv_heads_mean_as_many_as_heads() -> None:
    mixer = attention_of(architecture_from_config(LLAMA, "x"))
    assert (mixer.n_kv_heads, mixer.head_dim) == (32, 128)


def test_absent_window_of_mistral_is_no_window() -> None:
    config = {**LLAMA, "model_type": "mistral", "num_key_value_heads": 8}
    assert attention_of(architecture_from_config(config, "x")).window_tokens is None
    config["sliding_window"] = 4096
    assert attention_of(architecture_from_config(config, "x")).window_tokens == 4096


def test_qwen_window_needs_its_switch_and_starts_at_a_layer() -> None:
    config = {**LLAMA, "model_type": "qwen2", "sliding_window": 1024, "max_window_layers": 1}
    off = architecture_from_config({**config, "use_sliding_window": False}, "x")
    on = architecture_from_config({**config, "use_sliding_window": True}, "x")
    assert [attention_of(off, i).window_tokens for i in (0, 1)] == [None, None]
    assert [attention_of(on, i).window_tokens for i in (0, 1)] == [None, 1024]


def test_kimi_linear_counts_layers_from_one() -> None:
    kinds = [x.mixers[0].KIND for x in load_architecture("kimi-linear-48b-a3b").layers]
    assert [i for i, kind in enumerate(kinds) if kind == "mla"] == [3, 7, 11, 15, 19, 23, 26]


def test_mamba_ssm_files_have_no_model_type() -> None:
    """state-spaces/mamba-2.8b and mistralai/Mamba-Codestral-7B-v0.1 as mamba_ssm saves them."""
    first = {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True}
    a = architecture_from_config({**first, "pad_vocab_size_multiple": 8}, "x")
    assert a.n_parameters == load_architecture("mamba-2.8b").n_parameters
    second = {
        "d_model": 4096, "n_layer": 64, "vocab_size": 32768, "tie_embeddings": False,
        "ssm_cfg": {"ngroups": 8, "layer": "Mamba2"}, "pad_vocab_size_multiple": 1,
    }  # fmt: skip
    b = architecture_from_config(second, "x")
    assert b.n_parameters == load_architecture("mamba-codestral-7b").n_parameters
    assert b.layers[0].mixers == load_architecture("mamba-codestral-7b").layers[0].mixers
    with pytest.raises(ConfigError, match="attn_layer_idx"):
        architecture_from_config({**first, "attn_layer_idx": [9, 18]}, "x")


def test_granite_model_type_is_not_its_architecture() -> None:
    config = json.loads((BUNDLED / "granite-4.0-h-tiny.json").read_text("utf-8"))
    config["layer_types"] = ["attention"] * 40
    kinds = {m.KIND for x in architecture_from_config(config, "micro").layers for m in x.mixers}
    assert kinds == {"attention"}


def test_glm_45_air_needs_its_own_head_size() -> None:
    config = json.loads((BUNDLED / "glm-4.5-air.json").read_text("utf-8"))
    assert attention_of(architecture_from_config(config, "air")).head_dim == 128
    del config["head_dim"]  # 4096 / 96 is no whole number: refuse, do not round
    with pytest.raises(ConfigError, match="head_dim is missing"):
        architecture_from_config(config, "air")


def test_falcon_h1_has_two_mixers_in_every_layer() -> None:
    for layer in load_architecture("falcon-h1-1.5b").layers:
        assert [m.KIND for m in layer.mixers] == ["attention", "mamba2"]


def test_llama4_is_chunked_except_every_fourth_layer() -> None:
    a = load_architecture("llama-4-scout")
    chunks = [attention_of(a, i).chunk_tokens for i in range(8)]
    assert chunks == [8192, 8192, 8192, None] * 2


def test_gemma4_shares_caches_of_its_last_layers() -> None:
    config = FAMILIES["gemma4_text"](random.Random(1)) | {"num_kv_shared_layers": 2}
    a = architecture_from_config({"model_type": "gemma4_text", **config}, "x")
    assert [attention_of(a, i).owns_cache for i in range(4)] == [True, True, False, False]
    assert attention_of(a, 3).kv_elements_per_token() == 0


def test_zamba2_stores_its_shared_blocks_once() -> None:
    a = load_architecture("zamba2-2.7b")
    hybrid = [x for x in a.layers if x.shared_with is not None]
    assert len(hybrid) == 9
    assert [x.shared_with for x in hybrid[:4]] == [0, 1, 0, 1]
    assert len(a.shared_layers) == 2
    stored = sum(isinstance(m, Attention) for x in a.stored_layers for m in x.mixers)
    assert stored == 2


def test_glm_reuses_the_index_where_the_schedule_says_so() -> None:
    config = json.loads((BUNDLED / "glm-5.json").read_text("utf-8"))
    dense = architecture_from_config(config, "glm")
    shared = architecture_from_config(
        {**config, "index_topk_freq": 4, "index_skip_topk_offset": 2}, "glm"
    )
    per_layer = 2048 * 32 * 128 + 6144 * 128 + 6144 * 32 + 2 * 128
    owners = sum(max(i - 1, 0) % 4 == 0 for i in range(78))
    assert dense.n_parameters - shared.n_parameters == (78 - owners) * per_layer


# What nobody understood ------------------------------------------------------------------------


def test_an_unknown_family_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedArchitectureError) as error:
        architecture_from_config({**LLAMA, "model_type": "foo_linear"}, "foo/config.json")
    for word in ("foo/config.json", "foo_linear", "qwen3_next", "--assume llama"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    "key",
    ["sliding_window", "attention_chunk_size", "kv_lora_rank", "num_local_experts",
     "linear_attn_config", "index_topk", "mamba_d_state", "compress_ratios", "layer_types",
     "num_kv_shared_layers", "block_sparse_pattern", "recurrent_layers"],
)  # fmt: skip
def test_an_attention_key_nobody_understood_is_an_error_that_names_it(key: str) -> None:
    value: object = ["odd_attention"] * 2 if key == "layer_types" else 8
    with pytest.raises(UnsupportedArchitectureError) as error:
        architecture_from_config({**LLAMA, key: value}, "x.json")
    assert key in str(error.value)
    assert "llama" in str(error.value)
    assert "--assume llama" in str(error.value)


@pytest.mark.parametrize("value", [None, False, 0, [], {}, ""])
def test_a_key_that_is_off_does_no_harm(value: object) -> None:
    a = architecture_from_config({**LLAMA, "sliding_window": value, "use_mla": value}, "x")
    assert a.n_parameters == architecture_from_config(LLAMA, "x").n_parameters


def test_training_and_numeric_keys_do_no_harm() -> None:
    noise = {
        "attention_dropout": 0.1,
        "attn_logit_softcapping": None,
        "residual_multiplier": 1.0,
        "rope_scaling": {"type": "linear", "factor": 8.0},
        "router_aux_loss_coef": 0.1,
        "_attn_implementation": "sdpa",
        "num_logits_to_keep": 1,
        "time_step_limit": [0.0, float("inf")],
    }
    assert architecture_from_config({**LLAMA, **noise}, "x").n_layers == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0),
        ("logits_soft_cap", 30.0), ("residual_multiplier", 0.22), ("logits_scaling", 8.0),
        ("query_pre_attn_scalar", 144), ("clip_qkv", 8.0), ("swiglu_limit", 7.0),
        ("odd_soft_cap", 1.0),
    ],
)  # fmt: skip
def test_arithmetic_that_a_family_does_not_have_is_an_error(key: str, value: float) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=f"{key} = {value}"):
        architecture_from_config({**LLAMA, key: value}, "x.json")
    assumed = architecture_from_config({**LLAMA, key: value}, "x.json", assume="llama")
    assert any(key in note for note in assumed.notes)
    # what is left out of the prediction is left out of the run
    assert numerics_of("llama", {**LLAMA, key: value}) == numerics_of("llama", LLAMA)


def test_arithmetic_that_a_family_has_is_read() -> None:
    gemma = {
        **LLAMA, "model_type": "gemma2", "attn_logit_softcapping": 50.0, "sliding_window": 8,
        "head_dim": 16, "query_pre_attn_scalar": 144, "num_key_value_heads": 2,
    }  # fmt: skip
    assert architecture_from_config(gemma, "x.json").n_layers == 2
    assert numerics_of("gemma2", gemma).attention_softcap == 50.0


def test_assume_is_the_explicit_way_round_and_the_result_says_so() -> None:
    config = {**LLAMA, "model_type": "foo_linear", "kv_lora_rank": 512}
    a = architecture_from_config(config, "x", assume="llama")
    assert a.assumed
    assert a.family == "llama"
    assert any("foo_linear" in note for note in a.notes)
    assert any("kv_lora_rank" in note for note in a.notes)
    with pytest.raises(UnknownNameError, match="mistral"):
        load_architecture("llama-3-8b", assume="mistrall")


# Names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("LLAMA-3.1-8B-instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("gradientai/Llama-3-8B-Instruct-Gradient-1048k", "llama-3-8b-gradient-1048k"),
        ("Llama-2-7b-hf", "llama-2-7b"),
        ("OPT-6.7B", "opt-6.7b"),
        ("state-spaces/mamba-2.8b", "mamba-2.8b"),
        ("Qwen3-235B-A22B-FP8", "qwen3-235b-a22b-fp8"),
        ("zhipuai/GLM-5", "glm-5"),
        ("nvidia/DeepSeek-R1-NVFP4", "deepseek-r1-nvfp4"),
        ("RWKV-5-World-7B", "rwkv-5-world-7b"),
        ("recurrentgemma-9b-it", "recurrentgemma-9b"),
        ("havenhq/mamba-chat", "mamba-chat"),
        (" jamba-v0.1 ", "jamba-v0.1"),
    ],
)
def test_full_ids_last_parts_and_aliases_resolve(spelling: str, name: str) -> None:
    assert load_architecture(spelling).name == name


def test_unknown_names_get_near_matches() -> None:
    with pytest.raises(UnknownNameError, match=r"llama-3\.1-8b"):
        load_architecture("lama-3.1-8b")


class FakeHub(ModuleType):
    """huggingface_hub as far as lccost uses it: online with what it has, or unreachable."""

    def __init__(self, *, online: Path | Exception, cached: Path | None = None) -> None:
        super().__init__("huggingface_hub")
        self.online, self.cached = online, cached
        self.asked: list[str] = []

    def hf_hub_url(self, repo: str, file: str) -> str:
        return f"https://hub/{repo}/{file}"

    def get_hf_file_metadata(self, url: str, timeout: float) -> None:
        assert 0 < timeout <= 5
        self.asked.append(url)
        if isinstance(self.online, Exception):
            raise self.online

    def hf_hub_download(self, repo: str, file: str, local_files_only: bool = False) -> str:
        if local_files_only and self.cached is None:
            raise FileNotFoundError("not in the cache")
        assert local_files_only or isinstance(self.online, Path), "would retry for half a minute"
        return str(self.cached if local_files_only else self.online)


def test_a_hub_id_is_fetched_only_when_it_is_not_bundled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), "utf-8")
    hub = FakeHub(online=tmp_path / "config.json")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load_architecture("someone/new-model").hub_id == "someone/new-model"
    load_architecture("meta-llama/Llama-3.1-8B")
    assert hub.asked == ["https://hub/someone/new-model/config.json"]


class UnreachableError(Exception):
    """As httpx's errors: no OSError."""


def test_offline_the_hub_is_asked_once_and_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = FakeHub(online=UnreachableError("Name or service not known"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(UnknownNameError) as caught:
        load_architecture("meta-llama/Llama-3.1-9B")
    text = str(caught.value)
    assert text.index("Did you mean: llama-3.1-8b") < text.index("Name or service not known")
    assert "--model path/to/config.json" in text
    assert len(hub.asked) == 1


def test_offline_what_was_fetched_before_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), "utf-8")
    hub = FakeHub(online=UnreachableError(), cached=tmp_path / "config.json")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load_architecture("someone/new-model").hub_id == "someone/new-model"


def test_without_the_hub_extra_a_hub_id_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=r"lccost\[hub\]"):
        load_architecture("someone/new-model")


def test_a_path_and_its_folder_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA), "utf-8")
    by_folder = load_architecture(folder)
    assert by_folder.name == "tiny"
    assert by_folder.n_parameters == load_architecture(folder / "config.json").n_parameters


def test_the_index_is_the_one_its_script_writes() -> None:
    names: dict[str, str] = {}
    for path in BUNDLED.glob("*.json"):
        if path.name == "index.json":
            continue
        own = json.loads(path.read_text("utf-8"))["_lccost"]
        assert own["source"], path.name
        assert own["confidence"] in ("high", "medium", "low"), path.name
        for spelling in (path.stem, own["hub_id"], *own["names"]):
            for text in (spelling, spelling.rsplit("/", 1)[-1]):
                assert names.setdefault(text.lower(), path.stem) == path.stem
    index = json.loads((BUNDLED / "index.json").read_text("utf-8"))
    assert index["names"] == names, "run python scripts/index_architectures.py"
    assert sorted(index["models"]) == model_names()


def test_errors_list_every_family_once() -> None:
    assert known_families() == sorted(set(known_families()))


# Quantisation ----------------------------------------------------------------------------------


def test_quantisation_is_kept_immutable_and_hashable() -> None:
    q = dict(load_architecture("deepseek-v3").quantization or ())
    assert q["quant_method"] == "fp8"
    assert q["weight_block_size"] == (128, 128)
    assert dict(load_architecture("gpt-oss-20b").quantization or ())["quant_method"] == "mxfp4"
    kimi = load_architecture("kimi-k2.5")  # the text config carries it
    groups = dict(dict(kimi.quantization or ())["config_groups"])  # type: ignore[call-overload]
    assert dict(dict(groups["group_0"])["weights"])["num_bits"] == 4
    assert hash(kimi.quantization) == hash(kimi.quantization)
    assert load_architecture("llama-3-8b").quantization is None

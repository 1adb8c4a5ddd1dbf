"""Local checkpoints: what transformers saves is read back bit by bit; hostile ones are refused."""

import json
import random
import warnings
from dataclasses import replace

import pytest
import torch
from small_configs import FAMILIES

from costmodel.errors import ConfigError
from costmodel.methods.parse import parse_method
from costmodel.registry import load_architecture
from measure.checkpoint_check import check
from measure.checkpoint_files import load_state, shards
from measure.checkpoints import PROVED
from measure.points import MeasurePoint
from measure.sessions import TorchSession

transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file
CPU = torch.device("cpu")


def saved(family, folder, **settings):
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family](random.Random(family)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder, **settings)
    return model


# Every family is tried whole in the suite of engines; here one of every form of storage: plain,
# tied, experts one by one, experts joined, and those whose modules have other names than the file.
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mixtral",
        "gpt_oss",
        "jamba",
        "kimi_linear",
        "deepseek_v3",
        "mamba2",
        "nemotron_h",
        "llama4_text",
    ],
)
def test_a_sharded_checkpoint_is_read_to_the_bit(family, tmp_path):
    model = saved(family, tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    found = load_state(tmp_path, torch.float32, CPU)
    expected = model.state_dict()
    if family == "nemotron_h":  # its files call the root as the first modules did
        expected = {name.replace("model.", "backbone.", 1): x for name, x in expected.items()}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(found) | tied == set(expected) | tied
    for name in set(expected) & set(found):
        assert torch.equal(found[name], expected[name].float()), name
    assert family in PROVED


def test_a_point_runs_with_the_weights_of_a_checkpoint(tmp_path):
    model = saved("llama", tmp_path).eval()
    architecture = load_architecture(str(tmp_path))
    point = MeasurePoint(
        architecture=architecture, stack=parse_method("full"), context_tokens=12, dtype="fp32",
        model_source=str(tmp_path), weights=str(tmp_path), output_tokens=2,
    )  # fmt: skip
    session = TorchSession(point, CPU)
    session.prepare()
    session.prefill()
    with torch.no_grad():
        expected = model(session.prompt).logits[:, -1]
    torch.testing.assert_close(session.logits, expected, atol=1e-4, rtol=1e-4)
    assert point.fields["weights"] == "checkpoint"


def test_headers_alone_say_whether_a_checkpoint_is_the_models(tmp_path):
    saved("qwen2", tmp_path)
    point = MeasurePoint(
        architecture=load_architecture(str(tmp_path)), stack=parse_method("full"),
        context_tokens=12, model_source=str(tmp_path), weights=str(tmp_path),
    )  # fmt: skip
    check(point)
    wider = replace(point.architecture, vocab_size=point.architecture.vocab_size + 1)
    with pytest.raises(ConfigError, match="expects embedding of"):
        check(replace(point, architecture=wider))
    state = load_file(tmp_path / "model.safetensors")
    for part in "qkv":  # the family has biases, this file has none
        del state[f"model.layers.0.self_attn.{part}_proj.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="qkv_bias"):
        check(point)


def test_only_the_layers_that_run_are_read(tmp_path):
    saved("llama", tmp_path)
    names = load_state(tmp_path, torch.bfloat16, CPU, n_layers=1)
    assert any(".layers.0." in n for n in names)
    assert not any(".layers.1." in n for n in names)
    assert {t.dtype for t in names.values()} == {torch.bfloat16}


def index(folder, weight_map):
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", ".safetensors", 7,
     "..\\evil.safetensors", "x.safetensors\n"],
)  # fmt: skip
def test_an_index_names_files_beside_it_only(tmp_path, name):
    save_file({"w": torch.ones(1)}, tmp_path.parent / "evil.safetensors")
    with pytest.raises(ConfigError, match="beside it"):
        shards(index(tmp_path, {"w": name}))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000]
)
def test_an_index_that_is_none_is_said(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match="index"):
        shards(tmp_path)


def test_files_and_tensors_that_the_index_promises_must_be_there(tmp_path):
    index(tmp_path, {"w": "a.safetensors", "x": "a.safetensors"})
    with pytest.raises(ConfigError, match=r"a\.safetensors, which is not"):
        load_state(tmp_path, torch.float32, CPU)
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="lacks x"):
        load_state(tmp_path, torch.float32, CPU)


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ConfigError, match="a pickle"):
        load_state(tmp_path, torch.float32, CPU)


def test_what_is_no_safetensors_or_is_quantised_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match="not a safetensors file"):
        load_state(tmp_path, torch.float32, CPU)
    save_file({"w": torch.ones(4, dtype=torch.int8)}, path)
    with pytest.raises(ConfigError, match="quantised"):
        load_state(tmp_path, torch.float32, CPU)
    with pytest.raises(ConfigError, match="expected a checkpoint folder"):
        load_state(tmp_path / "nowhere", torch.float32, CPU)


def test_a_missing_expert_is_said(tmp_path):
    experts = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": torch.ones(2, 2) for i in (0, 2)}
    save_file(experts, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="lacks some of its experts"):
        load_state(tmp_path, torch.float32, CPU)

"""The prompt compressor against transformers' XLM-RoBERTa with the same weights, and its cost."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from method_points import point, total
from safetensors.torch import load_file, save_file

from costmodel.architecture import Layer
from costmodel.errors import ConfigError, MissingExtraError
from costmodel.methods.llmlingua2 import Encoder, LLMLingua2, encoder_operations
from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from costmodel.mlps import DenseMLP
from costmodel.registry import load_architecture
from lccost.measuring import Request
from lccost.preflight import require_encoder
from measure.encoder_files import shapes, theirs
from measure.flops import count_flops
from measure.methods.llmlingua2 import LLMLingua2Compressor
from measure.points import MeasurePoint
from measure.sessions import TorchSession

torch.set_num_threads(1)

SMALL = Encoder(n_layers=2, d_model=24, d_ff=40, n_heads=3, vocab_size=90, n_positions=514)
CPU = torch.device("cpu")


def test_probabilities_equal_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.XLMRobertaConfig(
        num_hidden_layers=2,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=3,
        vocab_size=90,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=2,
        layer_norm_eps=1e-5,
        initializer_range=0.5,
    )
    theirs = transformers.XLMRobertaForTokenClassification(config).to(torch.bfloat16).float().eval()
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    ids = torch.arange(40)[None] * 7 % 80 + 3
    chunk = torch.cat((torch.tensor([[0]]), ids, torch.tensor([[2]])), dim=1)
    with torch.no_grad():
        expected = theirs(chunk).logits[0, 1:-1].softmax(-1)[:, 1]
    compressor = LLMLingua2Compressor(
        LLMLingua2(), dtype=torch.bfloat16, device=CPU, encoder=SMALL, checkpoint=tmp_path
    )
    compressor.weights = {name: x.float() for name, x in compressor.weights.items()}
    found = compressor.probabilities(ids)[0]
    assert float(expected.max() - expected.min()) > 0.2  # they do differ
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def write_encoder(folder, encoder=SMALL, **config):
    """A checkpoint of ``encoder``'s sizes as transformers names it."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder.mkdir(exist_ok=True)
    settings = {
        "model_type": "xlm-roberta", "num_hidden_layers": encoder.n_layers,
        "hidden_size": encoder.d_model, "intermediate_size": encoder.d_ff,
        "num_attention_heads": encoder.n_heads, "vocab_size": encoder.vocab_size,
        "max_position_embeddings": encoder.n_positions, **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {}
    for name, shape in shapes(encoder):
        parts = theirs(name)
        for part in parts:
            tensors[part] = torch.full((shape[0] // len(parts), *shape[1:]), 0.01)
    safetensors.save_file(tensors, folder / "model.safetensors")
    return folder


def session_of(tmp_path, encoder):
    model = MeasurePoint(
        architecture=load_architecture("llama-3.2-1b"), stack=parse_method("llmlingua2:rate=0.25"),
        context_tokens=40, encoder=str(encoder), output_tokens=2, layers=1,
    )  # fmt: skip
    tiny = Layer(
        mixers=(Attention(n_heads=2, n_kv_heads=1, head_dim=8, v_head_dim=8),),
        mlps=(DenseMLP(d_ff=16),),
        other_parameters=32,
    )
    architecture = replace(
        model.architecture, d_model=16, vocab_size=90, layers=(tiny,), other_parameters=16
    )
    return TorchSession(replace(model, architecture=architecture), CPU)


def test_a_local_encoder_of_any_size_is_run_and_the_record_says_which(tmp_path):
    session = session_of(tmp_path, write_encoder(tmp_path / "small"))
    session.prepare()
    session.prefill()
    assert session.caches[0].n_tokens == 10
    assert session.point.fields["encoder"] == "checkpoint small"
    assert f"{SMALL.n_parameters:,} parameters from small" in session.details()["prompt_encoder"]
    other = replace(session.point, encoder=None)
    assert other.record_key != session.point.record_key
    assert "encoder" not in other.fields


class _Tokenizer:
    """Ids are words, as text and back."""

    def __len__(self):
        return 50

    def decode(self, ids, *, skip_special_tokens):
        return " ".join(map(str, ids))

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [int(x) for x in text.split()]}


class _PromptCompressor:
    """Keeps every third word: more than a rate of a quarter asks for."""

    def __init__(self, model_name, device_map, model_config, use_llmlingua2):
        assert model_config == {"trust_remote_code": False, "use_safetensors": True}
        assert use_llmlingua2
        self.model, self.tokenizer = torch.nn.Linear(3, 2), _Tokenizer()

    def compress_prompt(self, context, rate):
        assert rate == 0.25
        return {"compressed_prompt": " ".join(context[0].split()[::3])}


def test_the_package_is_given_the_folder_and_its_tokens_are_cut(tmp_path, monkeypatch):
    module = types.ModuleType("llmlingua")
    module.PromptCompressor = _PromptCompressor
    monkeypatch.setitem(sys.modules, "llmlingua", module)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # put back behind the test
        monkeypatch.setenv(name, "0")
    session = session_of(tmp_path, f"llmlingua:{tmp_path / 'model'}")
    tokens = session.prompt
    assert session.compressor.compress(tokens).tolist() == (tokens % 50)[:, ::3][:, :10].tolist()
    session.prepare()
    session.prefill()
    assert session.caches[0].n_tokens == 10
    assert session.compressor.nbytes == 4 * 8
    assert "with model; kept 14 tokens" in session.details()["prompt_encoder"]
    assert session.point.fields["encoder"] == "llmlingua model"


def request(method, encoder):
    return Request(
        models=("llama-3.2-1b",), methods=(method,), contexts=(16,), batches=(1,), layers=1,
        output_tokens=2, device="cpu", engine="torch", realisation=None, dtype=None, threads=1,
        gpu=None, seed=0, encoder=str(encoder),
    )  # fmt: skip


def test_what_is_no_encoder_fails_up_front(tmp_path, monkeypatch, capsys):
    folder = write_encoder(tmp_path / "small")
    require_encoder(request("llmlingua2", folder))
    assert "predictions are of XLM-RoBERTa-large" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="goes with a method"):
        require_encoder(request("kivi", folder))
    with pytest.raises(ConfigError, match=r"config\.json and model\.safetensors"):
        require_encoder(request("llmlingua2", tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="expected xlm-roberta"):
        require_encoder(request("llmlingua2", write_encoder(tmp_path / "b", model_type="bert")))
    with pytest.raises(ConfigError, match="expected words of"):
        require_encoder(request("llmlingua2", write_encoder(tmp_path / "c", vocab_size=91)))
    with pytest.raises(ConfigError, match=r"no tensor roberta\.encoder\.layer\.2"):
        require_encoder(request("llmlingua2", write_encoder(tmp_path / "d", num_hidden_layers=3)))
    torn = write_encoder(tmp_path / "e")  # query and key together have the right size
    file = torn / "model.safetensors"
    tensors = load_file(file)
    query, key = theirs("0.qkv")[:2]
    d = SMALL.d_model
    tensors |= {query: torch.zeros(d + 8, d), key: torch.zeros(d - 8, d)}
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"query.*expected 0\.qkv of"):
        require_encoder(request("llmlingua2", torn))
    monkeypatch.setattr("lccost.preflight.installed", lambda module: False)
    with pytest.raises(MissingExtraError, match="pip install llmlingua"):
        require_encoder(request("llmlingua2", f"llmlingua:{folder}"))


@pytest.mark.parametrize("n", [1, 100, 510, 511, 1100])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("form", "level"), [("best", "ideal"), ("reference", "reference")])
def test_kept_tokens_weights_and_flops(n, batch, form, level):
    method = LLMLingua2(rate=0.3)
    compressor = LLMLingua2Compressor(
        method, dtype=torch.float32, device=CPU, encoder=SMALL, realisation=form
    )
    assert compressor.nbytes == 2 * SMALL.n_parameters
    tokens = torch.randint(50_000, (batch, n), generator=torch.Generator().manual_seed(n))
    found = []
    counted = count_flops(lambda: found.append(compressor.compress(tokens)))
    where = point(n, batch=batch, level=level)
    assert counted == float(total(encoder_operations(SMALL, where), "counted_flops"))
    kept = max(1, int(0.3 * n + 1e-9))
    chances = compressor.probabilities(tokens)
    for b in range(batch):
        best = sorted(chances[b].topk(kept).indices.tolist())
        assert found[0][b].tolist() == tokens[b, best].tolist()


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        LLMLingua2Compressor(
            LLMLingua2(), dtype=torch.bfloat16, device=CPU, encoder=SMALL, checkpoint=tmp_path
        )


def test_padding_changes_no_probability():
    published, best = (
        LLMLingua2Compressor(
            LLMLingua2(), dtype=torch.bfloat16, device=CPU, encoder=SMALL, realisation=form
        )
        for form in ("reference", "best")
    )
    for compressor in (published, best):
        compressor.weights = {name: 9 * x.float() for name, x in compressor.weights.items()}
    tokens = torch.arange(2 * 700).view(2, 700)  # a whole chunk and a part of one
    found, expected = (x.probabilities(tokens) for x in (published, best))
    assert float(expected.max() - expected.min()) > 0.2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

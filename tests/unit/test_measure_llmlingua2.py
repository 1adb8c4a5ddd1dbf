"""The prompt compressor against transformers' XLM-RoBERTa with the same weights, and its cost."""

import pytest
import torch
from method_points import point, total

from costmodel.errors import ConfigError
from costmodel.methods.llmlingua2 import Encoder, LLMLingua2, encoder_operations
from measure.flops import count_flops
from measure.methods.llmlingua2 import LLMLingua2Compressor

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

"""The decoder against transformers' own Llama with the same weights."""

from dataclasses import replace

import pytest
import torch

from costmodel.architecture import Architecture, Layer
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from costmodel.mlps import DenseMLP
from measure.blocks import check_supported
from measure.checkpoints import weights_from_state
from measure.engine import Decoder, Numerics, random_weights
from measure.methods import build_layer_cache
from measure.numerics import Rope

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

TOLERANCE = 1e-4  # float32 logits of order one; the orders of summation differ


def architecture(
    *, d=64, f=96, heads=4, kv_heads=2, head_dim=16, vocab=101, layers=2, tied=True, **changes
) -> Architecture:
    mixer = Attention(
        n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, v_head_dim=head_dim, **changes
    )
    layer = Layer(mixers=(mixer,), mlps=(DenseMLP(d_ff=f),), other_parameters=2 * d)
    return Architecture(
        name="tiny",
        hub_id="tiny",
        family="llama",
        d_model=d,
        vocab_size=vocab,
        layers=(layer,) * layers,
        other_parameters=d,
        tied_embeddings=tied,
    )


def caches_of(model, method="full", batch=1, dtype=torch.float32, reserve_tokens=0):
    return [
        build_layer_cache(
            parse_method(method),
            layer.mixers[0],
            batch=batch,
            dtype=dtype,
            device=torch.device("cpu"),
            reserve_tokens=reserve_tokens,
        )
        for layer in model.layers
    ]


def llama(model: Architecture, numerics: Numerics):
    """transformers' model with random weights, and the same weights in the decoder's form."""
    transformers = pytest.importorskip("transformers")
    mixer, mlp = model.layers[0].mixers[0], model.layers[0].mlps[0]
    config = transformers.LlamaConfig(
        hidden_size=model.d_model,
        intermediate_size=mlp.d_ff,
        num_hidden_layers=model.n_layers,
        num_attention_heads=mixer.n_heads,
        num_key_value_heads=mixer.n_kv_heads,
        head_dim=mixer.head_dim,
        vocab_size=model.vocab_size,
        rms_norm_eps=numerics.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": numerics.rope.theta},
        tie_word_embeddings=model.tied_embeddings,
        initializer_range=0.3,  # larger than usual, so that attention is far from uniform
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    weights = weights_from_state(model, theirs.state_dict())
    return theirs, weights


@pytest.mark.parametrize(
    ("changes", "numerics", "batch"),
    [
        ({}, Numerics(), 1),
        ({"kv_heads": 4, "tied": False}, Numerics(norm_eps=1e-6), 3),
        ({"kv_heads": 1, "heads": 8, "head_dim": 32}, Numerics(rope=Rope(theta=500_000.0)), 2),
        ({"layers": 3, "d": 48, "head_dim": 24, "vocab": 257}, Numerics(), 2),
    ],
    ids=["gqa-tied", "mha-untied", "mqa-wide-heads", "three-layers"],
)
def test_logits_equal_transformers(changes, numerics, batch):
    model = architecture(**changes)
    theirs, weights = llama(model, numerics)
    tokens = torch.randint(
        model.vocab_size, (batch, 12), generator=torch.Generator().manual_seed(1)
    )
    decoder = Decoder(model, weights, n_positions=12, numerics=numerics)
    caches = caches_of(model, batch=batch, reserve_tokens=12)
    with torch.inference_mode():
        expected = theirs(tokens).logits
    found = decoder.prefill(tokens[:, :7], caches)
    torch.testing.assert_close(found, expected[:, 6], atol=TOLERANCE, rtol=TOLERANCE)
    for t in range(7, 12):
        found = decoder.decode(tokens[:, t : t + 1], caches)
        torch.testing.assert_close(found, expected[:, t], atol=TOLERANCE, rtol=TOLERANCE)


def test_weights_hold_what_the_architecture_counts():
    for tied in (True, False):
        model = architecture(tied=tied)
        weights = random_weights(model, torch.bfloat16, torch.device("cpu"))
        assert weights.nbytes == 2 * model.n_parameters


def test_sequences_beyond_the_table_are_refused():
    model = architecture()
    weights = random_weights(model, torch.float32, torch.device("cpu"))
    decoder = Decoder(model, weights, n_positions=4)
    with pytest.raises(ConfigError, match="4 positions and is asked for 5"):
        decoder.prefill(torch.zeros(1, 5, dtype=torch.long), caches_of(model))


def test_the_same_seed_gives_the_same_weights():
    model = architecture()
    a, b, c = (random_weights(model, torch.float32, torch.device("cpu"), s) for s in (1, 1, 2))
    assert torch.equal(a.layers[1].mlp["down_proj"], b.layers[1].mlp["down_proj"])
    assert not torch.equal(a.layers[1].mlp["down_proj"], c.layers[1].mlp["down_proj"])


def test_unsupported_layers_are_refused_by_name():
    with pytest.raises(NotApplicableError, match="inner norms"):
        check_supported(architecture(extra_parameters=32))
    model = architecture()
    both = replace(model.layers[0], mlps=model.layers[0].mlps * 2)
    mixed = replace(model, name="m", layers=(*model.layers, both))
    with pytest.raises(NotApplicableError, match="m: layer 2 has 2 MLPs"):
        check_supported(mixed)

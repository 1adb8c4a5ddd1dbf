"""RWKV-5 as a whole model against the recurrence of arXiv 2404.05892, token by token in numpy."""

import numpy as np
import pytest
import torch

from costmodel.methods.parse import parse_method
from costmodel.registry import architecture_from_config, load_architecture
from measure.blocks import check_supported
from measure.engine import Decoder, random_weights
from measure.mixers import build_cache

torch.set_num_threads(1)

HEADS, SIZE, D, F, V = 3, 8, 24, 64, 37
CONFIG = {
    "model_type": "rwkv5",
    "hidden_size": D,
    "head_size": SIZE,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "vocab_size": V,
    "tie_word_embeddings": False,
}


def model_and_weights():
    model = architecture_from_config(CONFIG)
    weights = random_weights(model, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for layer in weights.layers:  # nothing that is a plain one or zero may hide a mistake
        for tensor in layer.tensors():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    for tensor in weights.outer.values():
        tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    weights.embedding.mul_(50.0)
    return model, weights


def norm(x, weight, bias, eps=1e-5):
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def logits_by_hand(weights, tokens):
    """One sequence; every state is explicit."""
    n = {k: v.double().numpy() for k, v in weights.outer.items()}
    layers = [
        {
            k: v.double().numpy()
            for k, v in [
                *x.norms.items(),
                *(("t_" + k, v) for k, v in x.mixers[0].items()),
                *(("c_" + k, v) for k, v in x.mlp.items()),
            ]
        }
        for x in weights.layers
    ]
    before = np.zeros((len(layers), 2, D))
    states = np.zeros((len(layers), HEADS, SIZE, SIZE))
    for token in tokens:
        x = norm(weights.embedding[token].double().numpy(), n["first"], n["first_bias"])
        for i, w in enumerate(layers):
            h = norm(x, w["mixer"], w["mixer_bias"])
            mk, mv, mr, mg = w["t_mix"]
            shifted = before[i, 0]
            k = w["t_key"] @ (h * mk + shifted * (1 - mk))
            v = w["t_value"] @ (h * mv + shifted * (1 - mv))
            r = w["t_receptance"] @ (h * mr + shifted * (1 - mr))
            g = w["t_gate"] @ (h * mg + shifted * (1 - mg))
            before[i, 0] = h
            out = np.zeros(HEADS * SIZE)
            for head in range(HEADS):
                part = slice(head * SIZE, (head + 1) * SIZE)
                decay = np.exp(-np.exp(w["t_decay"][part]))
                kv = np.outer(k[part], v[part])
                state = states[i, head]
                y = r[part] @ (state + w["t_bonus"][part][:, None] * kv)
                states[i, head] = decay[:, None] * state + kv
                out[part] = norm(y, w["t_norm"][part], w["t_norm_bias"][part], 64e-5)
            x = x + w["t_output"] @ (out * g * sigmoid(g))
            h = norm(x, w["mlp"], w["mlp_bias"])
            mk, mr = w["c_mix"]
            shifted = before[i, 1]
            k = np.maximum(w["c_up_proj"] @ (h * mk + shifted * (1 - mk)), 0) ** 2
            r = sigmoid(w["c_channel_receptance"] @ (h * mr + shifted * (1 - mr)))
            before[i, 1] = h
            x = x + r * (w["c_down_proj"] @ k)
    return weights.head.double().numpy() @ norm(x, n["final"], n["final_bias"])


@pytest.mark.parametrize("prompt", [1, 7, 16, 35])
def test_logits_equal_the_recurrence(prompt):
    model, weights = model_and_weights()
    tokens = torch.randint(V, (2, prompt + 3), generator=torch.Generator().manual_seed(2))
    decoder = Decoder(model, weights, n_positions=prompt + 3)
    caches = [
        build_cache(
            parse_method("full"), m, batch=2, dtype=torch.float32, device=torch.device("cpu")
        )
        for layer in model.layers
        for m in layer.mixers
    ]
    found = [decoder.prefill(tokens[:, :prompt], caches)]
    found += [decoder.decode(tokens[:, t : t + 1], caches) for t in range(prompt, prompt + 3)]
    for row in range(2):
        for i, logits in enumerate(found):
            expected = logits_by_hand(weights, tokens[row, : prompt + i])
            assert np.abs(expected).max() > 0.05
            np.testing.assert_allclose(logits[row].numpy(), expected, atol=1e-4, rtol=1e-4)


def test_the_bundled_model_runs_with_exactly_its_parameters():
    check_supported(load_architecture("rwkv-5-world-7b"))
    model, weights = model_and_weights()
    assert weights.nbytes == 4 * model.n_parameters

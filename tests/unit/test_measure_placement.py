"""Twins and mixers keep to the device they were given, and never wait for it in a step.

On the meta device tensors have no data: an operation that mixes devices, or reads a value back to
the host (which a GPU would have to be waited for, and which no graph can capture), is an error.
"""

import pytest
import torch
from test_measure_runner import tiny

from costmodel.architecture import Architecture, Layer
from costmodel.methods.parse import parse_method
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.rglru import RGLRU
from costmodel.mlps import DenseMLP
from measure.config_numerics import numerics_of
from measure.engine import Decoder, LayerWeights, Weights, random_weights
from measure.methods.base import AbstractLayerCache
from measure.mixers import build_cache
from measure.runnable import runnable_names

META = torch.device("meta")
#: What cannot run without data, and why.
NEEDS_DATA = {
    "infllm:local_tokens=64,block_tokens=16,topk=2,cached_blocks=4": "the host copies its blocks",
    "kvquant": "draws a calibration set when it is built",
}


def on_meta(architecture: Architecture) -> Weights:
    made = random_weights(architecture, torch.bfloat16, torch.device("cpu"), 0)

    def moved(tensors):
        return {k: v.to(META) for k, v in tensors.items()}

    embedding = made.embedding.to(META)
    return Weights(
        embedding=embedding,
        layers=tuple(
            LayerWeights(norms=moved(x.norms), mixers=tuple(map(moved, x.mixers)), mlp=moved(x.mlp))
            for x in made.layers
        ),
        outer=moved(made.outer),
        head=embedding,
    )


def runs(architecture: Architecture, method: str, **options) -> torch.Tensor:
    """A prompt, a step, the step again after putting everything back."""
    decoder = Decoder(architecture, on_meta(architecture), n_positions=400)
    mixers = [m for layer in architecture.layers for m in layer.mixers]
    caches = [
        build_cache(parse_method(method), m, batch=2, dtype=torch.bfloat16, device=META,
                    reserve_tokens=310, **options)
        for m in mixers
    ]  # fmt: skip
    for i, cache in enumerate(caches):
        if isinstance(cache, AbstractLayerCache):
            cache.place(i, len(caches), numerics_of("llama", d_model=64).rope)
    tokens = torch.zeros(2, 300, dtype=torch.long, device=META)
    decoder.prefill(tokens, caches)
    snapshots = [c.snapshot() for c in caches]
    decoder.decode(tokens[:, :1], caches)
    for cache, snapshot in zip(caches, snapshots, strict=True):
        cache.restore(snapshot)
    return decoder.decode(tokens[:, :1], caches)


@pytest.mark.parametrize(
    "name", sorted({*runnable_names()} - {x.split(":")[0] for x in NEEDS_DATA})
)
def test_a_twin_stays_on_its_device(name):
    logits = runs(tiny(), name)
    assert (logits.shape, logits.device.type) == ((2, 100), "meta")


@pytest.mark.parametrize("name", sorted(NEEDS_DATA))
def test_what_needs_data_still_does(name):
    with pytest.raises(RuntimeError, match=r"(?i)meta"):
        runs(tiny(), name)


@pytest.mark.parametrize(
    "mixer",
    [
        Mamba2(n_heads=4, head_dim=16, d_state=16, n_groups=1, conv_kernel=4),
        RGLRU(width=64, n_blocks=4, conv_kernel=4),
    ],
    ids=["mamba2", "rglru"],
)
def test_a_recurrent_mixer_stays_on_its_device(mixer):
    layer = Layer(mixers=(mixer,), mlps=(DenseMLP(d_ff=96),), other_parameters=128)
    architecture = Architecture(
        name="tiny", hub_id="tiny", family="llama", d_model=64, vocab_size=100,
        layers=(layer,) * 2, other_parameters=64, tied_embeddings=True,
    )  # fmt: skip
    assert runs(architecture, "full").device.type == "meta"


def test_a_value_read_back_is_noticed():
    """The check itself: reading one back raises."""
    with pytest.raises(RuntimeError):
        torch.zeros(1, device=META).item()

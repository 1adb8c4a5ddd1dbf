"""The bridge: what runnable methods hold and multiply equals what the cost model predicts.

For every method with a twin, on a four-layer decoder, after the prompt and after every step: bytes
of the storages themselves equal the predicted state to the byte, and the FLOPs that torch's counter
sees equal the predicted executed FLOPs.
"""

import numpy as np
import pytest
import torch

from costmodel.architecture import Architecture, Layer
from costmodel.engines import load_engine
from costmodel.methods.parse import parse_method
from costmodel.methods.stack import MethodStack
from costmodel.mixers import AbstractMixer, Attention
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.rglru import RGLRU
from costmodel.mlps import DenseMLP
from costmodel.workload import Level, Point
from measure.config_numerics import numerics_of
from measure.engine import TORCH_DTYPES, Decoder, random_weights
from measure.flops import count_flops
from measure.methods import forms_of
from measure.methods.base import AbstractLayerCache, Realisation
from measure.mixers import build_cache
from measure.runnable import runnable_names

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

SIZE, D, F, V = 32, 64, 96, 50
WINDOW = 40


def attention(n_heads: int, n_kv_heads: int, **rest: int) -> Attention:
    return Attention(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=SIZE, v_head_dim=SIZE, **rest)


GQA = attention(4, 2)
WINDOWED = attention(4, 2, window_tokens=WINDOW)
SSD = Mamba2(n_heads=4, head_dim=16, d_state=16, n_groups=2, conv_kernel=4, chunk_tokens=8)
LRU = RGLRU(width=D, n_blocks=4, conv_kernel=4)
#: Mixers of a decoder's layers.
KINDS: dict[str, tuple[AbstractMixer, ...]] = {
    "mha": (attention(4, 4),) * 4,
    "gqa": (GQA,) * 4,
    "mqa": (attention(4, 1),) * 4,
    "window": (WINDOWED, GQA, WINDOWED, GQA),
    "hybrid": (SSD, GQA, LRU, GQA),
}
#: Every runnable method, with the parameters that change what it holds.
METHODS = {
    "full": ["full"],
    "fp8_kv": ["fp8_kv"],
    "flexgen": [
        "flexgen:group=32",
        "flexgen:group=12",
        "flexgen:bits=2,group=20",
        "flexgen:bits=8",
    ],
    "kivi": [
        "kivi:bits=2,residual_tokens=32",
        "kivi:bits=4,residual_tokens=64",
        "kivi:bits=2,group=8,residual_tokens=16",
        "kivi:bits=4,group=16,residual_tokens=32",
    ],
    "kvquant": [
        "kvquant",
        "kvquant:bits=2,outlier_fraction=0.1",
        "kvquant:bits=4,outlier_fraction=0",
    ],
    "h2o": [
        "h2o:heavy_fraction=0.3,recent_fraction=0.2",
        "h2o:variant=real_drop,heavy_fraction=0.4",
        "h2o:variant=mask,heavy_fraction=0.2,recent_fraction=0.2",
        "h2o:heavy_fraction=0.5,recent_fraction=0.5",
    ],
    "infllm": [
        "infllm:block_tokens=4,init_tokens=3,local_tokens=12,topk=2,cached_blocks=3,"
        "chunk_tokens=8,repr_topk=2",
        "infllm:block_tokens=6,init_tokens=0,local_tokens=16,topk=3,cached_blocks=3,"
        "chunk_tokens=300",
    ],
    "kv_offload": ["kv_offload:resident_layers=1", "kv_offload:resident_layers=2"],
    "minference": ["minference:kept_tokens=24", "minference:kept_tokens=200"],
    "quest": ["quest:page_tokens=8,keep_tokens=24", "quest:page_tokens=4,keep_tokens=4"],
    "snapkv": ["snapkv:keep_tokens=32,window_tokens=8"],
    "pyramidkv": ["pyramidkv:keep_tokens=32,window_tokens=8,beta=4"],
    "streaming_llm": [
        "streaming_llm:sink_tokens=4,window_tokens=28",
        "streaming_llm:sink_tokens=0,window_tokens=16,positions=fixed",
    ],
    "tova": ["tova:keep_tokens=32"],
}
COMPOSED = [
    "snapkv:keep_tokens=32,window_tokens=8+kivi:bits=2,group=16,residual_tokens=16",
    "minference:kept_tokens=24+kivi:bits=4,residual_tokens=32",
    "minference:kept_tokens=24+snapkv:keep_tokens=32,window_tokens=8+fp8_kv",
    "snapkv:keep_tokens=32,window_tokens=8+kv_offload:resident_layers=1",
]
SPECS = [(name, spec) for name, specs in METHODS.items() for spec in specs]
SPECS += [(parse_method(spec).name, spec) for spec in COMPOSED]
#: Around groups (8, 16, 32), residuals (16, 32, 64) and the window (40), once and twice.
CONTEXTS = (1, 15, 22, 31, 39, 62, 81, 127)
STEPS = 3
BATCH_AND_DTYPE = {
    "mha": (1, "bf16"),
    "gqa": (3, "fp32"),
    "mqa": (2, "bf16"),
    "window": (2, "bf16"),
    "hybrid": (3, "fp32"),
}


def contexts_of(kind: str) -> tuple[int, ...]:
    """All of them for two kinds; for the others those of the most boundaries."""
    return CONTEXTS if kind in ("gqa", "window") else (17, 39, 65)


def decoder_architecture(kind: str) -> Architecture:
    return Architecture(
        name=kind,
        hub_id=kind,
        family="llama",
        d_model=D,
        vocab_size=V,
        layers=tuple(
            Layer(mixers=(mixer,), mlps=(DenseMLP(d_ff=F),), other_parameters=2 * D)
            for mixer in KINDS[kind]
        ),
        other_parameters=D,
        tied_embeddings=True,
    )


def point(batch: int, prompt: int, cached: int, dtype: str, level: Level = "ideal") -> Point:
    return Point(
        batch=float(batch),
        prompt_tokens=float(prompt),
        cached_tokens=float(cached),
        reserved_tokens=float(cached),
        dtype=dtype,
        kv_dtype=dtype,
        level=level,
        engine=load_engine("torch"),
    )


def predicted_bytes(model: Architecture, spec: str, at: Point, *, host: bool = False) -> float:
    states = [parse_method(spec).state(g, at) for g in model.mixer_groups]
    return sum(float(x.host if host else x.device) for x in states)


def build_caches(
    model: Architecture,
    spec: str,
    batch: int,
    dtype: str,
    reserve_tokens: int = 0,
    realisation: Realisation = "best",
):
    caches = [
        build_cache(
            parse_method(spec),
            layer.mixers[0],
            batch=batch,
            dtype=TORCH_DTYPES[dtype],
            device=torch.device("cpu"),
            reserve_tokens=reserve_tokens,
            realisation=realisation,
        )
        for layer in model.layers
    ]
    held = [x for x in caches if isinstance(x, AbstractLayerCache)]
    for index, cache in enumerate(held):
        cache.place(index, len(held), numerics_of(model.family).rope)
    return caches


def host_bytes(caches) -> int:
    return sum(x.host_bytes for x in caches if isinstance(x, AbstractLayerCache))


def test_every_twin_is_covered():
    # LLMLingua-2 shortens the prompt and holds nothing: test_measure_llmlingua2
    assert set(METHODS) == set(runnable_names()) - {"llmlingua2"}


@pytest.mark.parametrize(("name", "spec"), SPECS, ids=[s for _, s in SPECS])
@pytest.mark.parametrize("kind", KINDS)
def test_storages_equal_the_predicted_state(name, spec, kind):
    batch, dtype = BATCH_AND_DTYPE[kind]
    model = decoder_architecture(kind)
    weights = random_weights(model, TORCH_DTYPES[dtype], torch.device("cpu"))
    decoder = Decoder(model, weights, n_positions=max(CONTEXTS) + STEPS + 1)
    for context in contexts_of(kind):
        caches = build_caches(model, spec, batch, dtype)
        decoder.prefill(torch.zeros(batch, context, dtype=torch.long), caches)
        for cached in range(context, context + STEPS + 1):
            held = sum(c.storage_bytes for c in caches)
            assert host_bytes(caches) == predicted_bytes(
                model, spec, point(batch, context, cached, dtype), host=True
            )
            assert held == predicted_bytes(model, spec, point(batch, context, cached, dtype))
            assert {c.n_tokens for c in caches} == {cached}
            decoder.decode(torch.zeros(batch, 1, dtype=torch.long), caches)


@pytest.mark.parametrize(("name", "spec"), SPECS, ids=[s for _, s in SPECS])
def test_reserved_storages_stay_and_hold_the_predicted_state(name, spec):
    model = decoder_architecture("gqa")
    room = max(CONTEXTS) + STEPS
    decoder = Decoder(
        model, random_weights(model, torch.bfloat16, torch.device("cpu")), n_positions=room
    )
    caches = build_caches(model, spec, 2, "bf16", reserve_tokens=room)
    storage = sum(c.storage_bytes for c in caches)
    for context in CONTEXTS:
        for c in caches:
            c.clear()
        decoder.prefill(torch.zeros(2, context, dtype=torch.long), caches)
        for cached in range(context, context + STEPS):
            held = sum(c.held_bytes for c in caches)
            assert held == predicted_bytes(model, spec, point(2, context, cached, "bf16"))
            decoder.decode(torch.zeros(2, 1, dtype=torch.long), caches)
    assert sum(c.storage_bytes for c in caches) == storage


def executed_flops(model: Architecture, stack: MethodStack, at: Point, *, decode: bool) -> float:
    """Mixing of all layers, all matrices on every token, and the head on the last of each."""
    hook = stack.decode if decode else stack.prefill
    mixed = sum(
        group.n_layers * float(np.asarray(op.count * op.counted_flops))
        for group in model.mixer_groups
        for op in hook(group, at)
    )
    tokens = float(at.batch) * (1.0 if decode else float(at.prompt_tokens))
    matrices = sum(2.0 * x.n_in * x.n_out * count for x, count in model.linear_groups)
    return mixed + tokens * matrices + float(at.batch) * 2.0 * D * V


@pytest.mark.parametrize(("name", "spec"), SPECS, ids=[s for _, s in SPECS])
@pytest.mark.parametrize("kind", KINDS)
def test_counted_flops_equal_the_prediction(name, spec, kind):
    model = decoder_architecture(kind)
    batch, stack = 2, parse_method(spec)
    decoder = Decoder(
        model, random_weights(model, torch.float32, torch.device("cpu")), n_positions=302
    )
    for context in (41, 300):
        caches = build_caches(model, spec, batch, "fp32")
        prompt = torch.zeros(batch, context, dtype=torch.long)
        at = point(batch, context, context, "fp32")
        counted = count_flops(lambda p=prompt, c=caches: decoder.prefill(p, c))
        assert counted == executed_flops(model, stack, at, decode=False)
        counted = count_flops(lambda p=prompt, c=caches: decoder.decode(p[:, :1], c))
        assert counted == executed_flops(model, stack, at, decode=True)


#: Every form that exists, alone; and one composition of each pair of stages.
REFERENCES = [spec for name, spec in SPECS if "+" not in spec] + [
    "streaming_llm:sink_tokens=3,window_tokens=20,positions=fixed",
    *COMPOSED[:2],
]


def test_every_runnable_method_has_both_forms():
    for name in runnable_names():
        forms, published = forms_of(name)
        assert forms == {"best", "reference"}
        assert published


@pytest.mark.parametrize("spec", REFERENCES, ids=str)
@pytest.mark.parametrize("kind", ["gqa", "window"])
def test_the_published_operations_hold_and_multiply_what_level_reference_predicts(spec, kind):
    """Bytes and FLOPs of the reference form, and the same logits as the best one; also while a
    cache outgrows the budgets. (Without groups, and at other shapes: test_bridge_found.)
    """
    model, batch, stack = decoder_architecture(kind), 2, parse_method(spec)
    weights = random_weights(model, torch.float32, torch.device("cpu"))
    decoder = Decoder(model, weights, n_positions=150)
    for context in (29, 141) if kind == "gqa" else (141,):
        prompt = torch.arange(batch * context).view(batch, context) % V
        caches, best = (
            build_caches(model, spec, batch, "fp32", realisation=x) for x in ("reference", "best")
        )
        logits = []

        def run(call, *args, logits=logits):
            logits.append(call(*args))

        at = point(batch, context, context, "fp32", "reference")
        counted = count_flops(lambda p=prompt, c=caches: run(decoder.prefill, p, c), square=True)
        assert counted == executed_flops(model, stack, at, decode=False)
        torch.testing.assert_close(logits[-1], decoder.prefill(prompt, best), atol=1e-4, rtol=1e-3)
        token = prompt[:, :1]
        for cached in range(context, context + 4):
            at = point(batch, context, cached, "fp32", "reference")
            assert sum(c.storage_bytes for c in caches) == predicted_bytes(model, spec, at)
            assert host_bytes(caches) == predicted_bytes(model, spec, at, host=True)
            counted = count_flops(lambda c=caches, x=token: run(decoder.decode, x, c), square=True)
            assert counted == executed_flops(model, stack, at, decode=True)
            expected = decoder.decode(token, best)
            torch.testing.assert_close(logits[-1], expected, atol=1e-4, rtol=1e-3)

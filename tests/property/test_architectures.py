"""What holds for every bundled model and for any config."""

import copy
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from costmodel.engines import engine_names, load_engine
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.mixers.base import AbstractMixer
from costmodel.operation import Operation
from costmodel.registry import architecture_from_config, load_architecture, model_names
from costmodel.workload import Point

FOLDER = Path(__file__).parents[2] / "costmodel" / "architectures"
CONFIGS: dict[str, dict[str, Any]] = {
    name: json.loads((FOLDER / f"{name}.json").read_text("utf-8")) for name in model_names()
}
MIXERS: dict[str, AbstractMixer] = {
    f"{name}-{g.mixer.KIND}-{i}": g.mixer
    for name in model_names()
    for i, g in enumerate(load_architecture(name).mixer_groups)
}
AMOUNTS = (
    "flops", "vector_flops", "weight_bytes", "state_bytes", "workspace_bytes", "activation_bytes",
    "link_bytes", "transient_bytes", "counted_flops",
)  # fmt: skip

mixers = st.sampled_from(sorted(MIXERS)).map(MIXERS.__getitem__)
lengths = st.integers(1, 2**20)
levels = st.sampled_from(["ideal", "reference"])
engines = st.sampled_from(engine_names())
kv_dtypes = st.sampled_from(["bf16", "fp8"])


def at(
    tokens: Any,
    *,
    batch: Any = 1.0,
    engine: str = "lccost",
    level: Literal["ideal", "reference"] = "ideal",
    kv_dtype: str = "bf16",
) -> Point:
    n = np.asarray(tokens, dtype=np.float64)
    return Point(
        batch=np.asarray(batch, dtype=np.float64),
        prompt_tokens=n,
        cached_tokens=n,
        reserved_tokens=n,
        dtype="bf16",
        kv_dtype=kv_dtype,
        level=level,
        engine=load_engine(engine),
    )


def amounts(op: Operation) -> dict[str, Any]:
    return {name: np.asarray(getattr(op, name)) for name in AMOUNTS}


@given(mixers, lengths, st.integers(1, 512), engines, levels, kv_dtypes)
@settings(max_examples=200, deadline=None)
def test_amounts_are_finite_and_not_negative(
    mixer: AbstractMixer, tokens: int, batch: int, engine: str, level: Any, kv_dtype: str
) -> None:
    point = at(tokens, batch=batch, engine=engine, level=level, kv_dtype=kv_dtype)
    for op in (*mixer.prefill(point), *mixer.decode(point)):
        for name, value in amounts(op).items():
            assert np.all(np.isfinite(value)), (op.name, name)
            assert np.all(value >= 0), (op.name, name)
        # transformers does some state updates with elementwise products, which are not counted
        if engine != "transformers":
            executed, useful = np.asarray(op.counted_flops), np.asarray(op.flops)
            assert np.all(executed >= useful * (1 - 1e-12)), op.name


@given(
    mixers,
    st.lists(lengths, min_size=2, max_size=4),
    st.lists(st.integers(1, 64), min_size=1, max_size=3),
    engines,
    levels,
)
@settings(max_examples=150, deadline=None)
def test_arrays_give_what_each_point_gives(
    mixer: AbstractMixer, tokens: list[int], batches: list[int], engine: str, level: Any
) -> None:
    grid = at(tokens, batch=np.array(batches)[:, None], engine=engine, level=level)
    shape = (len(batches), len(tokens))
    state = np.broadcast_to(mixer.state_bytes(grid), shape)
    for phase in ("prefill", "decode"):
        whole = [amounts(op) for op in getattr(mixer, phase)(grid)]
        for i, batch in enumerate(batches):
            for j, n in enumerate(tokens):
                one = at(n, batch=batch, engine=engine, level=level)
                assert state[i, j] == mixer.state_bytes(one)
                for op, expected in zip(getattr(mixer, phase)(one), whole, strict=True):
                    for name, value in amounts(op).items():
                        got = np.broadcast_to(expected[name], shape)[i, j]
                        assert got == pytest.approx(float(value), rel=1e-12), (op.name, name)


@given(mixers, lengths, st.integers(1, 1000))
@settings(max_examples=200, deadline=None)
def test_state_grows_with_the_batch_and_never_shrinks_much_with_tokens(
    mixer: AbstractMixer, tokens: int, more: int
) -> None:
    """Compressed streams drain a buffer of at most m tokens whenever a window closes."""
    here, later = mixer.state_bytes(at(tokens)), mixer.state_bytes(at(tokens + more))
    buffered = 0.0
    if mixer.KIND == "compressed_attention":
        buffered = 128 * 4 * (512 + 128) * 2.0
    assert later >= here - buffered
    assert mixer.state_bytes(at(tokens, batch=7)) == 7 * here


@given(mixers, st.integers(1, 2**17))
@settings(max_examples=200, deadline=None)
def test_a_prompt_of_n_tokens_costs_less_than_n_steps_read(
    mixer: AbstractMixer, tokens: int
) -> None:
    """A prompt writes its state once; steps read it every time."""
    prompt = sum(np.sum(op.state_bytes) for op in mixer.prefill(at(tokens)))
    step = sum(np.sum(op.state_bytes) for op in mixer.decode(at(tokens)))
    assert prompt <= (tokens + 1) * step * 3


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize("tp", [2, 8])
def test_shards_hold_at_least_their_share(name: str, tp: int) -> None:
    a = load_architecture(name)
    try:
        shard = a.sharded(tp)
    except NotApplicableError:
        return

    def layers(x: Any) -> int:
        return sum(x._layer_parameters(layer, active=False) for layer in x.stored_layers)

    assert layers(a) / tp <= layers(shard) < layers(a)
    assert shard.n_layers == a.n_layers


@pytest.mark.parametrize("name", model_names())
def test_groups_cover_every_layer_and_number_the_caches(name: str) -> None:
    a = load_architecture(name)
    groups = a.mixer_groups
    assert sum(g.n_layers for g in groups) == sum(len(x.mixers) for x in a.layers)
    ordinals = sorted(i for g in groups for i in g.indices)
    assert ordinals == list(range(len(ordinals)))
    assert all(g.n_kv_layers == len(ordinals) for g in groups)
    assert hash(a) == hash(load_architecture(name))
    assert 0 < a.n_active_parameters <= a.n_parameters


# Any config ------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.data())
@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_any_change_to_a_real_config_is_read_or_refused(data: st.DataObject) -> None:
    """Whatever stands under any key: an architecture with sane counts, or a ConfigError."""
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    config = copy.deepcopy(CONFIGS[name])
    target = config.get("text_config", config)
    for key in data.draw(st.lists(st.sampled_from(sorted(target)), min_size=1, max_size=3)):
        if data.draw(st.booleans()):
            target.pop(key, None)
        else:
            target[key] = data.draw(json_values)
    try:
        a = architecture_from_config(config, name)
    except ConfigError:
        return
    assert a.n_parameters > 0
    assert 0 < a.n_active_parameters <= a.n_parameters
    assert a.n_layers >= 1

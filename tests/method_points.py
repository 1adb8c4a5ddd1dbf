"""Points, mixers and groups that the tests of methods share."""

from typing import Any

import numpy as np

from costmodel.architecture import Architecture, Layer, MixerGroup
from costmodel.engines import load_engine
from costmodel.methods.parse import parse_method
from costmodel.mixers import AbstractMixer, Attention
from costmodel.operation import Operations
from costmodel.workload import Point


def attention(
    n_heads: int = 32, n_kv_heads: int = 8, head_dim: int = 128, **rest: Any
) -> Attention:
    """A Llama-3-8B attention layer unless told otherwise."""
    return Attention(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        v_head_dim=rest.pop("v_head_dim", head_dim),
        **rest,
    )


def group(mixer: AbstractMixer | None = None, n_layers: int = 32) -> MixerGroup:
    """All cache-keeping layers of a model of ``n_layers`` equal ones."""
    return MixerGroup(mixer or attention(), n_layers, tuple(range(n_layers)), n_layers)


def point(
    prompt: Any = 10_000,
    cached: Any = None,
    *,
    batch: Any = 1,
    level: str = "ideal",
    dtype: str = "bf16",
    engine: str = "vllm",
) -> Point:
    """A point; decode right after the prompt unless ``cached`` says otherwise."""
    s = np.asarray(prompt, dtype=np.float64)
    t = s if cached is None else np.asarray(cached, dtype=np.float64)
    return Point(
        batch=np.asarray(batch, dtype=np.float64),
        prompt_tokens=s,
        cached_tokens=t,
        reserved_tokens=t + 256,
        dtype=dtype,
        kv_dtype=dtype,
        level=level,  # type: ignore[arg-type]
        engine=load_engine(engine),
    )


def state_bytes(spec: str, where: Point, layers: MixerGroup | None = None) -> float:
    """GPU bytes of all layers at one point."""
    return float(parse_method(spec).state(layers or group(), where).device)


def total(operations: Operations, amount: str) -> Any:
    """Sum of an amount over a layer's operations."""
    return sum(op.count * getattr(op, amount) for op in operations)


def named(operations: Operations, name: str) -> Any:
    """The one operation of that name."""
    (found,) = [op for op in operations if op.name == name]
    return found


def model(*mixers: AbstractMixer, name: str = "test-model") -> Architecture:
    """A model of one layer per mixer."""
    return Architecture(
        name=name,
        hub_id=f"test/{name}",
        family="test",
        d_model=512,
        vocab_size=1000,
        layers=tuple(Layer(mixers=(m,)) for m in mixers),
    )

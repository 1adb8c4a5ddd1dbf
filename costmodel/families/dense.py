"""Attention and a dense MLP in every layer: Llama and its kin.

The families differ in biases, norms, windows and whether the MLP is gated; ``TRAITS`` says how. A trait
that is a string names the config key that decides; absent keys are false.
"""

from dataclasses import dataclass
from typing import Literal

from costmodel.architecture import Layer
from costmodel.families.common import (
    FULL,
    SLIDING,
    Heads,
    Model,
    read_basics,
    read_heads,
    read_layer_types,
    read_tied,
)
from costmodel.hf_config import ConfigReader
from costmodel.mixers.attention import Attention
from costmodel.mlps import DenseMLP


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """How one family departs from Llama.

    norms       vectors of d_model elements per layer
    qk_norm     norm of queries and keys: one vector per head size, or over all heads
    windows     "all": ``sliding_window`` on every layer; "types": only where ``layer_types`` says;
                "qwen2": with ``use_sliding_window``, from ``max_window_layers`` on
    """

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    gated: bool = True
    norms: int = 2
    qk_norm: Literal["none", "head", "all"] = "none"
    windows: Literal["none", "all", "types", "qwen2"] = "none"
    tied: bool = False
    kv_heads_required: bool = False
    ignored: tuple[str, ...] = ()


TRAITS: dict[str, Traits] = {
    "llama": Traits(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Traits(windows="all", kv_heads_required=True),
    "qwen2": Traits(qkv_bias=True, windows="qwen2"),
    "qwen3": Traits(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="head", windows="qwen2"
    ),
    "phi3": Traits(windows="all"),
    "glm4": Traits(qkv_bias="attention_bias", norms=4),
}


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read one config of a family in ``TRAITS``."""
    traits = TRAITS[model_type]
    basics = read_basics(c)
    d = basics.d_model
    heads = read_heads(c, d, kv_heads_required=traits.kv_heads_required)
    mlp = DenseMLP(
        d_ff=c.integer("intermediate_size"), gated=traits.gated, bias=_bias(c, traits.mlp_bias)
    )
    qkv_bias, o_bias = _bias(c, traits.qkv_bias), _bias(c, traits.o_bias)
    windows = read_windows(c, basics.n_layers, traits.windows)
    c.ignore(*traits.ignored)
    cache: dict[int | None, Layer] = {}
    for window in windows:
        if window not in cache:
            mixer = Attention(
                n_heads=heads.n_heads,
                n_kv_heads=heads.n_kv_heads,
                head_dim=heads.head_dim,
                v_head_dim=heads.head_dim,
                window_tokens=window,
                qkv_bias=qkv_bias,
                o_bias=o_bias,
                extra_parameters=_qk_norm(traits, heads),
            )
            cache[window] = Layer(
                mixers=(mixer,), mlps=(mlp,), other_parameters=traits.norms * d
            )
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=tuple(cache[w] for w in windows),
        other_parameters=d,
        tied_embeddings=read_tied(c, wrapper, default=traits.tied),
        max_context_tokens=basics.max_context_tokens,
    )


def _bias(c: ConfigReader, trait: bool | str) -> bool:
    return c.flag(trait) if isinstance(trait, str) else trait


def _qk_norm(traits: Traits, heads: Heads) -> int:
    if traits.qk_norm == "head":
        return 2 * heads.head_dim
    if traits.qk_norm == "all":
        return (heads.n_heads + heads.n_kv_heads) * heads.head_dim
    return 0


def read_windows(c: ConfigReader, n_layers: int, rule: str) -> list[int | None]:
    """Sliding window of every layer, None for full attention."""
    if rule == "none":
        return [None] * n_layers
    if rule == "qwen2" and not c.flag("use_sliding_window"):
        c.ignore("sliding_window", "max_window_layers")
        types = read_layer_types(c, n_layers, (FULL, SLIDING))
        if types and SLIDING in types:
            raise c.error("use_sliding_window", "true, since layer_types names sliding layers", False)
        return [None] * n_layers
    window = c.optional_integer("sliding_window")
    types = read_layer_types(c, n_layers, (FULL, SLIDING))
    first = c.integer("max_window_layers", default=0, minimum=0) if rule == "qwen2" else 0
    if types is not None:
        if SLIDING in types and window is None:
            raise c.missing("sliding_window", "the window of the sliding layers in layer_types")
        return [window if kind == SLIDING else None for kind in types]
    if rule == "types":
        return [None] * n_layers
    return [window if i >= first else None for i in range(n_layers)]

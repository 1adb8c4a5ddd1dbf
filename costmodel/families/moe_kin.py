"""More attention-and-experts families: OLMoE, Phi-MoE, Granite MoE, ERNIE 4.5, Hunyuan, dots1,
Solar.
"""

from collections.abc import Callable
from dataclasses import replace

from costmodel.families.common import Basics, Model, read_basics, read_top_k
from costmodel.families.dense import read_windows
from costmodel.families.moe import (
    MoELayers,
    assemble,
    attention_of,
    read_deepseek_mlps,
    windowed,
)
from costmodel.hf_config import ConfigReader
from costmodel.mixers.attention import Attention
from costmodel.mlps import MLP, DenseMLP, MoE


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read one config of a family in ``_FAMILIES``."""
    basics = read_basics(c)
    mixers, mlps = _FAMILIES[model_type](c, basics)
    model = assemble(c, basics, mixers, mlps, wrapper, norm_vectors=_norm_vectors(model_type))
    head = model_type == "phimoe" and c.flag("lm_head_bias")
    head = head or (model_type == "ernie4_5_moe" and c.flag("use_bias"))
    return replace(model, head_bias=basics.vocab_size if head else 0)


def _norm_vectors(model_type: str) -> int:
    """Phi-MoE's norms have a bias."""
    return 2 if model_type == "phimoe" else 1


def _biased(c: ConfigReader, basics: Basics, key: str = "attention_bias") -> Attention:
    bias = c.flag(key)
    return replace(attention_of(c, basics), qkv_bias=bias, o_bias=bias)


def _olmoe(c: ConfigReader, basics: Basics) -> MoELayers:
    attention = _biased(c, basics)
    norm = (attention.n_heads + attention.n_kv_heads) * attention.head_dim
    c.ignore("clip_qkv")
    moe = _plain_moe(c, "num_experts")
    return [replace(attention, extra_parameters=norm)] * basics.n_layers, [moe] * basics.n_layers


def _plain_moe(c: ConfigReader, key: str, *, shared: int = 0) -> MoE:
    n = c.integer(key)
    return MoE(
        n_experts=n,
        top_k=read_top_k(c, "num_experts_per_tok", n_experts=n),
        d_ff=c.integer("intermediate_size"),
        shared_d_ff=shared,
    )


def _phimoe(c: ConfigReader, basics: Basics) -> MoELayers:
    windows = read_windows(c, basics.n_layers, "all")
    moe = _plain_moe(c, "num_local_experts")
    return windowed(_biased(c, basics), windows), [moe] * basics.n_layers


def _granitemoe(c: ConfigReader, basics: Basics) -> MoELayers:
    shared = c.integer("shared_intermediate_size", default=0, minimum=0)
    moe = _plain_moe(c, "num_local_experts", shared=shared)
    return [_biased(c, basics)] * basics.n_layers, [moe] * basics.n_layers


def _ernie(c: ConfigReader, basics: Basics) -> MoELayers:
    """Experts every ``moe_layer_interval`` layers between a first and a last one (-1: the last)."""
    n_layers = basics.n_layers
    bias = c.flag("use_bias")
    n = c.integer("moe_num_experts")
    width = c.integer("moe_intermediate_size")
    shared = c.integer("moe_num_shared_experts", default=0, minimum=0) * width
    moe = MoE(
        n_experts=n,
        top_k=read_top_k(c, "moe_k", n_experts=n),
        d_ff=width,
        shared_d_ff=shared,
        # the learnt correction of the router, and the biases of the shared expert
        extra_parameters=n + (2 * shared + basics.d_model if bias and shared else 0),
    )
    dense = DenseMLP(d_ff=c.integer("intermediate_size"), bias=bias)
    first = c.integer("moe_layer_start_index", default=0, minimum=0)
    last = c.integer("moe_layer_end_index", default=-1, minimum=-1)
    last = n_layers - 1 if last == -1 else last
    every = c.integer("moe_layer_interval", default=1)
    c.ignore("moe_norm_min", "moe_capacity", "moe_use_aux_free", "moe_gate", "moe_layer_end_index")
    mlps: list[MLP] = [
        moe if (i + 1) % every == 0 and first <= i <= last else dense for i in range(n_layers)
    ]
    return [_biased(c, basics, "use_bias")] * n_layers, mlps


def _hunyuan(c: ConfigReader, basics: Basics) -> MoELayers:
    """One shared expert as wide as a routed one; ``moe_topk`` may be a list with one entry a
    layer.
    """
    attention = _biased(c, basics)
    attention = replace(attention, extra_parameters=2 * attention.head_dim)
    d_ff, n = c.integer("intermediate_size"), c.integer("num_experts")
    top_k = c.raw("moe_topk")
    if isinstance(top_k, list):
        values = set(c.optional_integers("moe_topk", minimum=1, maximum=n) or ())
        if len(values) != 1:
            raise c.error("moe_topk", "the same number for every layer", sorted(values))
        k = values.pop()
    else:
        k = read_top_k(c, "moe_topk", n_experts=n)
    if n == 1:
        return [attention] * basics.n_layers, [DenseMLP(d_ff=d_ff)] * basics.n_layers
    moe = MoE(n_experts=n, top_k=k, d_ff=d_ff, shared_d_ff=d_ff)
    return [attention] * basics.n_layers, [moe] * basics.n_layers


def _dots1(c: ConfigReader, basics: Basics) -> MoELayers:
    attention = _biased(c, basics)
    attention = replace(attention, extra_parameters=2 * attention.head_dim)
    window_layers = c.integer("max_window_layers", default=basics.n_layers, minimum=0)
    if c.raw("layer_types") is None and window_layers < basics.n_layers:
        raise c.error("max_window_layers", f"{basics.n_layers}, or layer_types", window_layers)
    windows = read_windows(c, basics.n_layers, "types")
    return windowed(attention, windows), read_deepseek_mlps(c, basics.n_layers)


def _solar(c: ConfigReader, basics: Basics) -> MoELayers:
    bias = c.flag("attention_bias")
    attention = replace(attention_of(c, basics), qkv_bias=bias)
    return [attention] * basics.n_layers, read_deepseek_mlps(c, basics.n_layers)


_FAMILIES: dict[str, Callable[[ConfigReader, Basics], MoELayers]] = {
    "dots1": _dots1,
    "ernie4_5_moe": _ernie,
    "granitemoe": _granitemoe,
    "granitemoeshared": _granitemoe,
    "hunyuan_v1_moe": _hunyuan,
    "olmoe": _olmoe,
    "phimoe": _phimoe,
    "solar_open": _solar,
}

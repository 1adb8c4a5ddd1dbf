"""Attention and a mixture of experts: Mixtral, Qwen MoE, GPT-OSS, Llama 4, GLM-4.5, MiniMax-M2,
MiMo.

One short function per family: how its experts, shared experts, router and attention differ.
"""

from collections.abc import Callable
from dataclasses import replace

from costmodel.architecture import Layer
from costmodel.families.common import (
    CHUNKED,
    FULL,
    SLIDING,
    Basics,
    Model,
    read_basics,
    read_heads,
    read_layer_types,
    read_sparse_layers,
    read_tied,
    read_top_k,
)
from costmodel.families.dense import read_windows
from costmodel.hf_config import ConfigReader
from costmodel.mixers.attention import Attention
from costmodel.mlps import MLP, DenseMLP, MoE

MoELayers = tuple[list[Attention], list[MLP]]


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read one config of a family in ``_FAMILIES``."""
    basics = read_basics(c)
    mixers, mlps = _FAMILIES[model_type](c, basics)
    return assemble(c, basics, mixers, mlps, wrapper)


def assemble(
    c: ConfigReader,
    basics: Basics,
    mixers: list[Attention],
    mlps: list[MLP],
    wrapper: ConfigReader | None,
    *,
    norm_vectors: int = 1,
) -> Model:
    """Layers of one mixer and one MLP with two norms, a final norm, embedding and head."""
    d = basics.d_model
    pairs = list(zip(mixers, mlps, strict=True))
    layers = {
        pair: Layer(mixers=pair[:1], mlps=pair[1:], other_parameters=2 * norm_vectors * d)
        for pair in dict.fromkeys(pairs)
    }
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=tuple(layers[pair] for pair in pairs),
        other_parameters=norm_vectors * d,
        tied_embeddings=read_tied(c, wrapper, default=False),
        max_context_tokens=basics.max_context_tokens,
    )


def attention_of(c: ConfigReader, basics: Basics) -> Attention:
    """Plain attention without biases."""
    heads = read_heads(c, basics.d_model)
    return Attention(
        n_heads=heads.n_heads,
        n_kv_heads=heads.n_kv_heads,
        head_dim=heads.head_dim,
        v_head_dim=heads.head_dim,
    )


def windowed(attention: Attention, windows: list[int | None]) -> list[Attention]:
    """The attention of every layer, by its window."""
    cache = {w: replace(attention, window_tokens=w) for w in set(windows)}
    return [cache[w] for w in windows]


def _mixtral(c: ConfigReader, basics: Basics) -> MoELayers:
    n = c.integer("num_local_experts")
    moe = MoE(
        n_experts=n,
        top_k=read_top_k(c, "num_experts_per_tok", n_experts=n),
        d_ff=c.integer("intermediate_size"),
    )
    windows = read_windows(c, basics.n_layers, "all")
    return windowed(attention_of(c, basics), windows), [moe] * basics.n_layers


def _qwen_moe(c: ConfigReader, basics: Basics, *, version: int) -> MoELayers:
    attention = attention_of(c, basics)
    shared = 0
    if version == 2:
        attention = replace(attention, qkv_bias=c.flag("qkv_bias", default=True))
        shared = c.integer("shared_expert_intermediate_size", minimum=0)
    else:
        bias = c.flag("attention_bias")
        attention = replace(
            attention, qkv_bias=bias, o_bias=bias, extra_parameters=2 * attention.head_dim
        )
    mlps = read_qwen_mlps(c, basics.n_layers, shared=shared)
    return windowed(attention, read_windows(c, basics.n_layers, "qwen2")), mlps


def read_qwen_mlps(c: ConfigReader, n_layers: int, *, shared: int) -> list[MLP]:
    """Qwen's rule: experts on every ``decoder_sparse_step``-th layer not in ``mlp_only_layers``."""
    n = c.integer("num_experts", "num_local_experts", minimum=0)
    step = c.integer("decoder_sparse_step", default=1)
    dense_layers = set(c.optional_integers("mlp_only_layers") or ())
    d_ff = c.optional_integer("intermediate_size")
    moe: MLP | None = None
    if n:
        moe = MoE(
            n_experts=n,
            top_k=read_top_k(c, "num_experts_per_tok", n_experts=n),
            d_ff=c.integer("moe_intermediate_size"),
            shared_d_ff=shared,
            shared_gate=shared > 0,
        )
    out: list[MLP] = []
    for i in range(n_layers):
        if moe is not None and i not in dense_layers and (i + 1) % step == 0:
            out.append(moe)
        elif d_ff is None:
            raise c.missing("intermediate_size", f"the MLP width of dense layer {i}")
        else:
            out.append(DenseMLP(d_ff=d_ff))
    return out


def _gpt_oss(c: ConfigReader, basics: Basics) -> MoELayers:
    attention = attention_of(c, basics)
    bias = c.flag("attention_bias", default=True)
    attention = replace(
        attention,
        qkv_bias=bias,
        o_bias=bias,
        eager=True,
        extra_parameters=attention.n_heads,  # sinks
    )
    window = c.integer("sliding_window")
    types = read_layer_types(c, basics.n_layers, (FULL, SLIDING))
    if types is None:  # the released models alternate, starting with a window
        types = tuple(FULL if i % 2 else SLIDING for i in range(basics.n_layers))
    n = c.integer("num_local_experts", "num_experts")
    moe = MoE(
        n_experts=n,
        top_k=read_top_k(c, "num_experts_per_tok", "experts_per_token", n_experts=n),
        d_ff=c.integer("intermediate_size"),
        expert_bias=True,
        router_bias=n,
    )
    windows = [window if t == SLIDING else None for t in types]
    return windowed(attention, windows), [moe] * basics.n_layers


def _llama4(c: ConfigReader, basics: Basics) -> MoELayers:
    n_layers = basics.n_layers
    bias = c.flag("attention_bias")
    attention = replace(attention_of(c, basics), qkv_bias=bias, o_bias=bias)
    chunk = c.optional_integer("attention_chunk_size")
    types = read_layer_types(c, n_layers, (FULL, CHUNKED))
    rope = c.optional_integers("no_rope_layers", maximum=1)
    interval = c.integer("no_rope_layer_interval", default=4)
    if types is None:
        rope = rope or tuple(int((i + 1) % interval != 0) for i in range(n_layers))
        if len(rope) != n_layers:
            raise c.error("no_rope_layers", f"{n_layers} entries, one for each layer", len(rope))
        types = tuple(CHUNKED if r else FULL for r in rope)
    local = replace(attention, chunk_tokens=chunk)
    d_ff = c.integer("intermediate_size")
    n = c.integer("num_local_experts")
    moe = MoE(
        n_experts=n,
        top_k=read_top_k(c, "num_experts_per_tok", n_experts=n),
        d_ff=d_ff,
        shared_d_ff=d_ff,
        runs_all=True,
    )
    step = c.integer("interleave_moe_layer_step", default=1)
    sparse = c.optional_integers("moe_layers")
    chosen = set(range(step - 1, n_layers, step) if sparse is None else sparse)
    mlps: list[MLP] = [moe] * n_layers
    if not chosen.issuperset(range(n_layers)):
        dense = DenseMLP(d_ff=c.integer("intermediate_size_mlp"))
        mlps = [moe if i in chosen else dense for i in range(n_layers)]
    c.ignore("intermediate_size_mlp", "use_qk_norm", "floor_scale", "for_llm_compressor")
    c.ignore("attn_temperature_tuning", "attn_scale")
    return [local if t == CHUNKED else attention for t in types], mlps


def _glm4_moe(c: ConfigReader, basics: Basics, *, bias: bool = False) -> MoELayers:
    attention = attention_of(c, basics)
    norm = 2 * attention.head_dim if c.flag("use_qk_norm") else 0
    bias = c.flag("attention_bias", default=bias)
    attention = replace(attention, qkv_bias=bias, extra_parameters=norm)
    return [attention] * basics.n_layers, read_deepseek_mlps(c, basics.n_layers)


def read_deepseek_mlps(c: ConfigReader, n_layers: int, *, expert_bias: bool = False) -> list[MLP]:
    """DeepSeek's rule: leading dense layers, then routed experts with ``n_shared_experts`` more of
    the same width that every token visits.
    """
    n = c.integer("n_routed_experts", "num_experts", "num_local_experts")
    width = c.integer("moe_intermediate_size")
    shared = c.integer("n_shared_experts", "num_shared_experts", default=0, minimum=0)
    moe = MoE(
        n_experts=n,
        top_k=read_top_k(c, "num_experts_per_tok", "num_experts_per_token", n_experts=n),
        d_ff=width,
        shared_d_ff=shared * width,
    )
    sparse = read_sparse_layers(c, n_layers)
    d_ff = c.optional_integer("intermediate_size")
    if all(sparse):
        return [moe] * n_layers
    if d_ff is None:
        raise c.missing("intermediate_size", "the MLP width of the dense layers")
    dense = DenseMLP(d_ff=d_ff, bias=c.flag("mlp_bias"))
    return [moe if s else dense for s in sparse]


def _minimax_m2(c: ConfigReader, basics: Basics) -> MoELayers:
    attention = attention_of(c, basics)
    c.ignore("use_qk_norm", "qk_norm_type", "use_routing_bias")
    if c.optional_integers("attn_type_list", maximum=1) not in (None, (1,) * basics.n_layers):
        raise c.error("attn_type_list", "only 1 (full attention)", c.raw("attn_type_list"))
    if c.integer("shared_intermediate_size", default=0, minimum=0):
        raise c.error("shared_intermediate_size", "0", c.raw("shared_intermediate_size"))
    norm = (attention.n_heads + attention.n_kv_heads) * attention.head_dim
    n = c.integer("num_local_experts")
    moe = MoE(
        n_experts=n,
        top_k=read_top_k(c, "num_experts_per_tok", n_experts=n),
        d_ff=c.integer("intermediate_size"),
    )
    attention = replace(attention, extra_parameters=norm)
    return [attention] * basics.n_layers, [moe] * basics.n_layers


def _mimo(c: ConfigReader, basics: Basics) -> MoELayers:
    """MiMo-V2-Flash. The file says window 128 (``sliding_window``): 128 tokens before the query, as
    its authors count; the cache holds 128.
    """
    full = attention_of(c, basics)
    bias = c.flag("attention_bias")
    # sinks in some layers: transformers runs all of them eagerly
    full = replace(full, v_head_dim=c.integer("v_head_dim"), qkv_bias=bias, eager=True)
    pattern = c.optional_integers("hybrid_layer_pattern", maximum=1)
    types = read_layer_types(c, basics.n_layers, (FULL, SLIDING))
    if types is None:
        if pattern is None or len(pattern) != basics.n_layers:
            raise c.missing("hybrid_layer_pattern", f"{basics.n_layers} entries of 0 or 1")
        types = tuple(SLIDING if p else FULL for p in pattern)
    n_heads = c.integer("swa_num_attention_heads", default=full.n_heads)
    sliding = replace(
        full,
        n_heads=n_heads,
        n_kv_heads=c.integer("swa_num_key_value_heads", default=2 * full.n_kv_heads),
        head_dim=c.integer("swa_head_dim", default=full.head_dim),
        v_head_dim=c.integer("swa_v_head_dim", default=full.v_head_dim),
        window_tokens=c.integer("sliding_window", "sliding_window_size"),
        extra_parameters=n_heads if c.flag("add_swa_attention_sink_bias", default=True) else 0,
    )
    if c.flag("add_full_attention_sink_bias"):
        full = replace(full, extra_parameters=full.n_heads)
    c.ignore("attention_chunk_size", "attention_value_scale")
    mlps = read_deepseek_mlps(c, basics.n_layers)
    return [sliding if t == SLIDING else full for t in types], mlps


_FAMILIES: dict[str, Callable[[ConfigReader, Basics], MoELayers]] = {
    "mixtral": _mixtral,
    "qwen2_moe": lambda c, basics: _qwen_moe(c, basics, version=2),
    "qwen3_moe": lambda c, basics: _qwen_moe(c, basics, version=3),
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "glm4_moe": _glm4_moe,
    "glm4v_moe_text": lambda c, basics: _glm4_moe(c, basics, bias=True),
    "qwen3_vl_moe_text": lambda c, basics: _qwen_moe(c, basics, version=3),
    "minimax_m2": _minimax_m2,
    "mimo_v2_flash": _mimo,
}

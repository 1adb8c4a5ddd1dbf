"""Mamba beside attention: Jamba, Bamba, Granite 4, Falcon-H1, Nemotron-H, Zamba2."""

from costmodel.architecture import Layer
from costmodel.families.common import (
    FULL,
    LINEAR,
    Basics,
    Model,
    read_basics,
    read_heads,
    read_layer_types,
    read_tied,
    read_top_k,
)
from costmodel.families.mamba import read_rank
from costmodel.hf_config import ConfigReader
from costmodel.mixers.attention import Attention
from costmodel.mixers.base import AbstractMixer
from costmodel.mixers.mamba import Mamba
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mlps import MLP, DenseMLP, MoE


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read a hybrid config."""
    basics = read_basics(c)
    read = {
        "jamba": _jamba,
        "bamba": _bamba,
        "granitemoehybrid": _granite,
        "falcon_h1": _falcon_h1,
    }[model_type]
    layers = read(c, basics)
    c.ignore("use_mamba_kernels", "use_mambapy", "use_associative_scan", "mamba_inner_layernorms")
    return Model(
        d_model=basics.d_model,
        vocab_size=basics.vocab_size,
        layers=layers,
        other_parameters=basics.d_model,
        tied_embeddings=read_tied(c, wrapper, default=False),
        max_context_tokens=basics.max_context_tokens,
    )


def read_attention(c: ConfigReader, d_model: int) -> Attention:
    """Plain attention with ``attention_bias`` on all four matrices."""
    heads = read_heads(c, d_model)
    bias = c.flag("attention_bias")
    return Attention(
        n_heads=heads.n_heads,
        n_kv_heads=heads.n_kv_heads,
        head_dim=heads.head_dim,
        v_head_dim=heads.head_dim,
        qkv_bias=bias,
        o_bias=bias,
    )


def _mamba2(
    c: ConfigReader, inner: int, *, out_bias: str = "mamba_proj_bias", norm: bool = True
) -> Mamba2:
    """The ``mamba_*`` keys of Bamba, Granite and Falcon-H1; ``mamba_d_head`` may be "auto"."""
    n_heads = c.integer("mamba_n_heads")
    if inner % n_heads:
        raise c.error("mamba_n_heads", f"a divisor of the inner width {inner}", n_heads)
    if c.raw("mamba_d_head") not in (None, "auto") and c.integer("mamba_d_head") * n_heads != inner:
        raise c.error("mamba_d_head", f"{inner // n_heads}", c.raw("mamba_d_head"))
    return Mamba2(
        n_heads=n_heads,
        head_dim=inner // n_heads,
        d_state=c.integer("mamba_d_state"),
        n_groups=c.integer("mamba_n_groups", default=1),
        conv_kernel=c.integer("mamba_d_conv", default=4),
        chunk_tokens=c.integer("mamba_chunk_size", default=256),
        conv_bias=c.flag("mamba_conv_bias", default=True),
        in_bias=c.flag("mamba_proj_bias"),
        out_bias=c.flag(out_bias),
        norm=norm,
    )


def _jamba(c: ConfigReader, basics: Basics) -> tuple[Layer, ...]:
    """Attention every ``attn_layer_period``, experts every ``expert_layer_period`` layers."""
    d = basics.d_model
    attention = read_attention(c, d)
    mamba = Mamba(
        d_inner=c.integer("mamba_expand", default=2) * d,
        d_state=c.integer("mamba_d_state"),
        dt_rank=read_rank(c, "mamba_dt_rank", d),
        conv_kernel=c.integer("mamba_d_conv", default=4),
        conv_bias=c.flag("mamba_conv_bias", default=True),
        bias=c.flag("mamba_proj_bias"),
        inner_norms=True,
    )
    d_ff, n = c.integer("intermediate_size"), c.integer("num_experts")
    dense = DenseMLP(d_ff=d_ff)
    moe: MLP = dense
    if n > 1:
        moe = MoE(n_experts=n, top_k=read_top_k(c, "num_experts_per_tok", n_experts=n), d_ff=d_ff)
    attention_every, attention_at = (
        c.integer("attn_layer_period"),
        c.integer("attn_layer_offset", minimum=0),
    )
    experts_every, experts_at = (
        c.integer("expert_layer_period"),
        c.integer("expert_layer_offset", minimum=0),
    )
    c.ignore("layers_block_type", "layer_types", "layers_num_experts", "num_experts_per_tok")
    out = []
    for i in range(basics.n_layers):
        mixer: AbstractMixer = attention if i % attention_every == attention_at else mamba
        mlp = moe if i % experts_every == experts_at else dense
        out.append(Layer(mixers=(mixer,), mlps=(mlp,), other_parameters=2 * d))
    return tuple(out)


def _bamba(c: ConfigReader, basics: Basics) -> tuple[Layer, ...]:
    """Mamba-2 with attention at ``attn_layer_indices``."""
    d, n_layers = basics.d_model, basics.n_layers
    attention = read_attention(c, d)
    mamba = _mamba2(c, c.integer("mamba_expand", default=2) * d)
    mlp = DenseMLP(d_ff=c.integer("intermediate_size"), bias=c.flag("mlp_bias"))
    types = read_layer_types(c, n_layers, (FULL, LINEAR)) or read_layer_types(
        c, n_layers, (FULL, LINEAR), "layers_block_type"
    )
    indices = c.optional_integers("attn_layer_indices", maximum=n_layers - 1)
    if types is None:
        chosen = set(indices or ())
        types = tuple(FULL if i in chosen else LINEAR for i in range(n_layers))
    c.ignore("layers_block_type", "attn_rotary_emb")
    layers = {
        FULL: Layer(mixers=(attention,), mlps=(mlp,), other_parameters=2 * d),
        LINEAR: Layer(mixers=(mamba,), mlps=(mlp,), other_parameters=2 * d),
    }
    return tuple(layers[t] for t in types)


def _granite(c: ConfigReader, basics: Basics) -> tuple[Layer, ...]:
    """Granite 4: experts if there are any, and a shared MLP on every layer. Files without a single
    Mamba layer exist, so the layer list decides, not the model type.
    """
    d, n_layers = basics.d_model, basics.n_layers
    types = read_layer_types(c, n_layers, (FULL, LINEAR)) or read_layer_types(
        c, n_layers, (FULL, LINEAR), "layers_block_type"
    )
    if types is None:
        raise c.missing("layer_types", "which layers are attention and which Mamba")
    c.ignore("layers_block_type")
    mlps: tuple[MLP, ...] = ()
    n = c.integer("num_local_experts", default=0, minimum=0)
    shared = c.integer("shared_intermediate_size", minimum=0)
    if n:
        moe = MoE(
            n_experts=n,
            top_k=read_top_k(c, "num_experts_per_tok", n_experts=n),
            d_ff=c.integer("intermediate_size"),
            shared_d_ff=shared,
        )
        mlps = (moe,)
    elif shared:
        mlps = (DenseMLP(d_ff=shared),)
    c.ignore("num_experts_per_tok", "intermediate_size", "init_method", "mamba_n_groups")
    mixers: dict[str, AbstractMixer] = {}
    if FULL in types:
        mixers[FULL] = read_attention(c, d)
    if LINEAR in types:
        mixers[LINEAR] = _mamba2(c, c.integer("mamba_expand", default=2) * d)
    for key in ("attention_bias", "num_attention_heads", "num_key_value_heads", "mamba_expand"):
        c.ignore(key)
    for key in ("n_heads", "d_state", "d_head", "d_conv", "chunk_size", "conv_bias", "proj_bias"):
        c.ignore(f"mamba_{key}")
    layers = {
        kind: Layer(mixers=(mixer,), mlps=mlps, other_parameters=2 * d)
        for kind, mixer in mixers.items()
    }
    return tuple(layers[t] for t in types)


def _falcon_h1(c: ConfigReader, basics: Basics) -> tuple[Layer, ...]:
    """Attention and Mamba-2 side by side in every layer."""
    d = basics.d_model
    inner = c.integer("mamba_d_ssm", default=c.integer("mamba_expand", default=2) * d)
    mamba = _mamba2(c, inner, out_bias="projectors_bias", norm=c.flag("mamba_rms_norm"))
    c.ignore("mamba_norm_before_gate", "mamba_use_mlp", "mlp_expansion_factor")
    c.ignore("layers_block_type", "layer_types", "attn_layer_indices")
    mlp = DenseMLP(d_ff=c.integer("intermediate_size"), bias=c.flag("mlp_bias"))
    layer = Layer(mixers=(read_attention(c, d), mamba), mlps=(mlp,), other_parameters=2 * d)
    return (layer,) * basics.n_layers

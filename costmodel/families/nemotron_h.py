"""Nemotron-H: every layer is one thing only: Mamba-2, attention, an MLP, or experts."""

from costmodel.architecture import Layer
from costmodel.families.common import (
    FULL,
    LINEAR,
    Model,
    modern_types,
    read_heads,
    read_tied,
    read_top_k,
)
from costmodel.hf_config import MAX_LAYERS, ConfigReader
from costmodel.mixers.attention import Attention
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mlps import DenseMLP, MoE

MLP_LAYER, MOE_LAYER = "mlp", "moe"
_LETTERS = {"M": LINEAR, "*": FULL, "-": MLP_LAYER, "E": MOE_LAYER}


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read a Nemotron-H config: ``hybrid_override_pattern``, or a list of layer types."""
    d = c.integer("hidden_size")
    types = _layer_types(c)
    layers: dict[str, Layer] = {}
    if LINEAR in types:
        layers[LINEAR] = Layer(mixers=(_mamba2(c),), other_parameters=d)
    if FULL in types:
        layers[FULL] = Layer(mixers=(_attention(c, d),), other_parameters=d)
    if MLP_LAYER in types:
        mlp = DenseMLP(d_ff=c.integer("intermediate_size"), gated=False, bias=c.flag("mlp_bias"))
        layers[MLP_LAYER] = Layer(mixers=(), mlps=(mlp,), other_parameters=d)
    if MOE_LAYER in types:
        layers[MOE_LAYER] = Layer(mixers=(), mlps=(_experts(c),), other_parameters=d)
    _ignore_unused(c)
    return Model(
        d_model=d,
        vocab_size=c.integer("vocab_size"),
        layers=tuple(layers[t] for t in types),
        other_parameters=d,
        tied_embeddings=read_tied(c, wrapper, default=False),
        max_context_tokens=c.optional_integer("max_position_embeddings"),
    )


def _layer_types(c: ConfigReader) -> tuple[str, ...]:
    n_layers = c.optional_integer("num_hidden_layers", maximum=MAX_LAYERS)
    types = c.optional_texts("layers_block_type", "layer_types")
    key = "layers_block_type"
    if types is not None:
        types = modern_types(types)
        c.ignore("hybrid_override_pattern")
        unknown = sorted(set(types) - set(_LETTERS.values()))
        if unknown:
            raise c.error(key, ", ".join(_LETTERS.values()), unknown[0])
    else:
        key = "hybrid_override_pattern"
        pattern = c.text(key)
        unknown = sorted(set(pattern) - set(_LETTERS))
        if unknown:
            raise c.error(key, "only the letters M * - E", unknown[0])
        types = tuple(_LETTERS[x] for x in pattern)
    if not types or len(types) > MAX_LAYERS or n_layers not in (None, len(types)):
        raise c.error(key, f"{n_layers or 'some'} layers", f"{len(types)} layers")
    return types


def _mamba2(c: ConfigReader) -> Mamba2:
    bias = c.flag("use_bias")
    return Mamba2(
        n_heads=c.integer("mamba_num_heads"),
        head_dim=c.integer("mamba_head_dim"),
        d_state=c.integer("ssm_state_size"),
        n_groups=c.integer("n_groups", "mamba_n_groups"),
        conv_kernel=c.integer("conv_kernel", "mamba_d_conv", default=4),
        chunk_tokens=c.integer("chunk_size", "mamba_chunk_size", default=128),
        conv_bias=c.flag("use_conv_bias", "mamba_conv_bias", default=True),
        in_bias=bias,
        out_bias=bias,
    )


def _attention(c: ConfigReader, d: int) -> Attention:
    if c.flag("attention_bias"):
        raise c.error("attention_bias", "false", True)
    head_dim = c.optional_integer("head_dim", "attention_head_dim")
    heads = read_heads(c, d) if head_dim is None else None
    n_heads = c.integer("num_attention_heads")
    return Attention(
        n_heads=n_heads,
        n_kv_heads=c.integer("num_key_value_heads", default=n_heads),
        head_dim=head_dim or (heads.head_dim if heads else 0),
        v_head_dim=head_dim or (heads.head_dim if heads else 0),
        window_tokens=c.optional_integer("sliding_window"),
    )


def _experts(c: ConfigReader) -> MoE:
    n = c.integer("n_routed_experts", "num_local_experts")
    shared = c.integer("moe_shared_expert_intermediate_size")
    if c.integer("n_shared_experts", default=1) != 1:
        raise c.error("n_shared_experts", "1", c.raw("n_shared_experts"))
    return MoE(
        n_experts=n,
        top_k=read_top_k(c, "num_experts_per_tok", n_experts=n),
        d_ff=c.integer("moe_intermediate_size"),
        gated=False,
        shared_d_ff=shared,
        shared_gated=False,
        latent_dim=c.optional_integer("moe_latent_size"),
        bias=c.flag("mlp_bias"),
    )


def _ignore_unused(c: ConfigReader) -> None:
    """Keys of layer kinds the model has none of, and keys that change nothing priced."""
    c.ignore("expand", "mamba_expand", "time_step_rank", "moe_shared_expert_overlap")
    c.ignore("use_mamba_kernels", "mamba_proj_bias", "mamba_hidden_act", "mlp_hidden_act")
    c.ignore("mamba_ssm_cache_dtype", "mtp_layers_block_type", "mtp_hybrid_override_pattern")
    c.ignore("num_attention_heads", "num_key_value_heads", "head_dim", "attention_head_dim")
    c.ignore("n_routed_experts", "n_shared_experts", "moe_intermediate_size", "moe_latent_size")
    c.ignore("moe_shared_expert_intermediate_size", "num_experts_per_tok", "intermediate_size")
    c.ignore("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel")
    c.ignore("chunk_size", "use_conv_bias", "use_bias", "attention_bias", "sliding_window")
    c.ignore("layer_types", "layers_block_type")

"""Qwen3-Next and Qwen3.5: Gated DeltaNet layers with a gated full-attention layer every few."""

from costmodel.architecture import Layer
from costmodel.families.common import (
    FULL,
    LINEAR,
    Model,
    read_basics,
    read_heads,
    read_layer_types,
    read_tied,
)
from costmodel.families.moe import read_qwen_mlps
from costmodel.hf_config import ConfigReader
from costmodel.mixers.attention import Attention
from costmodel.mixers.base import AbstractMixer
from costmodel.mixers.delta import DeltaRule
from costmodel.mlps import MLP, DenseMLP


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read a Qwen hybrid config."""
    basics = read_basics(c)
    d, n_layers = basics.d_model, basics.n_layers
    heads = read_heads(c, d)
    if not c.flag("attn_output_gate", default=True):
        raise c.error("attn_output_gate", "true", False)
    bias = c.flag("attention_bias")
    attention = Attention(
        n_heads=heads.n_heads,
        n_kv_heads=heads.n_kv_heads,
        head_dim=heads.head_dim,
        v_head_dim=heads.head_dim,
        qkv_bias=bias,
        o_bias=bias,
        output_gate=True,
        extra_parameters=2 * heads.head_dim,
    )
    delta = DeltaRule(
        form="gdn",
        n_key_heads=c.integer("linear_num_key_heads"),
        n_value_heads=c.integer("linear_num_value_heads"),
        key_dim=c.integer("linear_key_head_dim"),
        value_dim=c.integer("linear_value_head_dim"),
        conv_kernel=c.integer("linear_conv_kernel_dim"),
    )
    every = c.integer("full_attention_interval", default=4)
    types = read_layer_types(c, n_layers, (FULL, LINEAR)) or tuple(
        LINEAR if (i + 1) % every else FULL for i in range(n_layers)
    )
    mlps: list[MLP]
    if "moe" in model_type or model_type == "qwen3_next":
        shared = c.integer("shared_expert_intermediate_size", minimum=0)
        mlps = read_qwen_mlps(c, n_layers, shared=shared)
    else:
        c.ignore("mlp_only_layers")
        mlps = [DenseMLP(d_ff=c.integer("intermediate_size"))] * n_layers
    c.ignore("mamba_ssm_dtype", "partial_rotary_factor")
    layers: dict[tuple[str, MLP], Layer] = {}
    for kind, mlp in zip(types, mlps, strict=True):
        mixer: AbstractMixer = attention if kind == FULL else delta
        layers.setdefault((kind, mlp), Layer(mixers=(mixer,), mlps=(mlp,), other_parameters=2 * d))
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=tuple(layers[pair] for pair in zip(types, mlps, strict=True)),
        other_parameters=d,
        tied_embeddings=read_tied(c, wrapper, default=False),
        max_context_tokens=basics.max_context_tokens,
    )

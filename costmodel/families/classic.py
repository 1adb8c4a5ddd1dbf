"""OPT, GPT-2, GPT-J and GPT-NeoX: biases, layer norms with bias, plain (ungated) MLPs."""

from dataclasses import replace

from costmodel.architecture import Layer
from costmodel.families.common import Model, read_basics, read_tied
from costmodel.hf_config import ConfigReader
from costmodel.mixers.attention import Attention
from costmodel.mlps import DenseMLP


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read one of the four."""
    return {"opt": _opt, "gpt2": _gpt2, "gptj": _gptj, "gpt_neox": _gpt_neox}[model_type](c)


def _heads(c: ConfigReader, d: int, *, qkv_bias: bool, o_bias: bool) -> Attention:
    n_heads = c.integer("num_attention_heads", "n_head")
    if d % n_heads:
        raise c.error("num_attention_heads", f"a divisor of the width {d}", n_heads)
    return Attention(
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d // n_heads,
        v_head_dim=d // n_heads,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
    )


def _opt(c: ConfigReader) -> Model:
    """OPT: learnt positions (two more than it says); small models embed in another width."""
    basics = read_basics(c)
    d = basics.d_model
    bias = c.flag("enable_bias", default=True)
    affine = c.flag("layer_norm_elementwise_affine", default=True)
    norm = 2 * d if affine else 0
    width = c.integer("word_embed_proj_dim", default=d)
    positions = c.integer("max_position_embeddings")
    c.ignore("layerdrop", "activation_function")
    before = c.flag("do_layer_norm_before", default=True)
    final = norm if before and not c.flag("_remove_final_layer_norm") else 0
    mlp = DenseMLP(d_ff=c.integer("ffn_dim"), gated=False, bias=bias)
    layer = Layer(
        mixers=(_heads(c, d, qkv_bias=bias, o_bias=bias),),
        mlps=(mlp,),
        other_parameters=2 * norm,
    )
    tied = read_tied(c, None, default=True)
    projections = 2 * width * d if width != d else 0
    # An LM head in the embedding's width, when that is not the model's
    head = basics.vocab_size * (width - d) if not tied else 0
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=(layer,) * basics.n_layers,
        other_parameters=final + projections + head,
        embedding_parameters=basics.vocab_size * width + (positions + 2) * d,
        tied_embeddings=tied,
        max_context_tokens=positions,
    )


def _gpt2(c: ConfigReader) -> Model:
    basics = read_basics(c)
    d = basics.d_model
    positions = c.integer("n_positions", "max_position_embeddings")
    c.ignore("n_ctx", "reorder_and_upcast_attn", "n_special", "predict_special_tokens")
    mlp = DenseMLP(d_ff=c.integer("n_inner", default=4 * d), gated=False, bias=True)
    layer = Layer(
        mixers=(_heads(c, d, qkv_bias=True, o_bias=True),), mlps=(mlp,), other_parameters=4 * d
    )
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=(layer,) * basics.n_layers,
        other_parameters=2 * d,
        embedding_parameters=(basics.vocab_size + positions) * d,
        tied_embeddings=read_tied(c, None, default=True),
        max_context_tokens=positions,
    )


def _gptj(c: ConfigReader) -> Model:
    """GPT-J: attention and MLP side by side after one norm; a head with bias."""
    basics = read_basics(c)
    d = basics.d_model
    mlp = DenseMLP(d_ff=c.integer("n_inner", default=4 * d), gated=False, bias=True)
    # transformers has no fused attention for this family
    attention = replace(_heads(c, d, qkv_bias=False, o_bias=False), eager=True)
    layer = Layer(mixers=(attention,), mlps=(mlp,), other_parameters=2 * d)
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=(layer,) * basics.n_layers,
        other_parameters=2 * d,
        tied_embeddings=read_tied(c, None, default=False),
        head_bias=basics.vocab_size,
        max_context_tokens=basics.max_context_tokens,
    )


def _gpt_neox(c: ConfigReader) -> Model:
    basics = read_basics(c)
    d = basics.d_model
    bias = c.flag("attention_bias", default=True)
    c.ignore("use_parallel_residual", "num_key_value_heads")
    mlp = DenseMLP(d_ff=c.integer("intermediate_size"), gated=False, bias=True)
    layer = Layer(
        mixers=(_heads(c, d, qkv_bias=bias, o_bias=bias),), mlps=(mlp,), other_parameters=4 * d
    )
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=(layer,) * basics.n_layers,
        other_parameters=2 * d,
        tied_embeddings=read_tied(c, None, default=False),
        max_context_tokens=basics.max_context_tokens,
    )

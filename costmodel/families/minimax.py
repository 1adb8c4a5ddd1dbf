"""MiniMax-Text-01: lightning attention with a softmax layer every eighth, experts on every
layer.
"""

from costmodel.architecture import Layer
from costmodel.families.common import (
    FULL,
    LINEAR,
    Model,
    read_basics,
    read_heads,
    read_layer_types,
    read_tied,
    read_top_k,
)
from costmodel.hf_config import ConfigReader
from costmodel.mixers.attention import Attention
from costmodel.mixers.base import AbstractMixer
from costmodel.mixers.lightning import Lightning
from costmodel.mlps import MoE


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read a MiniMax config: ``layer_types``, or ``attn_type_list`` with 1 for softmax
    attention.
    """
    basics = read_basics(c)
    d, n_layers = basics.d_model, basics.n_layers
    heads = read_heads(c, d)
    attention = Attention(
        n_heads=heads.n_heads,
        n_kv_heads=heads.n_kv_heads,
        head_dim=heads.head_dim,
        v_head_dim=heads.head_dim,
        window_tokens=c.optional_integer("sliding_window"),
    )
    lightning = Lightning(
        n_heads=heads.n_heads,
        head_dim=heads.head_dim,
        block_tokens=c.integer("block_size", default=256),
    )
    types = read_layer_types(c, n_layers, (FULL, LINEAR))
    flags = c.optional_integers("attn_type_list", maximum=1)
    if types is None:
        if flags is None or len(flags) != n_layers:
            raise c.missing("layer_types", f"or attn_type_list with {n_layers} entries")
        types = tuple(FULL if f else LINEAR for f in flags)
    for key in ("shared_intermediate_size", "shared_moe_mode"):
        if c.raw(key) not in (None, 0, "sigmoid", ""):
            raise c.error(key, "0 (no shared expert)", c.raw(key))
    for kind in ("full_attn", "linear_attn", "mlp", "layernorm_full_attention"):
        c.ignore(f"{kind}_alpha_factor", f"{kind}_beta_factor", f"{kind}_alpha", f"{kind}_beta")
    c.ignore("layernorm_linear_attention_alpha", "layernorm_linear_attention_beta")
    n = c.integer("num_local_experts")
    moe = MoE(
        n_experts=n,
        top_k=read_top_k(c, "num_experts_per_tok", n_experts=n),
        d_ff=c.integer("intermediate_size"),
    )
    mixers: dict[str, AbstractMixer] = {FULL: attention, LINEAR: lightning}
    layers = {
        kind: Layer(mixers=(mixer,), mlps=(moe,), other_parameters=2 * d)
        for kind, mixer in mixers.items()
    }
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=tuple(layers[t] for t in types),
        other_parameters=d,
        tied_embeddings=read_tied(c, wrapper, default=False),
        max_context_tokens=basics.max_context_tokens,
    )

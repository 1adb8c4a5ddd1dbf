"""RecurrentGemma (RG-LRU with local attention) and RWKV-5."""

from costmodel.architecture import Layer
from costmodel.families.common import Model, read_basics, read_heads, read_tied
from costmodel.hf_config import ConfigReader
from costmodel.mixers.attention import Attention
from costmodel.mixers.base import Linear
from costmodel.mixers.rglru import RGLRU
from costmodel.mixers.rwkv5 import RWKV5
from costmodel.mlps import DenseMLP


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read a RecurrentGemma or RWKV-5 config."""
    return _rwkv5(c) if model_type == "rwkv5" else _recurrent_gemma(c, wrapper)


def _recurrent_gemma(c: ConfigReader, wrapper: ConfigReader | None) -> Model:
    """``block_types`` repeats over the layers; the MLP is half of ``intermediate_size`` wide."""
    basics = read_basics(c)
    d, n_layers = basics.d_model, basics.n_layers
    heads = read_heads(c, d)
    width = c.integer("lru_width", default=d)
    if width % heads.n_heads:
        raise c.error("lru_width", f"a multiple of the {heads.n_heads} heads", width)
    mlp = DenseMLP(d_ff=c.integer("intermediate_size") // 2, bias=True, activation="gelu_tanh")
    recurrent = RGLRU(
        width=width, n_blocks=heads.n_heads, conv_kernel=c.integer("conv1d_width", default=4)
    )
    attention = Attention(
        n_heads=heads.n_heads,
        n_kv_heads=heads.n_kv_heads,
        head_dim=heads.head_dim,
        v_head_dim=heads.head_dim,
        window_tokens=c.integer("attention_window_size", "sliding_window"),
        qkv_bias=c.flag("attention_bias"),
        o_bias=True,
    )
    pattern = c.optional_texts("block_types", "_block_types")
    layers = {
        "recurrent": Layer(mixers=(recurrent,), mlps=(mlp,), other_parameters=2 * d),
        "attention": Layer(mixers=(attention,), mlps=(mlp,), other_parameters=2 * d),
    }
    if not pattern or not set(pattern) <= set(layers):
        raise c.error("block_types", 'a list of "recurrent" and "attention"', pattern)
    c.ignore("layers_block_type", "layer_types")
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=tuple(layers[pattern[i % len(pattern)]] for i in range(n_layers)),
        other_parameters=d,
        tied_embeddings=read_tied(c, wrapper, default=True),
        max_context_tokens=basics.max_context_tokens,
    )


def _rwkv5(c: ConfigReader) -> Model:
    """Time mixing (5 matrices) and channel mixing (key, value, and a receptance gate of d x d).

    Without ``intermediate_size`` the channel mixing is 3.5 d wide, rounded down to a multiple of
    32.
    """
    basics = read_basics(c)
    d = basics.d_model
    inner = c.integer("attention_hidden_size", default=d)
    head = c.integer("head_size", default=64)
    if inner % head:
        raise c.error("head_size", f"a divisor of the attention width {inner}", head)
    d_ff = c.integer("intermediate_size", default=int(d * 3.5) // 32 * 32)
    c.ignore("num_attention_heads", "head_size_divisor", "rescale_every", "model_version")
    layer = Layer(
        mixers=(RWKV5(n_heads=inner // head, head_dim=head, shift_dim=d),),
        mlps=(DenseMLP(d_ff=d_ff, gated=False),),
        linears=(Linear(name="channel_receptance", n_in=d, n_out=d, role="mlp"),),
        other_parameters=4 * d + 2 * d,  # two layer norms with bias, two mixing vectors
    )
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=(layer,) * basics.n_layers,
        other_parameters=4 * d,  # the norm before the first layer and the last one
        tied_embeddings=c.flag("tie_word_embeddings"),
        max_context_tokens=basics.max_context_tokens,
    )

"""Zamba2: Mamba-2 layers, and a few transformer blocks whose weights every hybrid layer shares.

A hybrid layer runs a shared block on concat(hidden, embedding) (heads of size 2 d / N), with its
own low-rank adapters and its own projection back into the stream, before its own Mamba-2 mixer.
"""

from costmodel.architecture import Layer
from costmodel.families.common import LINEAR, Model, modern_types, read_basics, read_tied
from costmodel.hf_config import ConfigReader
from costmodel.mixers.attention import Attention
from costmodel.mixers.base import Linear
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mlps import DenseMLP

HYBRID = "hybrid"


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read a Zamba2 config."""
    basics = read_basics(c)
    d, n_layers = basics.d_model, basics.n_layers
    types = c.optional_texts("layers_block_type", "layer_types")
    if types is None:
        raise c.missing("layers_block_type", "which layers are Mamba and which hybrid")
    types = modern_types(types)
    if len(types) != n_layers or not set(types) <= {LINEAR, HYBRID}:
        raise c.error(
            "layers_block_type", f"{n_layers} entries of mamba or hybrid", sorted(set(types))
        )
    mamba = _mamba2(c, d)
    attention, mlp = _shared_block(c, d)
    n_blocks = c.integer("num_mem_blocks", default=1)
    adapters = _adapters(c, d, attention, mlp)
    plain = Layer(mixers=(mamba,), other_parameters=d)
    layers, n_hybrid = [], 0
    for kind in types:
        if kind == LINEAR:
            layers.append(plain)
            continue
        layers.append(
            Layer(
                mixers=(attention, mamba),
                mlps=(mlp,),
                other_parameters=d,
                linears=adapters,
                shared_with=n_hybrid % n_blocks,
            )
        )
        n_hybrid += 1
    block = Layer(mixers=(attention,), mlps=(mlp,), other_parameters=2 * d + d)
    c.ignore("hybrid_layer_ids", "layer_types", "layers_block_type", "use_mamba_kernels")
    c.ignore("use_long_context", "use_mem_rope", "use_mem_eff_path", "rescale_prenorm_residual")
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=tuple(layers),
        shared_layers=(block,) * min(n_blocks, n_hybrid),
        other_parameters=d,
        tied_embeddings=read_tied(c, wrapper, default=True),
        max_context_tokens=basics.max_context_tokens,
    )


def _mamba2(c: ConfigReader, d: int) -> Mamba2:
    inner = c.integer("mamba_expand", default=2) * d
    n_heads = c.integer("n_mamba_heads")
    if inner % n_heads:
        raise c.error("n_mamba_heads", f"a divisor of the inner width {inner}", n_heads)
    c.ignore("mamba_headdim", "use_conv_bias")
    bias = c.flag("add_bias_linear")
    return Mamba2(
        n_heads=n_heads,
        head_dim=inner // n_heads,
        d_state=c.integer("mamba_d_state"),
        n_groups=c.integer("mamba_ngroups", default=1),
        conv_kernel=c.integer("mamba_d_conv", default=4),
        chunk_tokens=c.integer("chunk_size", default=256),
        in_bias=bias,
        out_bias=bias,
    )


def _shared_block(c: ConfigReader, d: int) -> tuple[Attention, DenseMLP]:
    n_heads = c.integer("num_attention_heads")
    width = c.integer("attention_hidden_size", default=2 * d)
    if width != 2 * d or width % n_heads:
        raise c.error("attention_hidden_size", f"{2 * d}, a multiple of {n_heads} heads", width)
    head_dim = c.integer("attention_head_dim", default=width // n_heads)
    c.ignore("head_dim", "kv_channels", "num_query_groups", "ffn_hidden_size")
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=c.integer("num_key_value_heads", default=n_heads),
        head_dim=head_dim,
        v_head_dim=head_dim,
        input_dim=width,
    )
    d_ff = c.integer("intermediate_size", default=4 * d)
    return attention, DenseMLP(d_ff=d_ff, bias=c.flag("add_bias_linear"))


def _adapters(c: ConfigReader, d: int, attention: Attention, mlp: DenseMLP) -> tuple[Linear, ...]:
    """What a hybrid layer owns beside its Mamba mixer: MLP adapter, attention adapters if asked
    for, and the projection back.
    """
    rank = c.integer("adapter_rank", "lora_rank")
    out = [
        Linear(name="hybrid_proj", n_in=d, n_out=d),
        Linear(name="adapter_gate_up_a", n_in=d, n_out=rank, role="mlp"),
        Linear(name="adapter_gate_up_b", n_in=rank, n_out=2 * mlp.d_ff, role="mlp"),
    ]
    if c.flag("use_shared_attention_adapter"):
        for part in "qkv":
            out += [
                Linear(name=f"adapter_{part}_a", n_in=2 * d, n_out=rank, role="attention"),
                Linear(name=f"adapter_{part}_b", n_in=rank, n_out=2 * d, role="attention"),
            ]
    return tuple(out)

"""Gemma 1 to 4: norms around both blocks, windows, and in Gemma 4 heads that differ by layer type.

Gemma 3 and 4 files of multimodal models leave out keys that keep the class's defaults; those
defaults are what such a file means, and are written out here.
"""

from dataclasses import replace

from costmodel.architecture import Layer
from costmodel.families.common import (
    FULL,
    SLIDING,
    Model,
    read_basics,
    read_layer_types,
    read_tied,
    read_top_k,
)
from costmodel.hf_config import MAX_LAYERS, ConfigReader
from costmodel.mixers.attention import Attention
from costmodel.mixers.base import Linear
from costmodel.mlps import MLP, DenseMLP, MoE

_SHARED_NOTE = (
    "layers that share a cache are priced for the whole prompt; transformers runs them for its "
    "last token only"
)


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read a Gemma config."""
    generation = int(model_type.removeprefix("gemma")[:1] or 1)
    if generation == 4:
        return _gemma4(c, wrapper)
    return _gemma(c, wrapper, generation)


def _gemma(c: ConfigReader, wrapper: ConfigReader | None, generation: int) -> Model:
    third = generation == 3
    d = c.integer("hidden_size", default=2304 if third else None)
    n_layers = c.integer("num_hidden_layers", maximum=MAX_LAYERS, default=26 if third else None)
    vocab = c.integer("vocab_size", default=262_208 if third else None)
    bias = c.flag("attention_bias")
    head_dim = c.integer("head_dim", default=256)
    attention = Attention(
        n_heads=c.integer("num_attention_heads", default=8 if third else None),
        n_kv_heads=c.integer("num_key_value_heads", default=4 if third else None),
        head_dim=head_dim,
        v_head_dim=head_dim,
        qkv_bias=bias,
        o_bias=bias,
        eager=generation == 2,  # its soft cap
        extra_parameters=2 * head_dim if third else 0,
    )
    mlp = DenseMLP(
        d_ff=c.integer("intermediate_size", default=9216 if third else None), activation="gelu_tanh"
    )
    norms = 2 if generation == 1 else 4
    window: int | None = None
    types: tuple[str, ...] = (FULL,) * n_layers
    if generation > 1:
        window = c.integer("sliding_window", "sliding_window_size", default=4096)
        every = c.integer("sliding_window_pattern", default=6 if third else 2)
        c.ignore("_sliding_window_pattern")
        types = read_layer_types(c, n_layers, (FULL, SLIDING)) or tuple(
            SLIDING if (i + 1) % every else FULL for i in range(n_layers)
        )
    layers = {
        FULL: Layer(mixers=(attention,), mlps=(mlp,), other_parameters=norms * d),
        SLIDING: Layer(
            mixers=(replace(attention, window_tokens=window),),
            mlps=(mlp,),
            other_parameters=norms * d,
        ),
    }
    return Model(
        d_model=d,
        vocab_size=vocab,
        layers=tuple(layers[t] for t in types),
        other_parameters=d,
        tied_embeddings=read_tied(c, wrapper, default=True),
        max_context_tokens=c.optional_integer("max_position_embeddings"),
    )


def _gemma4(c: ConfigReader, wrapper: ConfigReader | None) -> Model:
    basics = read_basics(c)
    d, n_layers = basics.d_model, basics.n_layers
    types = read_layer_types(c, n_layers, (FULL, SLIDING)) or tuple(
        SLIDING if (i + 1) % 6 and i + 1 < n_layers else FULL for i in range(n_layers)
    )
    n_shared = c.integer("num_kv_shared_layers", default=0, minimum=0, maximum=n_layers - 1)
    mixers = _gemma4_mixers(c, [i for i, kind in enumerate(types) if kind == FULL])
    moe = _gemma4_experts(c)
    d_ff = c.integer("intermediate_size")
    wide = c.flag("use_double_wide_mlp")
    per_layer = c.integer("hidden_size_per_layer_input", default=256, minimum=0)
    gates = (
        Linear(name="per_layer_input_gate", n_in=d, n_out=per_layer, role="mlp"),
        Linear(name="per_layer_projection", n_in=per_layer, n_out=d, role="mlp"),
    )
    cache: dict[tuple[str, bool], Layer] = {}
    layers = []
    for i, kind in enumerate(types):
        shares = i >= n_layers - n_shared
        if (kind, shares) not in cache:
            mlp = DenseMLP(d_ff=d_ff * (2 if wide and shares else 1), activation="gelu_tanh")
            mixer = mixers[kind]
            if shares:
                mixer = replace(mixer, owns_cache=False, extra_parameters=mixer.head_dim)
            mlps: tuple[MLP, ...] = (mlp,) if moe is None else (mlp, moe)
            cache[kind, shares] = Layer(
                mixers=(mixer,),
                mlps=mlps,
                linears=gates if per_layer else (),
                other_parameters=d * (4 + (3 if moe else 0) + (1 if per_layer else 0)),
            )
        layers.append(cache[kind, shares])
    rows = c.integer("vocab_size_per_layer_input", default=262_144)
    embedding = basics.vocab_size * d + per_layer * n_layers * rows
    if per_layer:  # one projection feeds all layers; it is counted with the first
        project = Linear(
            name="per_layer_model_projection", n_in=d, n_out=per_layer * n_layers, role="mlp"
        )
        layers[0] = replace(layers[0], linears=(*layers[0].linears, project))
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=tuple(layers),
        other_parameters=d + per_layer,
        embedding_parameters=embedding,
        tied_embeddings=read_tied(c, wrapper, default=True),
        max_context_tokens=basics.max_context_tokens,
        notes=(_SHARED_NOTE,) if n_shared else (),
    )


def _gemma4_global_heads(c: ConfigReader, full_layers: list[int]) -> tuple[int, int | None]:
    """Head size and KV heads of the full-attention layers: ``per_layer_config`` as transformers 5
    writes it, or ``global_head_dim`` and ``num_global_key_value_heads``.
    """
    own = c.section("per_layer_config")
    if own is None:
        return c.integer("global_head_dim", default=512), c.optional_integer(
            "num_global_key_value_heads"
        )
    found = set()
    for i in full_layers:
        layer = own.section(str(i))
        if layer is None:
            raise own.missing(str(i), "the head size of this full-attention layer")
        found.add((layer.integer("head_dim"), layer.optional_integer("num_key_value_heads")))
    if len(found) != 1:
        raise c.error("per_layer_config", "the same heads on every full layer", sorted(found))
    return found.pop()


def _gemma4_mixers(c: ConfigReader, full_layers: list[int]) -> dict[str, Attention]:
    bias = c.flag("attention_bias")
    n_heads = c.integer("num_attention_heads")
    n_kv = c.integer("num_key_value_heads")
    head_dim = c.integer("head_dim", default=256)
    k_eq_v = c.flag("attention_k_eq_v")
    wide, n_global = _gemma4_global_heads(c, full_layers)
    if not k_eq_v or n_global is None:
        n_global = n_kv
    sliding = Attention(
        n_heads=n_heads,
        n_kv_heads=n_kv,
        head_dim=head_dim,
        v_head_dim=head_dim,
        window_tokens=c.integer("sliding_window", default=512),
        qkv_bias=bias,
        o_bias=bias,
        extra_parameters=2 * head_dim,  # norms of queries and keys; the values' has no weight
    )
    full = replace(
        sliding,
        n_kv_heads=n_global,
        head_dim=wide,
        v_head_dim=wide,
        window_tokens=None,
        k_eq_v=k_eq_v,
        extra_parameters=2 * wide,
    )
    return {FULL: full, SLIDING: sliding}


def _gemma4_experts(c: ConfigReader) -> MoE | None:
    """Experts beside the dense MLP; the router scales its input and every expert's output."""
    if not c.flag("enable_moe_block"):
        c.ignore("num_experts", "top_k_experts", "moe_intermediate_size")
        return None
    n = c.integer("num_experts")
    return MoE(
        n_experts=n,
        top_k=read_top_k(c, "top_k_experts", n_experts=n),
        d_ff=c.integer("moe_intermediate_size"),
        extra_parameters=n + c.integer("hidden_size"),
    )

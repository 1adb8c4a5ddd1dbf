"""DeepSeek-V4: compressed attention, experts on every layer, hyper-connections instead of residual
sums.
"""

from dataclasses import replace

from costmodel.architecture import Layer
from costmodel.families.common import Model, read_basics, read_layer_types, read_tied, read_top_k
from costmodel.hf_config import ConfigReader
from costmodel.mixers.base import Linear
from costmodel.mixers.compressed import CompressedAttention
from costmodel.mlps import MoE

SLIDING, SPARSE, HEAVY = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read a DeepSeek-V4 config."""
    basics = read_basics(c)
    d, n_layers = basics.d_model, basics.n_layers
    rates = {SPARSE: 4, HEAVY: 128}
    own = c.section("compress_rates")
    if own is not None:
        rates = {kind: own.integer(kind, default=rates[kind]) for kind in rates}
    types = _layer_types(c, n_layers)
    streams = c.integer("hc_mult")
    mixers = {
        kind: replace(_mixer(c, kind, rates.get(kind, 0)), streams=streams, stream_width=d)
        for kind in set(types)
    }
    n = c.integer("n_routed_experts", "num_local_experts")
    width = c.integer("moe_intermediate_size")
    # The checkpoint's shared expert is one MLP of that width, whatever n_shared_experts says.
    moe = MoE(
        n_experts=n,
        top_k=read_top_k(c, "num_experts_per_tok", n_experts=n),
        d_ff=width,
        shared_d_ff=width,
    )
    if c.integer("n_shared_experts", default=1) != 1:
        raise c.error("n_shared_experts", "1", c.raw("n_shared_experts"))
    read_layer_types(c, n_layers, ("hash_moe", "moe"), "mlp_layer_types")
    c.ignore("num_hash_layers", "expert_dtype", "hc_sinkhorn_iters")
    mixing = (2 + streams) * streams
    hyper = Linear(
        name="hyper_connection",
        n_in=streams * d,
        n_out=mixing,
        role="mixer",
        quantisable=False,
        bias=mixing + 3,
    )
    layers = {
        kind: Layer(mixers=(mixer,), mlps=(moe,), linears=(hyper, hyper), other_parameters=2 * d)
        for kind, mixer in mixers.items()
    }
    stack = [layers[t] for t in types]
    collapse = Linear(
        name="hyper_head",
        n_in=streams * d,
        n_out=streams,
        role="mixer",
        quantisable=False,
        bias=streams + 1,
    )
    stack[-1] = replace(stack[-1], linears=(*stack[-1].linears, collapse))
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=tuple(stack),
        other_parameters=d,
        tied_embeddings=read_tied(c, wrapper, default=False),
        max_context_tokens=basics.max_context_tokens,
    )


def _layer_types(c: ConfigReader, n_layers: int) -> tuple[str, ...]:
    """``layer_types``, or a ratio per layer (the prediction layers after the last one are left
    out).
    """
    types = read_layer_types(c, n_layers, (SLIDING, SPARSE, HEAVY))
    ratios = c.optional_integers("compress_ratios")
    if types is not None:
        return types
    if ratios is None or len(ratios) < n_layers:
        raise c.missing("compress_ratios", f"a compression ratio for each of {n_layers} layers")
    kinds = {0: SLIDING, 4: SPARSE, 128: HEAVY}
    for i, ratio in enumerate(ratios[:n_layers]):
        if ratio not in kinds:
            raise c.error(f"compress_ratios[{i}]", "0, 4 or 128", ratio)
    return tuple(kinds[r] for r in ratios[:n_layers])


def _mixer(c: ConfigReader, kind: str, ratio: int) -> CompressedAttention:
    if c.integer("num_key_value_heads", default=1) != 1:
        raise c.error("num_key_value_heads", "1 (keys and values are shared)", 0)
    if c.flag("attention_bias"):
        raise c.error("attention_bias", "false", True)
    sparse = kind == SPARSE
    head_dim = c.integer("head_dim")
    heads, dim, top_k = (
        c.integer("index_n_heads"),
        c.integer("index_head_dim"),
        c.integer("index_topk"),
    )
    return CompressedAttention(
        n_heads=c.integer("num_attention_heads"),
        head_dim=head_dim,
        rope_dim=c.integer("qk_rope_head_dim", default=max(1, head_dim // 8)),
        q_lora_rank=c.integer("q_lora_rank"),
        o_groups=c.integer("o_groups"),
        o_rank=c.integer("o_lora_rank"),
        window_tokens=c.integer("sliding_window"),
        ratio=ratio,
        index_heads=heads if sparse else 0,
        index_dim=dim if sparse else 0,
        top_k=top_k if sparse else 0,
    )

"""Latent attention with experts: DeepSeek V2, V3, V3.2, Kimi K2, GLM-5; and Kimi-Linear, which
mixes it with Kimi Delta Attention.
"""

from collections.abc import Sequence
from dataclasses import replace

from costmodel.architecture import Layer
from costmodel.families.common import (
    FULL,
    LINEAR,
    Basics,
    Model,
    read_basics,
    read_layer_types,
    read_tied,
)
from costmodel.families.moe import read_deepseek_mlps
from costmodel.hf_config import ConfigReader
from costmodel.mixers.base import AbstractMixer
from costmodel.mixers.delta import DeltaRule
from costmodel.mixers.mla import MLA, SparseIndex
from costmodel.mlps import MLP

#: Families whose layers have a sparse index.
_INDEXED = frozenset({"deepseek_v32", "glm_moe_dsa"})


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read a config with latent attention."""
    basics = read_basics(c)
    n_layers = basics.n_layers
    mixers: Sequence[AbstractMixer]
    if model_type == "kimi_linear":
        mixers = _kimi_linear_mixers(c, basics)
    elif model_type in _INDEXED:
        mixers = _indexed_mixers(c, n_layers)
    else:
        mixers = [read_mla(c)] * n_layers
    mlps = read_deepseek_mlps(c, n_layers)
    layers: dict[tuple[AbstractMixer, MLP], Layer] = {}
    for mixer, mlp in zip(mixers, mlps, strict=True):
        layers.setdefault(
            (mixer, mlp),
            Layer(mixers=(mixer,), mlps=(mlp,), other_parameters=2 * basics.d_model),
        )
    return Model(
        d_model=basics.d_model,
        vocab_size=basics.vocab_size,
        layers=tuple(layers[pair] for pair in zip(mixers, mlps, strict=True)),
        other_parameters=basics.d_model,
        tied_embeddings=read_tied(c, wrapper, default=False),
        max_context_tokens=basics.max_context_tokens,
    )


def read_mla(c: ConfigReader, index: SparseIndex | None = None) -> MLA:
    """The latent-attention keys; ``head_dim`` and ``num_key_value_heads`` mean nothing here."""
    c.ignore("head_dim", "qk_head_dim", "num_key_value_heads")
    return MLA(
        n_heads=c.integer("num_attention_heads"),
        q_lora_rank=c.optional_integer("q_lora_rank"),
        kv_lora_rank=c.integer("kv_lora_rank"),
        qk_nope_head_dim=c.integer("qk_nope_head_dim"),
        qk_rope_head_dim=c.integer("qk_rope_head_dim"),
        v_head_dim=c.integer("v_head_dim"),
        bias=c.flag("attention_bias"),
        index=index,
    )


def _indexed_mixers(c: ConfigReader, n_layers: int) -> list[MLA]:
    """Every layer indexed; some may reuse the selection of the last layer that made one."""
    read_layer_types(c, n_layers, ("indexed_attention", FULL))
    index = SparseIndex(
        n_heads=c.integer("index_n_heads"),
        head_dim=c.integer("index_head_dim"),
        top_k=c.integer("index_topk"),
    )
    own, reuse = read_mla(c, index), read_mla(c, replace(index, owns_keys=False))
    c.ignore("indexer_rope_interleave", "index_share_for_mtp_iteration")
    return [own if chosen else reuse for chosen in _index_schedule(c, n_layers)]


def _index_schedule(c: ConfigReader, n_layers: int) -> list[bool]:
    """Which layers run the indexer: ``indexer_types``, a pattern of F and S, or a frequency."""
    frequency = c.integer("index_topk_freq", default=1)
    offset = c.integer("index_skip_topk_offset", default=2, minimum=0)
    types = read_layer_types(c, n_layers, ("full", "shared"), "indexer_types")
    if types is not None:
        c.ignore("index_topk_pattern")
        return [t == "full" for t in types]
    pattern = c.raw("index_topk_pattern")
    if pattern is not None:
        letters = pattern if isinstance(pattern, str) else c.optional_texts("index_topk_pattern")
        flags = [
            {"F": True, "full": True, "S": False, "shared": False}.get(x) for x in letters or ()
        ]
        if len(flags) != n_layers or None in flags:
            raise c.error("index_topk_pattern", f"{n_layers} entries of F or S", pattern)
        return [bool(f) for f in flags]
    return [max(i - offset + 1, 0) % frequency == 0 for i in range(n_layers)]


def _kimi_linear_mixers(c: ConfigReader, basics: Basics) -> list[AbstractMixer]:
    """KDA and latent attention; the lists in ``linear_attn_config`` count layers from 1."""
    n_layers = basics.n_layers
    own = c.section("linear_attn_config")
    source = own or c
    n_heads = source.integer("num_heads" if own else "linear_num_heads")
    dim = source.integer("head_dim" if own else "linear_head_dim")
    kda = DeltaRule(
        form="kda",
        n_key_heads=n_heads,
        n_value_heads=n_heads,
        key_dim=dim,
        value_dim=dim,
        conv_kernel=source.integer("short_conv_kernel_size" if own else "linear_conv_kernel_dim"),
    )
    c.ignore("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim", "mla_use_nope")
    c.ignore(
        "moe_renormalize", "num_expert_group", "moe_router_activation_func", "use_grouped_topk"
    )
    types = read_layer_types(c, n_layers, (FULL, LINEAR))
    if own is not None:
        full = set(own.optional_integers("full_attn_layers", minimum=1) or ())
        linear = set(own.optional_integers("kda_layers", minimum=1) or ())
        if full | linear != set(range(1, n_layers + 1)) or full & linear:
            raise own.error(
                "full_attn_layers", f"with kda_layers every layer 1..{n_layers} once", sorted(full)
            )
        types = tuple(FULL if i + 1 in full else LINEAR for i in range(n_layers))
    if types is None:
        raise c.missing("linear_attn_config", "which layers are full attention and which KDA")
    mla = read_mla(c)
    return [mla if t == FULL else kda for t in types]

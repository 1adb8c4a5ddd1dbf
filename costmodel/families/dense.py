"""Attention and a dense MLP in every layer: Llama and its kin.

The families differ in biases, norms, windows and whether the MLP is gated; ``TRAITS`` says how. A
bias is a fact of the family, or a key of the config with what its absence means.
"""

from dataclasses import dataclass, replace
from typing import Literal

from costmodel.architecture import Layer
from costmodel.families.common import (
    FULL,
    SLIDING,
    Heads,
    Model,
    read_basics,
    read_heads,
    read_layer_types,
    read_tied,
)
from costmodel.hf_config import ConfigReader
from costmodel.mixers.attention import Attention
from costmodel.mlps import DenseMLP

#: Present, absent, or decided by a key ("a|b": the first that is set) whose absence means the
#: value.
Bias = bool | tuple[str, bool]

_KEYED: Bias = ("attention_bias", False)
_MLP: Bias = ("mlp_bias", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """How one family departs from Llama.

    norms         norms per layer; norm_vectors  vectors of d_model in each (0, 1, or 2 with bias)
    qk_norm       norm of queries and keys: a vector per head size, or over all heads;
                  ``qk_norm_key`` names the key that switches it on
    windows       "all": ``sliding_window`` on every layer; "types": only where ``layer_types``
                  says; "qwen2": with ``use_sliding_window``, from ``max_window_layers`` on;
                  "pattern": full attention every ``sliding_window_pattern``-th layer
    parallel_key  attention and MLP side by side after one norm when this key is true
    mlp_vectors   learnt scalars of the activation
    """

    qkv_bias: Bias = False
    o_bias: Bias = False
    mlp_bias: Bias = False
    head_bias: bool = False
    gated: bool = True
    norms: int = 2
    norm_vectors: int = 1
    qk_norm: Literal["none", "head", "all"] = "none"
    qk_norm_key: str = ""
    windows: Literal["none", "all", "types", "qwen2", "pattern"] = "none"
    pattern: int = 4
    parallel_key: str = ""
    mlp_vectors: int = 0
    tied: bool = False
    kv_heads_required: bool = False
    ignored: tuple[str, ...] = ()


_LLAMA = Traits(qkv_bias=_KEYED, o_bias=_KEYED, mlp_bias=_MLP)
_QWEN2 = Traits(qkv_bias=True, windows="qwen2")
_QWEN3 = Traits(qkv_bias=_KEYED, o_bias=_KEYED, qk_norm="head", windows="qwen2")
_OLMO2 = Traits(qkv_bias=_KEYED, o_bias=_KEYED, qk_norm="all")
_BIASED: Bias = ("use_bias", False)

TRAITS: dict[str, Traits] = {
    "apertus": Traits(
        qkv_bias=_KEYED,
        o_bias=_KEYED,
        gated=False,
        qk_norm="head",
        mlp_vectors=2,
        ignored=("qk_norm", "mlp_bias"),
    ),
    "arcee": replace(_LLAMA, gated=False),
    "cohere": Traits(
        qkv_bias=_KEYED,
        o_bias=_KEYED,
        norms=1,
        qk_norm="all",
        qk_norm_key="use_qk_norm",
        tied=True,
    ),
    "cohere2": Traits(qkv_bias=_KEYED, o_bias=_KEYED, norms=1, windows="pattern", tied=True),
    "cwm": replace(_LLAMA, windows="types"),
    "ernie4_5": Traits(qkv_bias=_BIASED, o_bias=_BIASED, mlp_bias=_BIASED, tied=True),
    "exaone4": Traits(qk_norm="head", windows="pattern"),
    "glm": Traits(qkv_bias=("attention_bias", True)),
    "glm4": Traits(qkv_bias=_KEYED, norms=4),
    "granite": _LLAMA,
    "helium": Traits(qkv_bias=_KEYED, mlp_bias=_MLP),
    "hunyuan_v1_dense": Traits(qkv_bias=_KEYED, o_bias=_KEYED, qk_norm="head"),
    "internlm3": Traits(
        qkv_bias=("qkv_bias|attention_bias", False),
        o_bias=("bias|attention_bias", False),
        mlp_bias=("bias|mlp_bias", False),
    ),
    "llama": _LLAMA,
    "ministral": Traits(windows="types"),
    "ministral3": Traits(windows="all"),
    "mistral": Traits(windows="all", kv_heads_required=True),
    "nemotron": replace(_LLAMA, gated=False, norm_vectors=2),
    "olmo": Traits(qkv_bias=_KEYED, o_bias=_KEYED, norm_vectors=0),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, windows="pattern"),
    "phi": Traits(
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
        gated=False,
        norms=1,
        norm_vectors=2,
    ),
    "phi3": Traits(windows="all"),
    "qwen2": _QWEN2,
    "qwen2_5_vl": _QWEN2,  # older files keep the text keys at the top
    "qwen2_5_vl_text": _QWEN2,
    "qwen2_vl": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "seed_oss": Traits(
        qkv_bias=("attention_bias", True), o_bias=("attention_out_bias", False), mlp_bias=_MLP
    ),
    "smollm3": replace(_LLAMA, windows="types", tied=True),
    "stablelm": Traits(
        qkv_bias=("use_qkv_bias", False), norm_vectors=2, parallel_key="use_parallel_residual"
    ),
    "starcoder2": Traits(
        qkv_bias=("use_bias", True),
        o_bias=("use_bias", True),
        mlp_bias=("use_bias", True),
        gated=False,
        norm_vectors=2,
        windows="all",
        tied=True,
    ),
}


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read one config of a family in ``TRAITS``."""
    traits = TRAITS[model_type]
    basics = read_basics(c)
    d = basics.d_model
    heads = read_heads(c, d, kv_heads_required=traits.kv_heads_required)
    mlp = DenseMLP(
        d_ff=c.integer("intermediate_size"), gated=traits.gated, bias=_bias(c, traits.mlp_bias)
    )
    windows = read_windows(c, basics.n_layers, traits.windows, pattern=traits.pattern)
    parallel = bool(traits.parallel_key) and c.flag(traits.parallel_key)
    norms = (1 if parallel else traits.norms) * traits.norm_vectors
    attention = Attention(
        n_heads=heads.n_heads,
        n_kv_heads=heads.n_kv_heads,
        head_dim=heads.head_dim,
        v_head_dim=heads.head_dim,
        qkv_bias=_bias(c, traits.qkv_bias),
        o_bias=_bias(c, traits.o_bias),
        extra_parameters=_qk_norm(c, traits, heads),
    )
    _refuse_rare_norms(c, model_type)
    c.ignore("no_rope_layers", "no_rope_layer_interval", "clip_qkv", *traits.ignored)
    layers = {
        window: Layer(
            mixers=(replace(attention, window_tokens=window),),
            mlps=(mlp,),
            other_parameters=norms * d + traits.mlp_vectors,
        )
        for window in dict.fromkeys(windows)
    }
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=tuple(layers[w] for w in windows),
        other_parameters=d * traits.norm_vectors,
        tied_embeddings=read_tied(c, wrapper, default=traits.tied),
        head_bias=basics.vocab_size if traits.head_bias else 0,
        max_context_tokens=basics.max_context_tokens,
    )


def _bias(c: ConfigReader, bias: Bias) -> bool:
    return bias if isinstance(bias, bool) else c.flag(*bias[0].split("|"), default=bias[1])


def _qk_norm(c: ConfigReader, traits: Traits, heads: Heads) -> int:
    if traits.qk_norm_key and not c.flag(traits.qk_norm_key):
        return 0
    if traits.qk_norm == "head":
        return 2 * heads.head_dim
    if traits.qk_norm == "all":
        return (heads.n_heads + heads.n_kv_heads) * heads.head_dim
    return 0


def _refuse_rare_norms(c: ConfigReader, model_type: str) -> None:
    """Query and key norms that only a few Phi and StableLM files switch on are not modelled."""
    if model_type in ("phi", "stablelm") and c.flag("qk_layernorm"):
        raise c.error("qk_layernorm", "false", True)


def read_windows(
    c: ConfigReader, n_layers: int, rule: str, *, pattern: int = 4
) -> list[int | None]:
    """Sliding window of every layer, None for full attention."""
    if rule == "none":
        return [None] * n_layers
    if rule == "qwen2" and not c.flag("use_sliding_window"):
        c.ignore("sliding_window", "max_window_layers")
        types = read_layer_types(c, n_layers, (FULL, SLIDING))
        if types and SLIDING in types:
            raise c.error(
                "use_sliding_window", "true, since layer_types names sliding layers", False
            )
        return [None] * n_layers
    window = c.optional_integer("sliding_window")
    types = read_layer_types(c, n_layers, (FULL, SLIDING))
    if rule != "qwen2":
        c.ignore("use_sliding_window", "max_window_layers")
    if types is not None:
        c.ignore("sliding_window_pattern", "max_window_layers", "_sliding_window_pattern")
        if SLIDING in types and window is None:
            raise c.missing("sliding_window", "the window of the sliding layers in layer_types")
        return [window if kind == SLIDING else None for kind in types]
    return _windows_by_rule(c, n_layers, rule, window, pattern)


def _windows_by_rule(
    c: ConfigReader, n_layers: int, rule: str, window: int | None, pattern: int
) -> list[int | None]:
    """Windows of a file without ``layer_types``."""
    if rule == "types":
        return [None] * n_layers
    if rule == "pattern":
        every = _pattern(c, pattern)
        return [window if (i + 1) % every else None for i in range(n_layers)]
    first = c.integer("max_window_layers", default=0, minimum=0) if rule == "qwen2" else 0
    return [window if i >= first else None for i in range(n_layers)]


def _pattern(c: ConfigReader, default: int) -> int:
    """Every how many layers one is global: a number, or EXAONE's letters such as LLLG."""
    value = c.raw("sliding_window_pattern")
    if isinstance(value, str):
        if value.count("G") != 1 or value.strip("L") != "G" or not value.endswith("G"):
            raise c.error("sliding_window_pattern", "letters such as LLLG", value)
        return len(value)
    return c.integer("sliding_window_pattern", default=default)

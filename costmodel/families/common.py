"""What the families share: the result they build and the keys most of them have."""

from dataclasses import dataclass

from costmodel.architecture import Layer
from costmodel.errors import ConfigError
from costmodel.hf_config import MAX_LAYERS, ConfigReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a family decides about an architecture; names as in ``Architecture``."""

    d_model: int
    vocab_size: int
    layers: tuple[Layer, ...]
    shared_layers: tuple[Layer, ...] = ()
    other_parameters: int = 0
    embedding_parameters: int = 0
    tied_embeddings: bool = False
    head_bias: int = 0
    active_adjustment: int = 0
    max_context_tokens: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Basics:
    """The keys that every decoder has."""

    d_model: int
    n_layers: int
    vocab_size: int
    max_context_tokens: int | None


def read_basics(c: ConfigReader) -> Basics:
    """hidden_size, num_hidden_layers, vocab_size and the longest context."""
    return Basics(
        d_model=c.integer("hidden_size", "n_embd", "d_model"),
        n_layers=c.integer("num_hidden_layers", "n_layer", "num_layers", maximum=MAX_LAYERS),
        vocab_size=c.integer("vocab_size"),
        max_context_tokens=c.optional_integer(
            "max_position_embeddings", "n_positions", "model_max_length", "max_sequence_length"
        ),
    )


def read_tied(c: ConfigReader, outer: ConfigReader | None, *, default: bool) -> bool:
    """``tie_word_embeddings``: the text config's own, else the wrapper's, else the family's
    default.
    """
    if c.has("tie_word_embeddings") or outer is None:
        return c.flag("tie_word_embeddings", default=default)
    return outer.flag("tie_word_embeddings", default=default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Query heads, KV heads and their size."""

    n_heads: int
    n_kv_heads: int
    head_dim: int


def read_heads(c: ConfigReader, d_model: int, *, kv_heads_required: bool = False) -> Heads:
    """Attention heads; without ``num_key_value_heads`` as many as query heads, without ``head_dim``
    hidden / heads.
    """
    n_heads = c.integer("num_attention_heads", "n_head")
    n_kv = c.optional_integer("num_key_value_heads")
    if n_kv is None:
        if kv_heads_required:
            raise c.missing(
                "num_key_value_heads", "a whole number (this family has no fixed default)"
            )
        n_kv = n_heads
    if n_heads % n_kv:
        raise c.error("num_key_value_heads", f"a divisor of num_attention_heads ({n_heads})", n_kv)
    head_dim = c.optional_integer("head_dim")
    if head_dim is None:
        if d_model % n_heads:
            raise c.missing(
                "head_dim", f"it, since hidden_size {d_model} / {n_heads} heads is no whole"
            )
        head_dim = d_model // n_heads
    return Heads(n_heads=n_heads, n_kv_heads=n_kv, head_dim=head_dim)


FULL, SLIDING, CHUNKED, LINEAR = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
)


def read_layer_types(
    c: ConfigReader, n_layers: int, allowed: tuple[str, ...], key: str = "layer_types"
) -> tuple[str, ...] | None:
    """The list of layer types, checked for length and vocabulary, or None."""
    types = c.optional_texts(key)
    if types is None:
        return None
    types = modern_types(types)
    if len(types) != n_layers:
        raise ConfigError(
            f"{c.where}: {c.path}{key}: expected {n_layers} entries, one for each layer, "
            f"got {len(types)}"
        )
    for i, kind in enumerate(types):
        if kind not in allowed:
            raise c.error(f"{key}[{i}]", " or ".join(allowed), kind)
    return types


#: Older spellings of layer types that published files still use.
LEGACY_TYPES = {"attention": FULL, "mamba": LINEAR, "mamba2": LINEAR, "linear": LINEAR}


def modern_types(types: tuple[str, ...]) -> tuple[str, ...]:
    """Layer types in today's spelling."""
    return tuple(LEGACY_TYPES.get(t, t) for t in types)


def read_sparse_layers(c: ConfigReader, n_layers: int) -> tuple[bool, ...]:
    """Which layers are mixtures of experts: ``mlp_layer_types``, ``first_k_dense_replace`` with
    ``moe_layer_freq``, or all.
    """
    types = read_layer_types(c, n_layers, ("dense", "sparse"), "mlp_layer_types")
    if types is not None:
        c.ignore("first_k_dense_replace", "moe_layer_freq")
        return tuple(t == "sparse" for t in types)
    first = c.integer("first_k_dense_replace", default=0, minimum=0)
    if isinstance(c.raw("moe_layer_freq"), list):
        flags = c.optional_integers("moe_layer_freq", maximum=1) or ()
        if len(flags) != n_layers:
            raise c.error("moe_layer_freq", f"{n_layers} entries, one for each layer", len(flags))
        return tuple(i >= first and bool(f) for i, f in enumerate(flags))
    every = c.integer("moe_layer_freq", default=1)
    return tuple(i >= first and i % every == 0 for i in range(n_layers))


def read_top_k(c: ConfigReader, *keys: str, n_experts: int) -> int:
    """Experts per token, at most as many as there are."""
    return c.integer(*keys, maximum=n_experts)

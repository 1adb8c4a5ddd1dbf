"""Pure state-space models: Mamba, Falcon-Mamba, Mamba-2; a mixer and a norm per layer, no MLP.

Checkpoints in mamba_ssm's own form have no ``model_type`` but an ``ssm_cfg``; they are read too.
"""

from costmodel.architecture import Layer
from costmodel.families.common import Model, read_basics, read_layer_types, read_tied
from costmodel.hf_config import MAX_LAYERS, ConfigReader
from costmodel.mixers.base import AbstractMixer
from costmodel.mixers.mamba import Mamba
from costmodel.mixers.mamba2 import Mamba2


def build(c: ConfigReader, model_type: str, wrapper: ConfigReader | None = None) -> Model:
    """Read a Mamba config."""
    if model_type == "mamba_ssm":
        return _mamba_ssm(c)
    basics = read_basics(c)
    d = basics.d_model
    mixer: AbstractMixer = _mamba2(c, d) if model_type == "mamba2" else _mamba(c, d, model_type)
    read_layer_types(c, basics.n_layers, ("linear_attention",))
    layer = Layer(mixers=(mixer,), other_parameters=d)
    return Model(
        d_model=d,
        vocab_size=basics.vocab_size,
        layers=(layer,) * basics.n_layers,
        other_parameters=d,
        tied_embeddings=read_tied(c, wrapper, default=model_type == "mamba"),
        max_context_tokens=basics.max_context_tokens,
    )


def _mamba_ssm(c: ConfigReader) -> Model:
    """mamba_ssm's form: defaults of its ``modules``, and a vocabulary padded to a multiple."""
    d = c.integer("d_model")
    n_layers = c.integer("n_layer", maximum=MAX_LAYERS)
    own = c.section("ssm_cfg")
    if own is None:
        raise c.missing("ssm_cfg", "the mixer's settings (an empty object for Mamba-1)")
    for key in ("attn_layer_idx", "attn_cfg", "d_intermediate"):
        if c.raw(key) not in (None, 0, [], {}):
            raise c.error(key, "nothing: only pure Mamba files are read", c.raw(key))
    inner = own.integer("expand", default=2) * d
    kernel = own.integer("d_conv", default=4)
    layer = own.text("layer", default="Mamba1")
    mixer: AbstractMixer
    if layer == "Mamba1":
        mixer = Mamba(
            d_inner=inner,
            d_state=own.integer("d_state", default=16),
            dt_rank=read_rank(own, "dt_rank", d),
            conv_kernel=kernel,
        )
    elif layer == "Mamba2":
        head_dim = own.integer("headdim", default=64)
        if inner % head_dim:
            raise own.error("headdim", f"a divisor of the inner width {inner}", head_dim)
        mixer = Mamba2(
            n_heads=inner // head_dim,
            head_dim=head_dim,
            d_state=own.integer("d_state", default=128),
            n_groups=own.integer("ngroups", default=1),
            conv_kernel=kernel,
            chunk_tokens=own.integer("chunk_size", default=256),
        )
    else:
        raise own.error("layer", "Mamba1 or Mamba2", layer)
    multiple = c.integer("pad_vocab_size_multiple", default=8)
    norm = d if c.flag("rms_norm", default=True) else 2 * d
    return Model(
        d_model=d,
        vocab_size=-(-c.integer("vocab_size") // multiple) * multiple,
        layers=(Layer(mixers=(mixer,), other_parameters=norm),) * n_layers,
        other_parameters=norm,
        tied_embeddings=c.flag("tie_embeddings", default=True),
    )


def read_rank(c: ConfigReader, key: str, d_model: int) -> int:
    """The step-size rank: a number, or "auto" for d / 16 rounded up."""
    if c.raw(key) in (None, "auto"):
        return -(-d_model // 16)
    return c.integer(key)


def _mamba(c: ConfigReader, d: int, model_type: str) -> Mamba:
    expand = c.integer("expand", default=2)
    inner = c.integer("intermediate_size", default=expand * d)
    c.ignore("use_associative_scan", "use_mambapy", "use_falcon_mambapy", "d_inner")
    return Mamba(
        d_inner=inner,
        d_state=c.integer("state_size"),
        dt_rank=read_rank(c, "time_step_rank", d),
        conv_kernel=c.integer("conv_kernel", default=4),
        conv_bias=c.flag("use_conv_bias", default=True),
        bias=c.flag("use_bias"),
    )


def _mamba2(c: ConfigReader, d: int) -> Mamba2:
    expand = c.integer("expand", default=2)
    n_heads, head_dim = c.integer("num_heads"), c.integer("head_dim")
    if n_heads * head_dim != expand * d:
        raise c.error(
            "num_heads", f"num_heads * head_dim = {expand * d} (expand * hidden)", n_heads
        )
    c.ignore("time_step_rank", "norm_before_gate", "rms_norm", "intermediate_size")
    bias = c.flag("use_bias")
    return Mamba2(
        n_heads=n_heads,
        head_dim=head_dim,
        d_state=c.integer("state_size"),
        n_groups=c.integer("n_groups"),
        conv_kernel=c.integer("conv_kernel", default=4),
        chunk_tokens=c.integer("chunk_size", default=256),
        conv_bias=c.flag("use_conv_bias", default=True),
        in_bias=bias,
        out_bias=bias,
    )

"""The numerics of a config, from what it says and what its family fixes; without a config the
family's published defaults serve.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from costmodel.errors import NotApplicableError
from costmodel.families.numerics import unknown_numerics
from measure.numerics import Activation, Multipliers, Numerics, Rope, Routing, Temperature

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
#: What a family fixes whatever its config says; the others are as Llama.
_FAMILIES: Mapping[str, Numerics] = {
    "qwen3": Numerics(norm_eps=1e-6, qk_norm=True),
    "qwen3_moe": Numerics(norm_eps=1e-6, qk_norm=True),
    "gemma": Numerics(norm_eps=1e-6, activation="gelu_tanh"),
    "gemma2": Numerics(norm_eps=1e-6, activation="gelu_tanh", sandwich=True),
    "gemma3_text": Numerics(norm_eps=1e-6, activation="gelu_tanh", sandwich=True, qk_norm=True),
    "recurrent_gemma": Numerics(norm_eps=1e-6, activation="gelu_tanh"),
    "gpt_oss": Numerics(sinks=True, swiglu="clamped"),
    "jamba": Numerics(norm_eps=1e-6, rope=None, routing=Routing(normalise=False)),
    "qwen3_next": Numerics(norm_eps=1e-6, qk_norm=True),
    "qwen3_5_text": Numerics(norm_eps=1e-6, qk_norm=True),
    "qwen3_5_moe_text": Numerics(norm_eps=1e-6, qk_norm=True),
    "glm4_moe": Numerics(routing=Routing(score="sigmoid")),
    "kimi_linear": Numerics(rope=None, routing=Routing(score="sigmoid")),
    "nemotron_h": Numerics(rope=None, activation="relu2", routing=Routing(score="sigmoid")),
    "llama4_text": Numerics(
        qk_norm="unit",
        temperature=Temperature(scale=0.1, floor=8192.0),
        routing=Routing(score="sigmoid", normalise=False, on_input=True),
    ),
    "falcon_h1": Numerics(norm_before_gate=True),
    "minimax": Numerics(residual_normed=True),
    "zamba2": Numerics(activation="gelu", gated_norm_eps=1e-5),
    "rwkv5": Numerics(rope=None, layer_norm=True, first_norm=True),
    "deepseek_v2": Numerics(norm_eps=1e-6, routing=Routing(normalise=False)),
    "deepseek_v3": Numerics(norm_eps=1e-6, routing=Routing(score="sigmoid")),
}
_ALIASES = {
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "kimi_k2": "deepseek_v3",
    "kimi_k25": "deepseek_v3",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
#: Share of a head that turns where the config does not say.
_FRACTIONS = {
    "bamba": 0.5,
    "glm4_moe": 0.5,
    "recurrent_gemma": 0.5,
    "qwen3_next": 0.25,
    "qwen3_5_text": 0.25,
    "qwen3_5_moe_text": 0.25,
}
_GEMMAS = frozenset({"gemma", "gemma2", "gemma3_text", "recurrent_gemma"})
#: Neighbours, not halves, form the pairs of these families' rotary embedding.
_INTERLEAVED = frozenset({"deepseek_v2", "deepseek_v3"})


def numerics_of(
    family: str, config: Mapping[str, Any] | None = None, *, d_model: int | None = None
) -> Numerics:
    """Return the numerics of a config, or of a family's defaults without one."""
    family = _ALIASES.get(family, family)
    known, c = _FAMILIES.get(family, Numerics()), config or {}
    text = c.get("text_config")
    c = text if isinstance(text, Mapping) else c
    left_out = set(unknown_numerics(c, family))  # read as this family because somebody said so
    c = {k: v for k, v in c.items() if k not in left_out}
    width = c.get("hidden_size") or d_model
    rope, local = _ropes(family, c, known.rope)
    if family == "llama4_text":
        known = _llama4(known, c)
        rope, local = None, rope
    if family == "zamba2" and not c.get("use_mem_rope"):
        rope = None
    scalar = c.get("query_pre_attn_scalar", 256 if family in ("gemma2", "gemma3_text") else None)
    if family == "zamba2" and "attention_head_dim" in c:  # scores scaled as of half the head
        scalar = c["attention_head_dim"] / 2
    eps = c.get("rms_norm_eps", c.get("layer_norm_epsilon", known.norm_eps))
    return replace(
        known,
        norm_eps=eps,
        rope=rope,
        local_rope=local,
        activation=_activation(c, known.activation),
        attention_scale=None if scalar is None else float(scalar) ** -0.5,
        attention_softcap=c.get("attn_logit_softcapping", 50.0 if family == "gemma2" else None),
        final_softcap=c.get(
            "final_logit_softcapping",
            c.get("logits_soft_cap", 30.0 if family in ("gemma2", "recurrent_gemma") else None),
        ),
        embedding_scale=_embedding_scale(family, width) * (c.get("embedding_multiplier") or 1.0),
        logit_scale=c.get("lm_head_multiplier") or 1.0,
        multipliers=_multipliers(c),
        attention_residual=_residual(c, "full_attn"),
        recurrent_residual=_residual(c, "linear_attn"),
        mlp_residual=_residual(c, "mlp"),
        norm_before_gate=c.get("mamba_norm_before_gate", known.norm_before_gate),
        step_limits=_step_limits(family, c),
        routing=_routing(c, known.routing),
    )


def _embedding_scale(family: str, width: int | None) -> float:
    """sqrt(D) in Gemma, which RecurrentGemma rounds to bfloat16 whatever the dtype."""
    if family not in _GEMMAS or not width:
        return 1.0
    scale = float(width) ** 0.5
    if family == "recurrent_gemma":
        scale = float(torch.tensor(scale, dtype=torch.bfloat16))
    return scale


def _step_limits(family: str, c: Mapping[str, Any]) -> tuple[float, float]:
    """``time_step_limit``; of Zamba2 and Nemotron-H the least step size they start with."""
    if family in ("zamba2", "nemotron_h"):
        return float(c.get("time_step_min", c.get("mamba_dt_min", 0.001))), math.inf
    low, high = c.get("time_step_limit") or (0.0, math.inf)
    return _number(low), _number(high)


def _number(value: Any) -> float:
    """A number, or how transformers writes one that JSON has no word for."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _residual(c: Mapping[str, Any], block: str) -> tuple[float, float]:
    kept, added = (c.get(f"{block}_{name}_factor", 1.0) for name in ("alpha", "beta"))
    return float(kept), float(added)


def _multipliers(c: Mapping[str, Any]) -> Multipliers:
    gate, down = c.get("mlp_multipliers") or (1.0, 1.0)
    single = {
        name: float(c.get(f"{name}_multiplier") or 1.0)
        for name in ("attention_in", "attention_out", "key", "ssm_in", "ssm_out")
    }
    ssm = tuple(float(x) for x in c.get("ssm_multipliers") or Multipliers().ssm)
    return Multipliers(ssm=ssm, mlp_gate=float(gate), mlp_down=float(down), **single)


def _activation(c: Mapping[str, Any], default: Activation) -> Activation:
    name = c.get("hidden_activation") or c.get("hidden_act") or c.get("mlp_hidden_act")
    if name is None or default == "gelu_tanh":  # Gemma files say "gelu" and mean the tanh form
        return default
    if name not in _ACTIVATIONS:
        raise NotApplicableError(
            f"hidden_act: expected one of {', '.join(_ACTIVATIONS)}, got {name!r}"
        )
    return _ACTIVATIONS[name]


def _routing(c: Mapping[str, Any], known: Routing) -> Routing:
    greedy = c.get("topk_method") == "greedy"
    groups = 1 if greedy else c.get("n_group", c.get("num_expert_group")) or 1
    return replace(
        known,
        normalise=c.get("norm_topk_prob", c.get("moe_renormalize", known.normalise)),
        scale=float(c.get("routed_scaling_factor") or 1.0),
        groups=groups,
        top_groups=(c.get("topk_group") or 1) if groups > 1 else 1,
    )


def _ropes(
    family: str, c: Mapping[str, Any], known: Rope | None
) -> tuple[Rope | None, Rope | None]:
    """Rotary embeddings of full and of windowed layers, from old and new spellings."""
    if known is None:
        return None, None
    base = {"rope_theta": c.get("rope_theta", 10_000.0), **(c.get("rope_scaling") or {})}
    parameters = c.get("rope_parameters") or base
    fraction = float(c.get("partial_rotary_factor") or _FRACTIONS.get(family, 1.0))
    whole: Mapping[str, Any] = parameters
    local: Mapping[str, Any] | None = None
    if "full_attention" in parameters:
        whole, local = parameters["full_attention"], parameters.get("sliding_attention")
    elif family == "gemma3_text":
        local = {"rope_theta": c.get("rope_local_base_freq", 10_000.0)}
    context = c.get("max_position_embeddings") or 8192
    return (
        _rope(family, whole, fraction, context),
        None if local is None else _rope(family, local, fraction, context),
    )


def _llama4(known: Numerics, c: Mapping[str, Any]) -> Numerics:
    """Positions, and unit norms, in the chunked layers; tuned queries in the others."""
    turning, kinds = c.get("no_rope_layers"), c.get("layer_types")
    if turning and kinds and [bool(x) for x in turning] != [x != "full_attention" for x in kinds]:
        raise NotApplicableError(
            "no_rope_layers: expected positions in the chunked layers and in no others, "
            f"got {turning} for {kinds}"
        )
    tuned = Temperature(
        scale=float(c.get("attn_scale", 0.1)), floor=float(c.get("floor_scale", 8192))
    )
    return replace(
        known,
        temperature=tuned if c.get("attn_temperature_tuning", True) else None,
        qk_norm="unit" if c.get("use_qk_norm", True) else False,
    )


def _rope(family: str, p: Mapping[str, Any], fraction: float, context: int) -> Rope:
    kind = p.get("rope_type", p.get("type")) or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise NotApplicableError(
            f"rope_type: the torch engine runs default, linear, llama3 and yarn, got {kind!r}"
        )
    original = p.get("original_max_position_embeddings") or context
    return Rope(
        theta=float(p.get("rope_theta", 10_000.0)),
        fraction=float(p.get("partial_rotary_factor") or fraction),
        interleaved=family in _INTERLEAVED,
        kind=kind,  # type: ignore[arg-type]
        factor=float(p.get("factor") or context / original),
        low_freq_factor=float(p.get("low_freq_factor") or 1.0),
        high_freq_factor=float(p.get("high_freq_factor") or 4.0),
        original_context=int(original),
        beta_fast=float(p.get("beta_fast") or 32.0),
        beta_slow=float(p.get("beta_slow") or 1.0),
        truncate=bool(p.get("truncate", True)),
        attention_factor=p.get("attention_factor"),
        mscale=float(p.get("mscale") or 0.0),
        mscale_all_dim=float(p.get("mscale_all_dim") or 0.0),
    )

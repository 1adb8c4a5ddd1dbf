"""Keys that change the arithmetic, not the shapes, and the families that have them.

A soft cap forbids fused kernels, a multiplier changes what comes out: a config that sets one for a
family without it means another model than the family's. The families of every key are those whose
config classes in transformers 5.23 have it (and their wrappers, and checkpoints older than these).
"""

import re
from collections.abc import Iterator, Mapping

_GEMMAS = ("gemma2", "gemma3", "gemma3_text")
_GRANITES = ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid")
_MINIMAX = ("minimax", "minimax_text_01")
_LLAMA4 = ("llama4", "llama4_text")
_FALCON = ("falcon_h1",)

KNOWN: Mapping[str, tuple[str, ...]] = {
    "attn_logit_softcapping": _GEMMAS,
    "final_logit_softcapping": (*_GEMMAS, "gemma4", "gemma4_text"),
    "logits_soft_cap": ("recurrent_gemma",),
    "query_pre_attn_scalar": _GEMMAS,
    "attention_multiplier": _GRANITES,
    "residual_multiplier": _GRANITES,
    "logits_scaling": _GRANITES,
    "embedding_multiplier": (*_GRANITES, *_FALCON),
    **dict.fromkeys(("attention_in_multiplier", "attention_out_multiplier"), _FALCON),
    **dict.fromkeys(("key_multiplier", "lm_head_multiplier", "mlp_multipliers"), _FALCON),
    **dict.fromkeys(("ssm_in_multiplier", "ssm_out_multiplier", "ssm_multipliers"), _FALCON),
    **{
        f"{block}_{name}_factor": _MINIMAX
        for block in ("full_attn", "linear_attn", "mlp")
        for name in ("alpha", "beta")
    },
    "logit_scale": ("cohere", "cohere2"),
    "clip_qkv": ("olmo", "olmoe"),
    "swiglu_alpha": ("gpt_oss",),
    "swiglu_limit": ("gpt_oss", "deepseek_v4"),
    "attention_value_scale": ("mimo_v2_flash",),
    **dict.fromkeys(("attn_scale", "floor_scale", "attn_temperature_tuning"), _LLAMA4),
    "scale_attn_by_inverse_layer_idx": ("gpt2",),
}
#: What such keys are called, those of families not known yet included.
_NUMERIC = re.compile(
    r"soft_?cap|_multipliers?$|^logits?_scal|_(alpha|beta)_factor$|^query_pre_attn|^clip_qkv"
    r"|^swiglu_|_value_scale$|^attn_(scale|temperature)|^floor_scale$|^scale_(emb|depth|attn_by)"
)
#: Factors that are left out by being one.
_FACTOR = re.compile(r"scal|multiplier|factor")


def unknown_numerics(config: Mapping[str, object], family: str) -> Iterator[str]:
    """Keys of a config that change the arithmetic, are set to something that does, and that its
    family does not have.
    """
    for key, value in config.items():
        if not _NUMERIC.search(key) or family in KNOWN.get(key, ()):
            continue
        inert = value is None or value is False or value in (0, [], {}, "")
        if not inert and not (value == 1 and _FACTOR.search(key)):
            yield key

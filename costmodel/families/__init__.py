"""From a ``config.json`` to an :class:`~costmodel.architecture.Architecture`, by ``model_type``.

One module per kinship of families; only the one needed is imported. A family module has one
function ``build(reader, model_type) -> Model`` that asks the reader for every key that decides
layers, caches and parameters. A key of that sort that it did not ask for is an error, so a new
checkpoint with a new kind of attention is refused and not priced as something it is not.
"""

from costmodel.families.common import Model as Model

#: model_type -> module in this package.
MODULES: dict[str, str] = {
    # attention and a dense MLP
    "apertus": "dense",
    "arcee": "dense",
    "cohere": "dense",
    "cohere2": "dense",
    "cwm": "dense",
    "ernie4_5": "dense",
    "exaone4": "dense",
    "glm": "dense",
    "glm4": "dense",
    "granite": "dense",
    "helium": "dense",
    "hunyuan_v1_dense": "dense",
    "internlm3": "dense",
    "llama": "dense",
    "ministral": "dense",
    "ministral3": "dense",
    "mistral": "dense",
    "nemotron": "dense",
    "olmo": "dense",
    "olmo2": "dense",
    "olmo3": "dense",
    "phi": "dense",
    "phi3": "dense",
    "qwen2": "dense",
    "qwen2_5_vl": "dense",
    "qwen2_5_vl_text": "dense",
    "qwen2_vl": "dense",
    "qwen2_vl_text": "dense",
    "qwen3": "dense",
    "qwen3_vl_text": "dense",
    "seed_oss": "dense",
    "smollm3": "dense",
    "stablelm": "dense",
    "starcoder2": "dense",
    # attention and experts
    "glm4_moe": "moe",
    "gpt_oss": "moe",
    "llama4": "moe",
    "llama4_text": "moe",
    "mimo_v2_flash": "moe",
    "minimax_m2": "moe",
    "mixtral": "moe",
    "qwen2_moe": "moe",
    "qwen3_moe": "moe",
    "dots1": "moe_kin",
    "ernie4_5_moe": "moe_kin",
    "glm4v_moe_text": "moe",
    "granitemoe": "moe_kin",
    "granitemoeshared": "moe_kin",
    "hunyuan_v1_moe": "moe_kin",
    "olmoe": "moe_kin",
    "phimoe": "moe_kin",
    "qwen3_vl_moe_text": "moe",
    "solar_open": "moe_kin",
    # older decoders
    "gpt2": "classic",
    "gpt_neox": "classic",
    "gptj": "classic",
    "opt": "classic",
    # Gemma
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma3_text": "gemma",
    "gemma4": "gemma",
    "gemma4_text": "gemma",
    # latent attention
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "deepseek_v32": "deepseek",
    "glm_moe_dsa": "deepseek",
    "glm4_moe_lite": "deepseek",
    "kimi_k2": "deepseek",
    "kimi_k25": "deepseek",
    "kimi_linear": "deepseek",
    "deepseek_v4": "deepseek_v4",
    # linear attention and state spaces, alone or beside attention
    "qwen3_next": "qwen_hybrid",
    "qwen3_5": "qwen_hybrid",
    "qwen3_5_text": "qwen_hybrid",
    "qwen3_5_moe": "qwen_hybrid",
    "qwen3_5_moe_text": "qwen_hybrid",
    "minimax": "minimax",
    "minimax_text_01": "minimax",
    "mamba": "mamba",
    "falcon_mamba": "mamba",
    "mamba2": "mamba",
    "mamba_ssm": "mamba",  # no model_type; recognised by ssm_cfg
    "recurrent_gemma": "recurrent",
    "rwkv5": "recurrent",
    "jamba": "hybrid",
    "bamba": "hybrid",
    "granitemoehybrid": "hybrid",
    "falcon_h1": "hybrid",
    "nemotron_h": "nemotron_h",
    "zamba2": "zamba2",
}

#: Wrapper model_type -> family of its text model, for files whose text config does not name it.
WRAPPED: dict[str, str] = {
    "llava": "llama",
    "llava_next": "llama",
    "mistral3": "mistral",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "glm4v_moe": "glm4v_moe_text",
}

#: Keys under which wrappers (vision, audio) keep the language model's own config.
TEXT_SECTIONS = ("text_config", "llm_config", "language_config")


def known_families() -> list[str]:
    """All ``model_type`` values that can be read."""
    return sorted(MODULES)

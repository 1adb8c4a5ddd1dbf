"""Random small configs of every family, as keyword arguments of transformers' config classes.

Every value that a family may leave open (biases, windows, shared experts, patterns) is drawn, so
that a key that is misread shows as a wrong count. Sizes are unequal on purpose.
"""

import random
from collections.abc import Callable
from typing import Any

Kwargs = dict[str, Any]
Make = Callable[[random.Random], Kwargs]
FAMILIES: dict[str, Make] = {}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def coin(r: random.Random) -> bool:
    return r.random() < 0.5


def base(r: random.Random, *flags: str, **fixed: Any) -> Kwargs:
    """Heads, widths, layers, vocabulary, and ``flags`` that may be true or false."""
    heads = r.choice((2, 4, 8))
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": r.choice([k for k in (1, 2, 4, 8) if heads % k == 0]),
        "hidden_size": heads * r.choice((8, 16, 24)),
        "intermediate_size": r.choice((48, 80)),
        "num_hidden_layers": r.randint(2, 5),
        "vocab_size": r.choice((64, 97)),
        "tie_word_embeddings": coin(r),
        "max_position_embeddings": 512,
        **TOKENS,
        **{flag: coin(r) for flag in flags},
        **fixed,
    }


def add(*names: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        FAMILIES.update(dict.fromkeys(names, make))
        return make

    return register


def plain(*flags: str, **fixed: Any) -> Make:
    return lambda r: base(r, *flags, **fixed)


def kinds(r: random.Random, n: int, *options: str) -> list[str]:
    return [r.choice(options) for _ in range(n)]


FULL, LINEAR = "full_attention", "linear_attention"
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES |= {
    "apertus": plain("attention_bias"),
    "arcee": plain("attention_bias", "mlp_bias"),
    "cohere": plain("attention_bias", "use_qk_norm"),
    "cohere2": plain("attention_bias", sliding_window=7),
    "cwm": plain(sliding_window=7, head_dim=8),
    "ernie4_5": plain("use_bias"),
    "exaone4": lambda r: base(r, sliding_window=7, sliding_window_pattern=r.choice((2, 4))),
    "gemma": plain("attention_bias", head_dim=16, tie_word_embeddings=True),
    "gemma2": plain("attention_bias", head_dim=16, sliding_window=6),
    "gemma3_text": plain("attention_bias", head_dim=16, sliding_window=6),
    "glm": plain("attention_bias", head_dim=16),
    "glm4": plain("attention_bias", head_dim=16),
    "gpt_neox": plain("attention_bias"),
    "gpt_oss": plain("attention_bias", head_dim=8, sliding_window=6, **EXPERTS),
    "granite": plain("attention_bias", "mlp_bias"),
    "granitemoe": plain("attention_bias", **EXPERTS),
    "hunyuan_v1_dense": plain("attention_bias", head_dim=16),
    "llama": lambda r: base(r, "attention_bias", "mlp_bias", head_dim=r.choice((None, 8, 20))),
    "minimax_m2": plain(head_dim=8, **EXPERTS),
    "ministral": plain(head_dim=8, sliding_window=7),
    "ministral3": lambda r: base(r, head_dim=8, sliding_window=r.choice((None, 7))),
    "mistral": lambda r: base(r, head_dim=r.choice((None, 20)), sliding_window=r.choice((None, 7))),
    "mixtral": lambda r: base(r, sliding_window=r.choice((None, 7)), **EXPERTS),
    "nemotron": plain("attention_bias", "mlp_bias"),
    "olmo": plain("attention_bias"),
    "olmo2": plain("attention_bias"),
    "olmo3": plain("attention_bias", sliding_window=7),
    "olmoe": plain("attention_bias", num_experts=4, num_experts_per_tok=2),
    "phi": plain(),
    "phi3": lambda r: base(r, sliding_window=r.choice((None, 7))),
    "phimoe": plain("attention_bias", "lm_head_bias", **EXPERTS),
    "qwen2": plain("use_sliding_window", sliding_window=9, max_window_layers=1),
    "qwen3": plain("attention_bias", head_dim=20),
    "seed_oss": plain("attention_bias", "attention_out_bias", "mlp_bias", head_dim=16),
    "smollm3": plain("attention_bias", "mlp_bias"),
    "stablelm": plain("use_qkv_bias", "use_parallel_residual"),
    "starcoder2": lambda r: base(r, "use_bias", sliding_window=r.choice((None, 7))),
}


@add("granitemoeshared")
def _granitemoeshared(r: random.Random) -> Kwargs:
    return base(r, "attention_bias", shared_intermediate_size=r.choice((0, 40)), **EXPERTS)


@add("helium")
def _helium(r: random.Random) -> Kwargs:
    out = base(r, "attention_bias", "mlp_bias")
    return {**out, "head_dim": out["hidden_size"] // out["num_attention_heads"]}


@add("internlm3")
def _internlm3(r: random.Random) -> Kwargs:
    bias = coin(r)
    return base(r, bias=bias, qkv_bias=bias)


@add("ernie4_5_moe")
def _ernie(r: random.Random) -> Kwargs:
    return base(
        r,
        "use_bias",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=24,
        moe_num_shared_experts=r.choice((0, 1, 2)),
        moe_layer_start_index=r.choice((0, 1)),
        moe_layer_end_index=-1,
        moe_layer_interval=r.choice((1, 2)),
    )


@add("hunyuan_v1_moe")
def _hunyuan(r: random.Random) -> Kwargs:
    return base(r, "attention_bias", num_experts=4, moe_topk=r.choice((1, 2)), head_dim=8)


def routed(r: random.Random) -> Kwargs:
    return {
        "n_routed_experts": 4,
        "n_shared_experts": r.choice((1, 2)),
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": r.choice((0, 1)),
        "n_group": 1,
        "topk_group": 1,
    }


@add("dots1")
def _dots1(r: random.Random) -> Kwargs:
    return base(r, "attention_bias", head_dim=8, sliding_window=None, **routed(r))


@add("solar_open")
def _solar(r: random.Random) -> Kwargs:
    out = base(r, "attention_bias", head_dim=8, **routed(r))
    return {k: v for k, v in out.items() if k != "first_k_dense_replace"}


@add("glm4_moe")
def _glm4_moe(r: random.Random) -> Kwargs:
    return base(
        r, "attention_bias", "use_qk_norm", head_dim=8, partial_rotary_factor=0.5, **routed(r)
    )


@add("qwen2_moe", "qwen3_moe")
def _qwen_moe(r: random.Random) -> Kwargs:
    return base(
        r,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=r.choice((1, 2)),
        mlp_only_layers=r.choice(([], [1])),
    )


FAMILIES["qwen2_moe"] = lambda r: {
    **_qwen_moe(r),
    "shared_expert_intermediate_size": 40,
    "qkv_bias": coin(r),
}
FAMILIES["qwen3_moe"] = lambda r: {**_qwen_moe(r), "head_dim": 8, "attention_bias": coin(r)}


@add("llama4_text")
def _llama4(r: random.Random) -> Kwargs:
    return base(
        r,
        "attention_bias",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=1,
        attention_chunk_size=8,
        interleave_moe_layer_step=r.choice((1, 2)),
        intermediate_size_mlp=56,
        no_rope_layer_interval=r.choice((2, 4)),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


@add("mimo_v2_flash")
def _mimo(r: random.Random) -> Kwargs:
    return base(
        r,
        "attention_bias",
        head_dim=12,
        v_head_dim=8,
        sliding_window=7,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    ) | {"num_attention_heads": 8, "num_key_value_heads": r.choice((1, 2))}


@add("gemma4_text")
def _gemma4(r: random.Random) -> Kwargs:
    out = base(
        r,
        "attention_k_eq_v",
        "use_double_wide_mlp",
        "enable_moe_block",
        "attention_bias",
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=r.choice((None, 1)),
        sliding_window=6,
        num_hidden_layers=4,
        layer_types=["sliding_attention", FULL] * 2,
        num_kv_shared_layers=r.choice((0, 2)),
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=70,
    )
    if out["enable_moe_block"]:
        out |= {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    return out


def latent(r: random.Random) -> Kwargs:
    out = base(
        r,
        "attention_bias",
        q_lora_rank=r.choice((None, 24)),
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=12,
        **routed(r),
    )
    return {**out, "num_key_value_heads": out["num_attention_heads"]}


FAMILIES["deepseek_v2"] = FAMILIES["deepseek_v3"] = latent
FAMILIES["glm4_moe_lite"] = lambda r: {**latent(r), "q_lora_rank": 24}
FAMILIES["deepseek_v32"] = FAMILIES["glm_moe_dsa"] = lambda r: {
    **latent(r),
    "q_lora_rank": 24,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 5,
}


@add("kimi_linear")
def _kimi_linear(r: random.Random) -> Kwargs:
    out = latent(r)
    n = out["num_hidden_layers"]
    full = sorted(r.sample(range(1, n + 1), r.randint(1, n - 1)))
    drop = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok")
    return {k: v for k, v in out.items() if k not in drop} | {
        "tie_word_embeddings": False,  # transformers does not tie this family
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "linear_attn_config": {
            "full_attn_layers": full,
            "kda_layers": [i for i in range(1, n + 1) if i not in full],
            "head_dim": 8,
            "num_heads": 2,
            "short_conv_kernel_size": 4,
        },
    }


@add("deepseek_v4")
def _deepseek_v4(r: random.Random) -> Kwargs:
    out = base(
        r,
        num_hidden_layers=3,
        head_dim=16,
        q_lora_rank=24,
        num_experts_per_tok=2,
        n_routed_experts=4,
        moe_intermediate_size=24,
        compress_ratios=[r.choice((0, 4, 128)) for _ in range(4)],
        sliding_window=6,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=3,
        hc_mult=2,
        num_hash_layers=r.choice((0, 1)),
        qk_rope_head_dim=4,
    )
    del out["intermediate_size"]
    return {**out, "num_attention_heads": 4, "num_key_value_heads": 1}


@add("qwen3_5_text")
def _qwen3_5(r: random.Random) -> Kwargs:
    out = base(
        r,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=4,
    )
    return {**out, "layer_types": kinds(r, out["num_hidden_layers"], FULL, LINEAR)}


@add("qwen3_next", "qwen3_5_moe_text")
def _qwen3_next(r: random.Random) -> Kwargs:
    return _qwen3_5(r) | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
    }


@add("minimax")
def _minimax(r: random.Random) -> Kwargs:
    out = base(r, head_dim=8, block_size=16, **EXPERTS)
    return {**out, "layer_types": kinds(r, out["num_hidden_layers"], FULL, LINEAR)}


@add("mamba", "falcon_mamba")
def _mamba(r: random.Random) -> Kwargs:
    return {
        "hidden_size": 32,
        "state_size": r.choice((4, 8)),
        "num_hidden_layers": 2,
        "conv_kernel": r.choice((3, 4)),
        "expand": 2,
        "time_step_rank": r.choice(("auto", 5)),
        "use_bias": coin(r),
        "use_conv_bias": coin(r),
        "vocab_size": 64,
        "tie_word_embeddings": coin(r),
        **TOKENS,
    }


@add("mamba2")
def _mamba2(r: random.Random) -> Kwargs:
    heads = r.choice((4, 8))
    return {
        "hidden_size": 32,
        "num_heads": heads,
        "head_dim": 64 // heads,
        "state_size": 8,
        "num_hidden_layers": 2,
        "n_groups": r.choice((1, 2)),
        "chunk_size": 8,
        "use_bias": coin(r),
        "use_conv_bias": coin(r),
        "vocab_size": 64,
        "tie_word_embeddings": coin(r),
        **TOKENS,
    }


@add("recurrent_gemma")
def _recurrent_gemma(r: random.Random) -> Kwargs:
    out = base(
        r,
        "attention_bias",
        num_hidden_layers=5,
        attention_window_size=6,
        conv1d_width=4,
        block_types=r.choice((["recurrent", "recurrent", "attention"], ["recurrent", "attention"])),
        tie_word_embeddings=True,
    )
    return {**out, "lru_width": out["hidden_size"]}


@add("jamba")
def _jamba(r: random.Random) -> Kwargs:
    return base(
        r,
        "mamba_conv_bias",
        "mamba_proj_bias",
        num_hidden_layers=4,
        num_experts=r.choice((1, 4)),
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=r.choice((0, 1)),
        mamba_d_state=4,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=r.choice(("auto", 3)),
    )


def mamba_keys(r: random.Random) -> Kwargs:
    return {
        "mamba_n_heads": 4,
        "mamba_d_head": "auto",
        "mamba_n_groups": r.choice((1, 2)),
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 8,
        "mamba_conv_bias": coin(r),
        "mamba_proj_bias": coin(r),
        "attention_bias": coin(r),
    }


@add("bamba")
def _bamba(r: random.Random) -> Kwargs:
    return base(r, "mlp_bias", attn_layer_indices=r.choice(([0], [1])), **mamba_keys(r))


@add("granitemoehybrid")
def _granite(r: random.Random) -> Kwargs:
    out = base(
        r,
        num_local_experts=r.choice((0, 4)),
        num_experts_per_tok=2,
        shared_intermediate_size=40,
        **mamba_keys(r),
    )
    return {**out, "layer_types": kinds(r, out["num_hidden_layers"], FULL, LINEAR)}


@add("falcon_h1")
def _falcon_h1(r: random.Random) -> Kwargs:
    return base(
        r,
        "mamba_rms_norm",
        "projectors_bias",
        "mlp_bias",
        mamba_d_ssm=r.choice((None, 48)),
        **mamba_keys(r),
    )


@add("nemotron_h")
def _nemotron_h(r: random.Random) -> Kwargs:
    pattern = r.choice(("M-*E", "M*ME", "M-M*-"))
    return base(
        r,
        "use_bias",
        "mlp_bias",
        "use_conv_bias",
        tie_word_embeddings=False,  # transformers does not tie this family
        head_dim=8,
        hybrid_override_pattern=pattern,
        num_hidden_layers=len(pattern),
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=r.choice((1, 2)),
        conv_kernel=4,
        chunk_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=20,
        moe_latent_size=r.choice((None, 16)),
    )


@add("zamba2")
def _zamba2(r: random.Random) -> Kwargs:
    out = base(
        r,
        "use_shared_attention_adapter",
        num_hidden_layers=6,
        layers_block_type=["mamba", "hybrid"] * 3,
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_ngroups=r.choice((1, 2)),
        n_mamba_heads=4,
        chunk_size=8,
        num_mem_blocks=r.choice((1, 2)),
        adapter_rank=4,
        tie_word_embeddings=True,  # transformers shares the blocks only when it ties
    )
    return {**out, "num_key_value_heads": out["num_attention_heads"]}


@add("opt")
def _opt(r: random.Random) -> Kwargs:
    return {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "ffn_dim": 80,
        "num_attention_heads": 4,
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": r.choice((48, 32)),
        "do_layer_norm_before": coin(r),
        "enable_bias": coin(r),
        "layer_norm_elementwise_affine": coin(r),
    }


@add("gpt2", "gptj")
def _gpt(r: random.Random) -> Kwargs:
    return {
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": r.choice((None, 60)),
        "vocab_size": 97,
        "n_positions": 64,
    }


FAMILIES["gptj"] = lambda r: {**_gpt(r), "rotary_dim": 4}

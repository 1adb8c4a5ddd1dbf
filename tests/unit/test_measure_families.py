"""The decoder against transformers' own models with the same random weights, family by family."""

from dataclasses import replace

import pytest
import torch

from costmodel.engines import load_engine
from costmodel.errors import NotApplicableError
from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from costmodel.mlps import MoE
from costmodel.registry import load_architecture
from costmodel.workload import Point
from measure.checkpoints import PROVED, weights_from_state
from measure.config_numerics import numerics_of
from measure.engine import Decoder, pack_weights, random_weights
from measure.flops import count_flops
from measure.mixers import build_cache

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # tiny tensors: a second thread only waits

TOLERANCE = 1e-4  # float32 logits of order one; the orders of summation differ
PROMPT, TOTAL, BATCH = 13, 19, 2
BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}
GEMMA = BASE | {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = BASE | {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
NEMOTRON = BASE | {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 20,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
LLAMA4 = BASE | {
    "num_hidden_layers": 3,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 5,
    "intermediate_size_mlp": 40,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
FALCON = BASE | {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
    "lm_head_multiplier": 0.4,
    "embedding_multiplier": 1.7,
    "mlp_multipliers": [0.8, 0.6],
    "key_multiplier": 0.5,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.9,
    "ssm_multipliers": [0.7, 1.2, 0.9, 1.1, 0.8],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.75,
}
MINIMAX = BASE | {
    "num_hidden_layers": 3,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "block_size": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
ZAMBA = BASE | {
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid"],
    "mamba_d_state": 16,
    "mamba_ngroups": 2,
    "n_mamba_heads": 8,
    "chunk_size": 8,
    "adapter_rank": 4,
}
CASES = {
    "llama-llama3": ("llama", BASE | {"head_dim": 16, "rope_parameters": LLAMA3}),
    "llama-linear": ("llama", BASE | {"rope_parameters": LINEAR, "attention_bias": True}),
    "llama-yarn": ("llama", BASE | {"rope_parameters": YARN, "mlp_bias": True}),
    "mistral": ("mistral", BASE | {"head_dim": 8, "sliding_window": 5}),
    "qwen2": ("qwen2", BASE | {"num_hidden_layers": 3}),
    "qwen2-window": (
        "qwen2",
        BASE | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", BASE | {"head_dim": 16}),
    "gemma": ("gemma", BASE | {"head_dim": 16}),
    "gemma2": ("gemma2", GEMMA | {"query_pre_attn_scalar": 24}),
    "gemma3": (
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 7, "query_pre_attn_scalar": 24},
    ),
    "mixtral": (
        "mixtral",
        BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "gpt_oss": (
        "gpt_oss",
        BASE
        | {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
        },
    ),
    "mamba2": (
        "mamba2",
        {
            "hidden_size": 32,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 16,
            "n_groups": 2,
            "num_hidden_layers": 2,
            "vocab_size": 61,
            "chunk_size": 8,
        },
    ),
    "mamba": (
        "mamba",
        {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "vocab_size": 61},
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        BASE | {"num_hidden_layers": 3, "head_dim": 8, "lru_width": 32, "attention_window_size": 5},
    ),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        LATENT | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        LATENT | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
    ),
    "jamba": (
        "jamba",
        BASE
        | {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        BASE
        | EXPERTS
        | {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "kimi_linear": (
        "kimi_linear",
        {
            **{k: v for k, v in LATENT.items() if k not in ("n_group", "n_routed_experts")},
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "q_lora_rank": None,
            "num_experts": 8,
            "num_experts_per_token": 3,
            "num_shared_experts": 1,
            "num_expert_group": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bamba": (
        "bamba",
        BASE
        | {
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 16,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 8,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        NEMOTRON | {"layers_block_type": ["mamba", "mlp", "attention", "moe"]},
    ),
    "nemotron_h-latent": (
        "nemotron_h",
        NEMOTRON
        | {
            "layers_block_type": ["moe", "mamba", "attention", "moe"],
            "moe_latent_size": 12,
            "mlp_bias": True,
            "use_bias": True,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.5,
        },
    ),
    "llama4": (
        "llama4_text",
        LLAMA4 | {"no_rope_layer_interval": 2, "interleave_moe_layer_step": 2},
    ),
    "llama4-tuned": (
        "llama4_text",
        LLAMA4
        | {
            "no_rope_layers": [1, 0, 1],
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "floor_scale": 4,
            "attn_scale": 0.7,
            "rope_parameters": LLAMA3,
        },
    ),
    "llama4-no-norm": (
        "llama4_text",
        LLAMA4
        | {
            "no_rope_layers": [0, 1, 1],
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
        },
    ),
    "falcon_h1": ("falcon_h1", FALCON),
    "falcon_h1-norm": (
        "falcon_h1",
        FALCON
        | {
            "mamba_rms_norm": True,
            "mlp_bias": True,
            "projectors_bias": True,
            "mamba_proj_bias": True,
            "attention_bias": True,
        },
    ),
    "falcon_h1-norm-behind": (
        "falcon_h1",
        FALCON | {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
    "minimax": ("minimax", MINIMAX),
    "minimax-scaled": (
        "minimax",
        MINIMAX
        | {
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "block_size": 256,
            "full_attn_alpha_factor": 1.3,
            "full_attn_beta_factor": 0.8,
            "linear_attn_alpha_factor": 0.9,
            "linear_attn_beta_factor": 1.4,
            "mlp_alpha_factor": 1.2,
            "mlp_beta_factor": 0.7,
        },
    ),
    "zamba2": ("zamba2", ZAMBA),
    "zamba2-adapted": (
        "zamba2",
        ZAMBA
        | {
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
            "add_bias_linear": True,
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        BASE
        | {
            "head_dim": 8,
            "use_qk_norm": False,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "pad_token_id": 0,
        },
    ),
    "qwen3_moe": ("qwen3_moe", BASE | EXPERTS | {"head_dim": 8}),
    "qwen2_moe": ("qwen2_moe", BASE | EXPERTS | {"shared_expert_intermediate_size": 16}),
}


def reference(family, settings):
    """Transformers' model with random weights, wide enough for attention to be far from uniform."""
    config = transformers.AutoConfig.for_model(
        family, **settings, tie_word_embeddings=family.startswith(("gemma", "recurrent", "zamba2"))
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "A_log" in name:
                tensor.uniform_(-1.0, 1.5)
            elif "correction" in name or "sinks" in name:
                tensor.normal_(0.0, 0.5)
            elif name.endswith(
                ("inv_freq", "normalizer", "embed_scale", "mup_vector", "_decay", "slope_rate")
            ):
                continue
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif "dt" in name and tensor.ndim == 1:
                tensor.uniform_(-3.0, 1.0)
            else:
                tensor.normal_(0.0, 0.2)
    return config, model


def test_every_readable_family_is_proved_and_others_are_refused():
    assert {family for family, _ in CASES.values()} == PROVED
    with pytest.raises(NotApplicableError, match="granite"):
        weights_from_state(replace(load_architecture("llama-3.2-1b"), family="granite"), {})


def built(family, settings, tmp_path):
    """Transformers' model, and the decoder with its weights and empty caches."""
    config, theirs = reference(family, settings)
    path = tmp_path / "config.json"
    config.architectures = None
    path.write_text(config.to_json_string(use_diff=False), "utf-8")
    architecture = load_architecture(str(path))
    numerics = numerics_of(architecture.family, config.to_dict())
    weights = weights_from_state(architecture, theirs.state_dict())
    decoder = Decoder(architecture, weights, n_positions=TOTAL, numerics=numerics)
    caches = [
        build_cache(
            parse_method("full"),
            mixer,
            batch=BATCH,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        for layer in architecture.layers
        for mixer in layer.mixers
    ]
    return theirs, decoder, caches


def point(cached) -> Point:
    return Point(
        batch=float(BATCH),
        prompt_tokens=float(PROMPT),
        cached_tokens=float(cached),
        reserved_tokens=float(cached),
        dtype="fp32",
        kv_dtype="fp32",
        level="ideal",
        engine=load_engine("torch"),
    )


@pytest.mark.parametrize(("family", "settings"), CASES.values(), ids=CASES)
def test_logits_equal_transformers_and_states_the_prediction(family, settings, tmp_path):
    theirs, decoder, caches = built(family, settings, tmp_path)
    mixers = [m for layer in decoder.architecture.layers for m in layer.mixers]
    tokens = torch.randint(61, (BATCH, TOTAL), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(tokens, use_cache=False).logits
    assert expected.std() > 0.1  # so that the tolerance means something
    found = decoder.prefill(tokens[:, :PROMPT], caches)
    torch.testing.assert_close(found, expected[:, PROMPT - 1], atol=TOLERANCE, rtol=TOLERANCE)
    for t in range(PROMPT, TOTAL):
        held = [float(m.state_bytes(point(t))) for m in mixers]
        assert [c.held_bytes for c in caches] == held
        found = decoder.decode(tokens[:, t : t + 1], caches)
        torch.testing.assert_close(found, expected[:, t], atol=TOLERANCE, rtol=TOLERANCE)


#: Their steps run exactly the matmuls that are predicted; of MLA's absorbed form see the bridge.
HYBRIDS = [
    x
    for x in CASES
    if x.startswith(("nemotron_h", "llama4", "falcon", "bamba", "minimax", "zamba2"))
]


@pytest.mark.parametrize("name", HYBRIDS)
def test_counted_flops_of_a_step_equal_the_prediction(name, tmp_path):
    _, decoder, caches = built(*CASES[name], tmp_path)
    # of chunked attention at every place in a chunk
    chunked = any(m.chunk_tokens for x in decoder.architecture.layers for m in x.mixers
                  if isinstance(m, Attention))  # fmt: skip
    for cached in range(PROMPT - 3, PROMPT + 2) if chunked else (PROMPT + 1,):
        with torch.inference_mode():
            check_step(decoder, caches, cached)


def check_step(decoder, caches, cached):
    model, batch = decoder.architecture, BATCH
    for mixer, cache in zip((m for x in model.layers for m in x.mixers), caches, strict=True):
        cache.fill(cached)
        assert cache.held_bytes == float(mixer.state_bytes(point(cached)))
    one = torch.zeros(batch, 1, dtype=torch.long)
    counted = count_flops(lambda: decoder.decode(one, caches))
    operations = (op for x in model.layers for m in x.mixers for op in m.decode(point(cached)))
    mixing = sum(float(op.count * op.counted_flops) for op in operations)
    matrices = sum(x.n_in * x.n_out * n for x, n in model.linear_groups)
    for mlp, n in model.mlp_groups:
        if isinstance(mlp, MoE):
            visited = mlp.expert_linears(model.d_model)
            matrices += n * mlp.top_k * sum(x.n_in * x.n_out for x in visited)
    head = model.d_model * model.vocab_size
    assert counted == mixing + 2.0 * batch * (matrices + head)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("zamba2", ZAMBA | {"time_step_min": 0.9, "rms_norm_eps": 0.3}),
        ("nemotron_h", CASES["nemotron_h"][1] | {"time_step_min": 0.9}),
        ("mamba2", CASES["mamba2"][1] | {"time_step_limit": (0.3, 0.8)}),
    ],
)
def test_step_sizes_of_a_prompt_are_limited_as_in_transformers(family, settings, tmp_path):
    """A single step has no limits there, so only prompts are compared; norms have their own eps."""
    theirs, decoder, caches = built(family, settings, tmp_path)
    tokens = torch.randint(61, (BATCH, TOTAL), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(tokens, use_cache=False).logits[:, -1]
    found = decoder.prefill(tokens, caches)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    loose = replace(decoder.numerics, step_limits=(0.0, float("inf")))
    free = Decoder(decoder.architecture, decoder.weights, n_positions=TOTAL, numerics=loose)
    for cache in caches:
        cache.clear()
    assert not torch.allclose(free.prefill(tokens, caches), expected, atol=TOLERANCE)


def test_shared_blocks_are_held_once(tmp_path):
    _, decoder, _ = built(*CASES["zamba2-adapted"], tmp_path)
    model = decoder.architecture
    assert [x.shared_with for x in model.layers] == [None, 0, 1, None, 0]
    drawn = random_weights(model, torch.float32, torch.device("cpu"))
    assert drawn.nbytes == 4 * model.n_parameters
    for weights in (decoder.weights, drawn, pack_weights(model, drawn, "int8")):
        first, other, again = (weights.layers[i].shared for i in (1, 2, 4))
        assert first["qkv"] is again["qkv"]
        assert first["qkv"] is not other["qkv"]

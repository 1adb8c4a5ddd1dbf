"""From a Hugging Face state dict to the decoder's tensors.

Names are those of transformers' own modules (experts stacked, as ``state_dict`` of transformers 5
has them); stored q, k, v and gate, up are joined, interleaved orders undone, and norms stored as
w - 1 (Gemma, Qwen3-Next) turned into w.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from costmodel.architecture import Architecture, Layer
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.mlps import MLP, DenseMLP
from measure.checkpoint_mixers import MIXERS, Form, Part, attention
from measure.engine import LayerWeights, Weights
from measure.parts import Tensors

_SHIFTED = Form(shift=1.0)
_FORMS: Mapping[str, Form] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), _SHIFTED),
    **dict.fromkeys(("recurrent_gemma", "qwen3_next"), _SHIFTED),
    "gpt_oss": Form(experts_in_out=True),
    "llama4_text": Form(interleaved=True, experts_in_out=True),
}
#: Families whose logits equal transformers' with the same weights; tested one by one.
PROVED = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mixtral"),
        *("qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "mamba", "mamba2"),
        *("recurrent_gemma", "jamba", "bamba", "qwen3_next", "kimi_linear", "glm4_moe"),
        *("nemotron_h", "llama4_text", "falcon_h1", "minimax", "zamba2"),
    }
)
_ROOTS = ("model.", "backbone.", "model.language_model.", "language_model.model.")
#: Layer norms by the decoder's name; the first spelling that a layer has. Where a Gemma layer has
#: ``pre_feedforward_layernorm``, its ``post_attention_layernorm`` is behind the mixer.
_SANDWICH = {
    "mixer": "input_layernorm",
    "mixer_post": "post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm",
    "mlp_post": "post_feedforward_layernorm",
}
_NORMS = {
    "mixer": ("input_layernorm", "temporal_pre_norm", "norm"),
    "mlp": ("post_attention_layernorm", "pre_ff_layernorm", "channel_pre_norm"),
}


def weights_from_state(architecture: Architecture, state: Mapping[str, Tensor]) -> Weights:
    """Return the decoder's weights; tensors that need no joining are shared, not copied."""
    if architecture.family not in PROVED:
        raise NotApplicableError(
            f"{architecture.family}: the torch engine runs this family with random weights only; "
            f"weights are read for {', '.join(sorted(PROVED))}"
        )
    root = next((r for r in _ROOTS if any(k.startswith(f"{r}layers.") for k in state)), None)
    if root is None:
        raise ConfigError("checkpoint: expected layers under model. or backbone., got neither")
    top = Part(state, root)
    form = _FORMS.get(architecture.family, Form())
    name = "embed_tokens.weight" if top.has("embed_tokens.weight") else "embeddings.weight"
    table = top.get(name)
    final = next(
        (n for n in ("norm", "final_norm", "final_layernorm", "norm_f") if top.has(f"{n}.weight")),
        "norm",
    )
    head = table
    if not architecture.tied_embeddings:
        head = Part(state, "").under("lm_head", "language_model.lm_head").get("weight")
    layers = tuple(
        _layer(Part(state, f"{root}layers.{i}."), layer, form)
        for i, layer in enumerate(architecture.layers)
    )
    return Weights(
        embedding=table,
        layers=_with_shared_blocks(state, root, architecture, layers, form),
        outer={"final": top.get(f"{final}.weight") + form.shift},
        head=head,
    )


def _with_shared_blocks(
    state: Mapping[str, Tensor],
    root: str,
    architecture: Architecture,
    layers: tuple[LayerWeights, ...],
    form: Form,
) -> tuple[LayerWeights, ...]:
    """Zamba2: a block is stored in the first layer that uses it, with the adapters of all."""
    blocks: dict[int, tuple[Part, Tensors]] = {}
    found = []
    for index, (layer, weights) in enumerate(zip(architecture.layers, layers, strict=True)):
        if layer.shared_with is None:
            found.append(weights)
            continue
        if layer.shared_with not in blocks:
            part = Part(state, f"{root}layers.{index}.shared_transformer.")
            feed_forward = part.under("feed_forward")
            tensors = {
                **attention(part.under("self_attn"), layer.mixers[0], form),
                **feed_forward.linear("gate_up_proj", "gate_up_proj"),
                **feed_forward.linear("down_proj", "down_proj"),
                "input_norm": part.get("input_layernorm.weight"),
                "mlp_norm": part.get("pre_ff_layernorm.weight"),
            }
            blocks[layer.shared_with] = part, tensors
        part, shared = blocks[layer.shared_with]
        ordinal = sum(x.shared_with is not None for x in architecture.layers[:index])
        places = {"gate_up": "feed_forward.gate_up_proj_adapter_list"}
        places |= {n: f"self_attn.linear_{n}_adapter_list" for n in "qkv"}
        own = {"hybrid_proj": Part(state, f"{root}layers.{index}.").get("linear.weight")}
        for matrix in layer.linears[1:]:
            name, half = matrix.name.removeprefix("adapter_").rsplit("_", 1)
            own[matrix.name] = part.get(f"{places[name]}.{ordinal}.{'ab'.index(half)}.weight")
        found.append(replace(weights, shared=shared, linears=own))
    return tuple(found)


def _layer(part: Part, layer: Layer, form: Form) -> LayerWeights:
    norms = {}
    if layer.shared_with is not None:
        part, layer = part.under("mamba_decoder"), replace(layer, mixers=layer.mixers[1:], mlps=())
    if part.has("pre_feedforward_layernorm.weight"):
        norms = {k: part.get(f"{n}.weight") + form.shift for k, n in _SANDWICH.items()}
    else:
        for target, names in _NORMS.items():
            stored = next((n for n in names if part.has(f"{n}.weight")), None)
            if stored is not None:
                norms[target] = part.get(f"{stored}.weight") + form.shift
    if not layer.mixers:  # Nemotron-H: one norm, of whatever the layer is
        norms = {"mlp": norms["mixer"]}
    mixers = []
    for kind in layer.mixers:
        read, places = MIXERS[type(kind)]
        mixers.append(read(part.under(*places, "mixer"), kind, form))
    mlp: Tensors = {}
    if layer.mlps:
        own = part.under("mlp", "mlp_block", "feed_forward", "mixer")
        mlp = _mlp(own, layer.mlps[0], form)
    return LayerWeights(norms=norms, mixers=tuple(mixers), mlp=mlp)


def _mlp(part: Part, mlp: MLP, form: Form) -> Tensors:
    if isinstance(mlp, DenseMLP):
        names = ("gate_proj", "up_proj") if mlp.gated else ("up_proj",)
        up = "gate_up_proj" if mlp.gated else "up_proj"
        return {**part.linear(up, *names), **part.linear("down_proj", "down_proj")}
    router = "router" if part.has("router.weight") else "gate"
    w = dict(part.linear("router", router))
    name = "gate_up" if mlp.gated else "up"
    up, down = part.get(f"experts.{name}_proj"), part.get("experts.down_proj")
    if form.experts_in_out:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if mlp.expert_bias:  # GPT-OSS: gate and up interleaved
        bias = part.get("experts.gate_up_proj_bias")
        w["experts_gate_up_bias"] = torch.cat((bias[:, ::2], bias[:, 1::2]), dim=1)
        w["experts_down_bias"] = part.get("experts.down_proj_bias")
        up = torch.cat((up[:, ::2], up[:, 1::2]), dim=1)
    w[f"experts_{name}"], w["experts_down"] = up, down
    if part.has("gate.e_score_correction_bias"):
        w["correction"] = part.get("gate.e_score_correction_bias")
    if mlp.latent_dim:
        w |= part.linear("latent_down", "fc1_latent_proj")
        w |= part.linear("latent_up", "fc2_latent_proj")
    if mlp.shared_d_ff:
        shared = part.under("shared_experts", "shared_expert")
        up_names = ("gate_proj", "up_proj") if mlp.shared_gated else ("up_proj",)
        w |= shared.linear(f"shared_{'gate_up' if mlp.shared_gated else 'up'}_proj", *up_names)
        w |= shared.linear("shared_down_proj", "down_proj")
    if mlp.shared_gate:
        w["shared_gate"] = part.get("shared_expert_gate.weight")
    return w

"""From a Hugging Face state dict to the decoder's tensors.

Names are those of transformers' own modules (experts stacked, as ``state_dict`` of transformers 5
has them); stored q, k, v and gate, up are joined, interleaved orders undone, and norms stored as
w - 1 (Gemma, Qwen3-Next) turned into w.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from costmodel.architecture import Architecture, Layer
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.mixers import AbstractMixer, Attention
from costmodel.mixers.delta import DeltaRule
from costmodel.mixers.mamba import Mamba
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.mla import MLA
from costmodel.mixers.rglru import RGLRU
from costmodel.mlps import MLP, DenseMLP
from measure.engine import LayerWeights, Weights
from measure.parts import Tensors

#: Families that store norms as w - 1; gated norms inside mixers are stored plainly.
_SHIFTED = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma", "qwen3_next"})
#: Families whose logits equal transformers' with the same weights; tested one by one.
PROVED = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mixtral"),
        *("qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "mamba", "mamba2"),
        *("recurrent_gemma", "jamba", "bamba", "qwen3_next", "kimi_linear", "glm4_moe"),
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


class _Part:
    """The tensors of a state dict under one prefix."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def has(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.state

    def get(self, name: str) -> Tensor:
        key = f"{self.prefix}{name}"
        if key not in self.state:
            raise ConfigError(f"checkpoint: expected a tensor {key}, got none of that name")
        return self.state[key]

    def under(self, *names: str) -> "_Part":
        """The first of the prefixes that has any tensor."""
        for name in names:
            prefix = f"{self.prefix}{name}."
            if any(key.startswith(prefix) for key in self.state):
                return _Part(self.state, prefix)
        raise ConfigError(
            f"checkpoint: expected tensors under {self.prefix} {' or '.join(names)}, got none"
        )

    def joined(self, *names: str) -> Tensor:
        """Matrices (or vectors) on the same input, stacked."""
        tensors = [self.get(name) for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def linear(self, target: str, *names: str) -> Tensors:
        """Weight and, if stored, bias of joined projections."""
        out = {target: self.joined(*(f"{n}.weight" for n in names))}
        biases = [n for n in names if self.has(f"{n}.bias")]
        if biases:
            vectors = [
                self.get(f"{n}.bias")
                if n in biases
                else self.get(f"{n}.weight").new_zeros(self.get(f"{n}.weight").shape[0])
                for n in names
            ]
            out[f"{target}_bias"] = torch.cat(vectors)
        return out


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
    top = _Part(state, root)
    shift = 1.0 if architecture.family in _SHIFTED else 0.0
    name = "embed_tokens.weight" if top.has("embed_tokens.weight") else "embeddings.weight"
    table = top.get(name)
    final = next(
        (n for n in ("norm", "final_norm", "final_layernorm", "norm_f") if top.has(f"{n}.weight")),
        "norm",
    )
    return Weights(
        embedding=table,
        layers=tuple(
            _layer(_Part(state, f"{root}layers.{i}."), layer, shift)
            for i, layer in enumerate(architecture.layers)
        ),
        outer={"final": top.get(f"{final}.weight") + shift},
        head=table if architecture.tied_embeddings else _Part(state, "").get("lm_head.weight"),
    )


def _layer(part: _Part, layer: Layer, shift: float) -> LayerWeights:
    norms = {}
    if part.has("pre_feedforward_layernorm.weight"):
        norms = {k: part.get(f"{n}.weight") + shift for k, n in _SANDWICH.items()}
    else:
        for target, names in _NORMS.items():
            stored = next((n for n in names if part.has(f"{n}.weight")), None)
            if stored is not None:
                norms[target] = part.get(f"{stored}.weight") + shift
    mixer: Tensors = {}
    if layer.mixers:
        kind = layer.mixers[0]
        own = part.under(
            "self_attn", "linear_attn", "temporal_block", "mixer", "mamba", "attention"
        )
        mixer = _MIXERS[type(kind)](own, kind, shift)
    mlp: Tensors = {}
    if layer.mlps:
        mlp = _mlp(part.under("mlp", "mlp_block", "feed_forward"), layer.mlps[0])
    return LayerWeights(norms=norms, mixer=mixer, mlp=mlp)


def _attention(part: _Part, mixer: AbstractMixer, shift: float) -> Tensors:
    assert isinstance(mixer, Attention)
    w = dict(part.linear("qkv", "q_proj", "k_proj", "v_proj"))
    if mixer.output_gate:  # every head stores its query, then its gate
        for name, tensor in list(w.items()):
            n = 2 * mixer.n_heads * mixer.head_dim
            q, gate = tensor[:n].unflatten(0, (mixer.n_heads, 2, -1)).unbind(1)
            w[name] = torch.cat((q.flatten(0, 1), tensor[n:], gate.flatten(0, 1)))
    w |= part.linear("o", "o_proj")
    for name in ("q_norm", "k_norm"):
        if part.has(f"{name}.weight"):
            w[name] = part.get(f"{name}.weight") + shift
    if part.has("sinks"):
        w["sinks"] = part.get("sinks")
    return w


def _mla(part: _Part, mixer: AbstractMixer, shift: float) -> Tensors:
    assert isinstance(mixer, MLA)
    w: dict[str, Tensor] = {}
    if mixer.q_lora_rank is None:
        w |= part.linear("q_proj", "q_proj")
        w |= part.linear("kv_a_proj", "kv_a_proj_with_mqa")
    else:
        w |= part.linear("qkv_a_proj", "q_a_proj", "kv_a_proj_with_mqa")
        w |= part.linear("q_b_proj", "q_b_proj")
        w["q_norm"] = part.get("q_a_layernorm.weight")
    w |= part.linear("kv_b_proj", "kv_b_proj")
    w |= part.linear("o_proj", "o_proj")
    w["kv_norm"] = part.get("kv_a_layernorm.weight")
    return w


def _state_space(part: _Part, mixer: AbstractMixer, shift: float) -> Tensors:
    """Mamba-1 and Mamba-2."""
    w: dict[str, Tensor] = {}
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        if part.has(f"{name}.weight"):
            w |= part.linear(name, name)
    stored = {
        "conv": "conv1d.weight",
        "conv_bias": "conv1d.bias",
        "dt_bias": "dt_bias",
        "a_log": "A_log",
        "skip": "D",
        "norm": "norm.weight",
        **{f"{n}_norm": f"{n}_layernorm.weight" for n in ("dt", "b", "c")},
    }
    return w | {k: part.get(n) for k, n in stored.items() if part.has(n)}


def _rglru(part: _Part, mixer: AbstractMixer, shift: float) -> Tensors:
    gates = ("input_gate", "recurrent_gate")
    return {
        **part.linear("xy", "linear_x", "linear_y"),
        **part.linear("out", "linear_out"),
        "conv": part.get("conv_1d.weight"),
        "conv_bias": part.get("conv_1d.bias"),
        "gates": torch.stack([part.get(f"rg_lru.{g}_weight") for g in gates]),
        "gates_bias": torch.stack([part.get(f"rg_lru.{g}_bias") for g in gates]),
        "decay": part.get("rg_lru.recurrent_param"),
    }


def _delta(part: _Part, mixer: AbstractMixer, shift: float) -> Tensors:
    """Stored key head by key head: its q, k, then its value heads' v and z; and b and a alike."""
    assert isinstance(mixer, DeltaRule)
    if mixer.form == "kda":
        return _kda(part)
    per_key = mixer.n_value_heads // mixer.n_key_heads
    sizes = (mixer.key_dim,) * 2 + (per_key * mixer.value_dim,) * 2
    by_head = part.get("in_proj_qkvz.weight").unflatten(0, (mixer.n_key_heads, -1))
    ba = part.get("in_proj_ba.weight").unflatten(0, (mixer.n_key_heads, -1))
    return {
        "in_proj_qkvz": torch.cat([x.flatten(0, 1) for x in by_head.split(sizes, dim=1)]),
        "in_proj_ba": torch.cat([x.flatten(0, 1) for x in ba.split(per_key, dim=1)]),
        "out_proj": part.get("out_proj.weight"),
        "conv": part.get("conv1d.weight"),
        "a_log": part.get("A_log"),
        "dt_bias": part.get("dt_bias"),
        "norm": part.get("norm.weight"),
    }


def _kda(part: _Part) -> Tensors:
    return {
        **part.linear("qkv_proj", "q_proj", "k_proj", "v_proj"),
        **part.linear("gates_a_proj", "forget_gate.f_a_proj", "g_a_proj"),
        **part.linear("f_b_proj", "forget_gate.f_b_proj"),
        **part.linear("g_b_proj", "g_b_proj"),
        **part.linear("b_proj", "b_proj"),
        **part.linear("out_proj", "o_proj"),
        "conv": part.get("conv1d.weight"),
        "a_log": part.get("forget_gate.A_log").flatten(),
        "dt_bias": part.get("forget_gate.dt_bias"),
        "norm": part.get("o_norm.weight"),
    }


_MIXERS: Mapping[type[AbstractMixer], Callable[[_Part, AbstractMixer, float], Tensors]] = {
    Attention: _attention,
    MLA: _mla,
    Mamba: _state_space,
    Mamba2: _state_space,
    RGLRU: _rglru,
    DeltaRule: _delta,
}


def _mlp(part: _Part, mlp: MLP) -> Tensors:
    if isinstance(mlp, DenseMLP):
        names = ("gate_proj", "up_proj") if mlp.gated else ("up_proj",)
        up = "gate_up_proj" if mlp.gated else "up_proj"
        return {**part.linear(up, *names), **part.linear("down_proj", "down_proj")}
    router = "router" if part.has("router.weight") else "gate"
    w = dict(part.linear("router", router))
    up, down = part.get("experts.gate_up_proj"), part.get("experts.down_proj")
    if mlp.expert_bias:  # GPT-OSS: [E, in, out], gate and up interleaved
        bias = part.get("experts.gate_up_proj_bias")
        w["experts_gate_up_bias"] = torch.cat((bias[:, ::2], bias[:, 1::2]), dim=1)
        w["experts_down_bias"] = part.get("experts.down_proj_bias")
        up = torch.cat((up[..., ::2], up[..., 1::2]), dim=2).transpose(1, 2)
        down = down.transpose(1, 2)
    w["experts_gate_up"], w["experts_down"] = up, down
    if part.has("gate.e_score_correction_bias"):
        w["correction"] = part.get("gate.e_score_correction_bias")
    if mlp.shared_d_ff:
        shared = part.under("shared_experts", "shared_expert")
        w |= shared.linear("shared_gate_up_proj", "gate_proj", "up_proj")
        w |= shared.linear("shared_down_proj", "down_proj")
    if mlp.shared_gate:
        w["shared_gate"] = part.get("shared_expert_gate.weight")
    return w

"""From a Hugging Face state dict to the decoder's tensors.

Names are those of transformers' own modules (experts stacked, as ``state_dict`` of transformers 5
has them); stored q, k, v and gate, up are joined, interleaved orders undone, and norms stored as
w - 1 (Gemma, Qwen3-Next) turned into w.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from costmodel.architecture import Architecture, Layer
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.mixers import AbstractMixer, Attention
from costmodel.mixers.delta import DeltaRule
from costmodel.mixers.lightning import Lightning
from costmodel.mixers.mamba import Mamba
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.mla import MLA
from costmodel.mixers.rglru import RGLRU
from costmodel.mlps import MLP, DenseMLP
from measure.engine import LayerWeights, Weights
from measure.parts import Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """How a family stores what others store plainly.

    shift        added to norms, which are stored as w - 1 (gated norms inside mixers are not)
    interleaved  neighbours, not halves, form the rotary pairs of queries and keys
    experts_in_out  experts are [E, in, out]
    """

    shift: float = 0.0
    interleaved: bool = False
    experts_in_out: bool = False


_SHIFTED = _Form(shift=1.0)
_FORMS: Mapping[str, _Form] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), _SHIFTED),
    **dict.fromkeys(("recurrent_gemma", "qwen3_next"), _SHIFTED),
    "gpt_oss": _Form(experts_in_out=True),
    "llama4_text": _Form(interleaved=True, experts_in_out=True),
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
    form = _FORMS.get(architecture.family, _Form())
    name = "embed_tokens.weight" if top.has("embed_tokens.weight") else "embeddings.weight"
    table = top.get(name)
    final = next(
        (n for n in ("norm", "final_norm", "final_layernorm", "norm_f") if top.has(f"{n}.weight")),
        "norm",
    )
    head = table
    if not architecture.tied_embeddings:
        head = _Part(state, "").under("lm_head", "language_model.lm_head").get("weight")
    layers = tuple(
        _layer(_Part(state, f"{root}layers.{i}."), layer, form)
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
    form: _Form,
) -> tuple[LayerWeights, ...]:
    """Zamba2: a block is stored in the first layer that uses it, with the adapters of all."""
    blocks: dict[int, tuple[_Part, Tensors]] = {}
    found = []
    for index, (layer, weights) in enumerate(zip(architecture.layers, layers, strict=True)):
        if layer.shared_with is None:
            found.append(weights)
            continue
        if layer.shared_with not in blocks:
            part = _Part(state, f"{root}layers.{index}.shared_transformer.")
            feed_forward = part.under("feed_forward")
            tensors = {
                **_attention(part.under("self_attn"), layer.mixers[0], form),
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
        own = {"hybrid_proj": _Part(state, f"{root}layers.{index}.").get("linear.weight")}
        for matrix in layer.linears[1:]:
            name, half = matrix.name.removeprefix("adapter_").rsplit("_", 1)
            own[matrix.name] = part.get(f"{places[name]}.{ordinal}.{'ab'.index(half)}.weight")
        found.append(replace(weights, shared=shared, linears=own))
    return tuple(found)


def _layer(part: _Part, layer: Layer, form: _Form) -> LayerWeights:
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
        read, places = _MIXERS[type(kind)]
        mixers.append(read(part.under(*places, "mixer"), kind, form))
    mlp: Tensors = {}
    if layer.mlps:
        own = part.under("mlp", "mlp_block", "feed_forward", "mixer")
        mlp = _mlp(own, layer.mlps[0], form)
    return LayerWeights(norms=norms, mixers=tuple(mixers), mlp=mlp)


def _attention(part: _Part, mixer: AbstractMixer, form: _Form) -> Tensors:
    assert isinstance(mixer, Attention)
    w = dict(part.linear("qkv", "q_proj", "k_proj", "v_proj"))
    if mixer.output_gate:  # every head stores its query, then its gate
        for name, tensor in list(w.items()):
            n = 2 * mixer.n_heads * mixer.head_dim
            q, gate = tensor[:n].unflatten(0, (mixer.n_heads, 2, -1)).unbind(1)
            w[name] = torch.cat((q.flatten(0, 1), tensor[n:], gate.flatten(0, 1)))
    if form.interleaved:
        for name, tensor in w.items():
            n = (mixer.n_heads + mixer.n_kv_heads) * mixer.head_dim
            turning = tensor[:n].unflatten(0, (-1, mixer.head_dim // 2, 2)).transpose(1, 2)
            w[name] = torch.cat((turning.flatten(0, 2), tensor[n:]))
    w |= part.linear("o", "o_proj")
    for name in ("q_norm", "k_norm"):
        if part.has(f"{name}.weight"):
            w[name] = part.get(f"{name}.weight") + form.shift
    if part.has("sinks"):
        w["sinks"] = part.get("sinks")
    return w


def _mla(part: _Part, mixer: AbstractMixer, form: _Form) -> Tensors:
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


def _state_space(part: _Part, mixer: AbstractMixer, form: _Form) -> Tensors:
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


def _rglru(part: _Part, mixer: AbstractMixer, form: _Form) -> Tensors:
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


def _lightning(part: _Part, mixer: AbstractMixer, form: _Form) -> Tensors:
    """Stored head by head: its q, k and v."""
    assert isinstance(mixer, Lightning)
    by_head = part.get("qkv_proj.weight").unflatten(0, (mixer.n_heads, 3, -1))
    return {
        "qkv_proj": by_head.transpose(0, 1).flatten(0, 2),
        **part.linear("output_gate", "output_gate"),
        **part.linear("out_proj", "out_proj"),
        "norm": part.get("norm.weight"),
    }


def _delta(part: _Part, mixer: AbstractMixer, form: _Form) -> Tensors:
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


_Read = Callable[[_Part, AbstractMixer, _Form], Tensors]
#: What reads a mixer, and the names it may have in its layer.
_MIXERS: Mapping[type[AbstractMixer], tuple[_Read, tuple[str, ...]]] = {
    Attention: (_attention, ("self_attn", "temporal_block", "attention")),
    MLA: (_mla, ("self_attn",)),
    Mamba: (_state_space, ("mamba",)),
    Mamba2: (_state_space, ("mamba",)),
    RGLRU: (_rglru, ("temporal_block",)),
    Lightning: (_lightning, ("self_attn",)),
    DeltaRule: (_delta, ("linear_attn", "self_attn")),
}


def _mlp(part: _Part, mlp: MLP, form: _Form) -> Tensors:
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

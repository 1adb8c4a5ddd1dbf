"""From the tensors of one stored mixer to those that its runner takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from costmodel.errors import ConfigError
from costmodel.mixers import AbstractMixer, Attention
from costmodel.mixers.delta import DeltaRule
from costmodel.mixers.lightning import Lightning
from costmodel.mixers.mamba import Mamba
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.mla import MLA
from costmodel.mixers.rglru import RGLRU
from measure.parts import Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a family stores what others store plainly.

    shift        added to norms, which are stored as w - 1 (gated norms inside mixers are not)
    interleaved  neighbours, not halves, form the rotary pairs of queries and keys
    experts_in_out  experts are [E, in, out]
    """

    shift: float = 0.0
    interleaved: bool = False
    experts_in_out: bool = False


class Part:
    """The tensors of a state dict under one prefix."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def has(self, name: str) -> bool:
        """Whether the tensor is stored."""
        return f"{self.prefix}{name}" in self.state

    def get(self, name: str) -> Tensor:
        """One tensor."""
        key = f"{self.prefix}{name}"
        if key not in self.state:
            raise ConfigError(f"checkpoint: expected a tensor {key}, got none of that name")
        return self.state[key]

    def under(self, *names: str) -> "Part":
        """The first of the prefixes that has any tensor."""
        for name in names:
            prefix = f"{self.prefix}{name}."
            if any(key.startswith(prefix) for key in self.state):
                return Part(self.state, prefix)
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


def attention(part: Part, mixer: AbstractMixer, form: Form) -> Tensors:
    """q, k, v and gate stacked, rotary pairs as halves; inner norms and sinks."""
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


def _mla(part: Part, mixer: AbstractMixer, form: Form) -> Tensors:
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


def _state_space(part: Part, mixer: AbstractMixer, form: Form) -> Tensors:
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


def _rglru(part: Part, mixer: AbstractMixer, form: Form) -> Tensors:
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


def _lightning(part: Part, mixer: AbstractMixer, form: Form) -> Tensors:
    """Stored head by head: its q, k and v."""
    assert isinstance(mixer, Lightning)
    by_head = part.get("qkv_proj.weight").unflatten(0, (mixer.n_heads, 3, -1))
    return {
        "qkv_proj": by_head.transpose(0, 1).flatten(0, 2),
        **part.linear("output_gate", "output_gate"),
        **part.linear("out_proj", "out_proj"),
        "norm": part.get("norm.weight"),
    }


def _delta(part: Part, mixer: AbstractMixer, form: Form) -> Tensors:
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


def _kda(part: Part) -> Tensors:
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


_Read = Callable[[Part, AbstractMixer, Form], Tensors]
#: What reads a mixer, and the names it may have in its layer.
MIXERS: Mapping[type[AbstractMixer], tuple[_Read, tuple[str, ...]]] = {
    Attention: (attention, ("self_attn", "temporal_block", "attention")),
    MLA: (_mla, ("self_attn",)),
    Mamba: (_state_space, ("mamba",)),
    Mamba2: (_state_space, ("mamba",)),
    RGLRU: (_rglru, ("temporal_block",)),
    Lightning: (_lightning, ("self_attn",)),
    DeltaRule: (_delta, ("linear_attn", "self_attn")),
}

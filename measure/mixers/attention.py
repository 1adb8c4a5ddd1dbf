"""Softmax attention: the projections around a method's cache.

The cache attends (``measure.methods``); the plain one knows windows, chunks, sinks and soft caps.
"""

import torch
from torch import Tensor

from costmodel.errors import NotApplicableError
from costmodel.mixers import Attention
from measure.methods.base import AbstractLayerCache
from measure.methods.full import FullCache
from measure.mixers.base import AbstractRunner, Shape, Shapes
from measure.numerics import Numerics
from measure.parts import Rotary, Tensors, rms, rotate, scaled
from measure.weight_formats import linear


class AttentionRunner(AbstractRunner):
    """q, k, v and gate in one matmul, stacked in this order; then o."""

    #: what is read beside the stream; nothing
    READS = ""

    def __init__(self, mixer: Attention, numerics: Numerics) -> None:
        wide = mixer.input_dim and not self.READS
        if not mixer.owns_cache or mixer.k_eq_v or wide or mixer.o_dim:
            raise NotApplicableError("has attention that shares caches or projections")
        self.mixer, self.numerics = mixer, numerics
        local = mixer.max_kv_tokens() is not None and numerics.local_rope is not None
        rope = numerics.local_rope if local else numerics.rope
        self.rope = None if rope is None else (rope, mixer.head_dim)
        unit = numerics.qk_norm == "unit"
        self._unit_norm = unit and rope is not None
        self._learned_norm = bool(numerics.qk_norm) and not unit
        self._temperature = numerics.temperature if rope is None else None
        per_head = 2 * mixer.head_dim if self._learned_norm else 0
        sinks = mixer.n_heads if numerics.sinks else 0
        if per_head + sinks != mixer.extra_parameters:
            raise NotApplicableError("has attention with inner norms this engine does not know")
        scale = numerics.attention_scale
        # the caches scale by 1 / sqrt(H): what differs is folded into the queries
        self._query_factor = None if scale is None else scale * mixer.head_dim**0.5

    def shapes(self, d_model: int) -> Shapes:
        """Projections, biases, inner norms, sinks."""
        mixer = self.mixer
        qkv, o = mixer.linears(d_model)
        shapes: Shapes = {
            "qkv": Shape.of(qkv),
            "o": Shape.of(o),
        }
        for name, matrix in (("qkv", qkv), ("o", o)):
            if matrix.bias:
                shapes[f"{name}_bias"] = Shape((matrix.n_out,), "zeros")
        if self._learned_norm:
            shapes |= {x: Shape((mixer.head_dim,), "ones") for x in ("q_norm", "k_norm")}
        if self.numerics.sinks:
            shapes["sinks"] = Shape((mixer.n_heads,), "zeros")
        return shapes

    def project(self, x: Tensor, w: Tensors) -> Tensor:
        """q, k, v and gate."""
        return linear(x, w["qkv"], w.get("qkv_bias"))

    def run(
        self, x: Tensor, w: Tensors, cache: AbstractLayerCache, table: Rotary | None, first: bool
    ) -> Tensor:
        """Project, turn, attend in the cache, project."""
        m, numerics = self.mixer, self.numerics
        factors = numerics.multipliers
        projected = self.project(scaled(x, factors.attention_in), w)
        gate = None
        if m.output_gate:
            n_gate = m.n_heads * m.head_dim
            projected, gate = projected[..., :-n_gate], projected[..., -n_gate:]
        b, s, _ = projected.shape
        n_qk = (m.n_heads + m.n_kv_heads) * m.head_dim
        heads = projected[..., :n_qk].view(b, s, -1, m.head_dim).transpose(1, 2)
        q, k = heads.split((m.n_heads, m.n_kv_heads), dim=1)
        k = scaled(k, factors.key)
        v = projected[..., n_qk:].view(b, s, m.n_kv_heads, m.v_head_dim).transpose(1, 2)
        if self._learned_norm:
            q = rms(q, w["q_norm"], numerics.norm_eps)
            k = rms(k, w["k_norm"], numerics.norm_eps)
        elif self._unit_norm:  # turning keeps the length of a head: before it is as good as after
            q, k = (rms(x, None, numerics.norm_eps) for x in (q, k))
        if self._temperature is not None:
            start = q.new_zeros(1, dtype=torch.int64) if first else cache.now()
            q = (q * self._temperature.factors(start, s)).to(x.dtype)
        if cache.ROTATES:
            cache.rope = None if self.rope is None else self.rope[0]
        elif table is not None:
            q, k = rotate(q, table), rotate(k, table)
        if self._query_factor is not None:
            q = q * self._query_factor
        if numerics.attention_softcap is not None or numerics.sinks:
            if not isinstance(cache, FullCache) or cache.prompt_attention is not None:
                raise NotApplicableError(
                    f"{cache.NAME}: soft caps and sinks are run with the plain cache only"
                )
            cache.softcap, cache.sinks = numerics.attention_softcap, w.get("sinks")
        out = cache.prefill(q, k, v) if first else cache.decode(q, k, v)
        del projected, heads, q, k, v  # the projection behind needs room of its own
        out = out.transpose(1, 2).flatten(2)
        if gate is not None:
            out = out * gate.sigmoid()
        return scaled(linear(out, w["o"], w.get("o_bias")), factors.attention_out)

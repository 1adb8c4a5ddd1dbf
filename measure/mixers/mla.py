"""Multi-head latent attention: expanded over a prompt, absorbed in a step.

Held per token: the normed latent [r] and the turned rotary key [p]. A step moves the keys'
up-projection to the queries and the values' to the output, and attends the latents themselves.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from costmodel.errors import NotApplicableError
from costmodel.mixers.mla import MLA
from measure.methods.buffers import GrowingBuffer
from measure.methods.fixed_steps import NO_ROOM, has_room
from measure.mixers.base import AbstractRunner, Shape, Shapes
from measure.numerics import Numerics
from measure.parts import Rotary, Tensors, rms, rotate
from measure.step_clock import StepClock
from measure.weight_formats import dense, linear


class LatentCache:
    """Latent and rotary key of every token, one vector [r + p]."""

    def __init__(
        self,
        mixer: MLA,
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        reserve_tokens: int = 0,
    ) -> None:
        self.latents = GrowingBuffer(batch, 1, (mixer.latent_elements,), dtype, device)
        self._entry = (batch, 1, mixer.latent_elements)
        self._options = {"dtype": dtype, "device": device}
        self.clock: StepClock | None = None
        self.fixed_shapes = False
        if reserve_tokens:
            self.latents.reserve(reserve_tokens)

    def keep_time(self, clock: StepClock) -> None:
        """Read the place of a new latent from ``clock`` where shapes are held."""
        self.clock = clock

    def hold_shapes(self) -> str:
        """A step attends the whole room from here on."""
        self.fixed_shapes = self.clock is not None and has_room(self.latents)
        self.latents.zero_room()
        return "" if self.fixed_shapes else NO_ROOM

    def release_shapes(self) -> None:
        """A step attends what is held."""
        self.fixed_shapes = False

    def reset_steps(self) -> None:
        """The clock is the model's."""

    def add(self, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keep one token's latent; (what a step attends [B, 1, n, r + p], entries [n] it must not
        see, where shapes are held).
        """
        if not self.fixed_shapes:
            self.latents.append(latent)
            return self.latents.entries(), None
        assert self.clock is not None
        now = self.clock.position
        self.latents.put(now, latent)
        self.latents.length += 1
        held = self.latents.whole
        return held, torch.arange(held.shape[2], device=held.device) > now

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield self.latents

    @property
    def n_tokens(self) -> int:
        """Tokens held."""
        return self.latents.length

    @property
    def storage_bytes(self) -> int:
        """Bytes of the storage, room included."""
        return self.latents.storage_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes of what is in use."""
        return self.latents.held_bytes

    def clear(self) -> None:
        """Empty it; the room stays."""
        self.latents.clear()

    def fill(self, n_tokens: int, seed: int = 0) -> None:
        """Random latents."""
        self.clear()
        b, one, size = self._entry
        data = torch.empty(b, one, n_tokens, size, **self._options)
        generator = torch.Generator(device=data.device).manual_seed(seed)
        self.latents.append(data.normal_(generator=generator))

    def snapshot(self) -> int:
        """Tokens held."""
        return self.latents.length

    def restore(self, snapshot: int) -> None:
        """Forget the tokens after it."""
        self.latents.length = snapshot


class MLARunner(AbstractRunner):
    """Latent attention without a sparse index."""

    def __init__(self, mixer: MLA, numerics: Numerics) -> None:
        if mixer.index is not None:
            raise NotApplicableError("has a sparse index")
        self.mixer, self.eps = mixer, numerics.norm_eps
        self.rope = None
        factor = 1.0
        if numerics.rope is not None:
            self.rope = (numerics.rope, mixer.qk_rope_head_dim)
            factor = numerics.rope.score_factor
        self.interleaved = numerics.rope is not None and numerics.rope.interleaved
        self.scale = mixer.qk_head_dim**-0.5 * factor

    def shapes(self, d_model: int) -> Shapes:
        """Projections as ``linears`` names them, and two norms."""
        shapes: Shapes = {}
        for matrix in self.mixer.linears(d_model):
            shapes[matrix.name] = Shape.of(matrix)
            if matrix.bias:
                shapes[f"{matrix.name}_bias"] = Shape((matrix.n_out,), "zeros")
        if self.mixer.q_lora_rank:
            shapes["q_norm"] = Shape((self.mixer.q_lora_rank,), "ones")
        shapes["kv_norm"] = Shape((self.mixer.kv_lora_rank,), "ones")
        return shapes

    def run(
        self, x: Tensor, w: Tensors, cache: LatentCache, table: Rotary | None, first: bool
    ) -> Tensor:
        """Compress, keep, attend, project."""
        m = self.mixer
        rank = m.q_lora_rank
        if rank is None:
            q = linear(x, w["q_proj"])
            kv = linear(x, w["kv_a_proj"], w.get("kv_a_proj_bias"))
        else:
            compressed = linear(x, w["qkv_a_proj"], w.get("qkv_a_proj_bias"))
            q = linear(rms(compressed[..., :rank], w["q_norm"], self.eps), w["q_b_proj"])
            kv = compressed[..., rank:]
        q = q.unflatten(-1, (m.n_heads, m.qk_head_dim)).transpose(1, 2)
        q, q_turned = q.split((m.qk_nope_head_dim, m.qk_rope_head_dim), dim=-1)
        latent, turned = kv.unsqueeze(1).split((m.kv_lora_rank, m.qk_rope_head_dim), dim=-1)
        latent = rms(latent, w["kv_norm"], self.eps)
        if table is not None:
            q_turned = rotate(q_turned, table, interleaved=self.interleaved)
            turned = rotate(turned, table, interleaved=self.interleaved)
        kept = torch.cat((latent, turned), dim=-1)
        if first:
            cache.latents.append(kept)
            out = self._expanded(q, q_turned, latent, turned, w)
        else:
            out = self._absorbed(q, q_turned, *cache.add(kept), w)
        return linear(out.transpose(1, 2).flatten(2), w["o_proj"], w.get("o_proj_bias"))

    def _expanded(
        self, q: Tensor, q_turned: Tensor, latent: Tensor, turned: Tensor, w: Tensors
    ) -> Tensor:
        m = self.mixer
        up = linear(latent.squeeze(1), w["kv_b_proj"]).unflatten(-1, (m.n_heads, -1))
        k, v = up.transpose(1, 2).split((m.qk_nope_head_dim, m.v_head_dim), dim=-1)
        return scaled_dot_product_attention(
            torch.cat((q, q_turned), dim=-1),
            torch.cat((k, turned.expand(-1, m.n_heads, -1, -1)), dim=-1),
            v,
            is_causal=True,
            scale=self.scale,
        )

    def _absorbed(
        self, q: Tensor, q_turned: Tensor, held: Tensor, unseen: Tensor | None, w: Tensors
    ) -> Tensor:
        m = self.mixer
        up = dense(w["kv_b_proj"], q.dtype).view(
            m.n_heads, m.qk_nope_head_dim + m.v_head_dim, m.kv_lora_rank
        )
        k_up, v_up = up.split((m.qk_nope_head_dim, m.v_head_dim), dim=1)
        queries = torch.cat((torch.matmul(q, k_up), q_turned), dim=-1)  # [B, N, 1, r + p]
        keys = held.squeeze(1)  # [B, T, r + p]: one KV head, the heads are its queries
        scores = torch.matmul(queries.squeeze(2) * self.scale, keys.transpose(1, 2))
        if unseen is not None:
            scores = scores.masked_fill(unseen, -torch.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        mixed = torch.matmul(weights, keys[..., : m.kv_lora_rank]).unsqueeze(2)
        return torch.matmul(mixed, v_up.transpose(1, 2))

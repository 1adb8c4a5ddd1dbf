"""Multi-head latent attention (DeepSeek-V2), optionally with a sparse index (DSA, DeepSeek-V3.2).

State   B T (r + p) b bytes: the latent of rank r and the shared rotary key of p elements, one
        vector per token, no factor 2. ``fp8`` latents keep the rotary part in 16 bits and one fp32
        scale per 128 elements: 656 bytes for r = 512, p = 64. A sparse index adds its key of 128
        elements, 16-bit, or with fp8 one byte each and one fp32 scale: 132 bytes
Prefill expanded to plain attention: 2 (n + p + v) N FLOPs per pair, n and v the head sizes without
        rotary part and of the values. With an index and more than k tokens a query attends to at
        most k; sparse kernels then run in latent space (executed 2 (2 r + p) N per pair)
Decode  absorbed: the latents are read once for all heads, 2 (2 r + p) N FLOPs per cached token;
        applying the up-projections to query and output costs what ``kv_b_proj`` costs, where it is
        counted
Index   2 h d FLOPs per pair of query and earlier token (h index heads of size d), top-k over the
        scores

Sources: arXiv 2405.04434 (MLA), DeepSeek-V3.2-Exp report (DSA), deepseek-ai/FlashMLA README
(656-byte fp8 format); transformers 5.23 ``models/deepseek_v32``. Ignored: softmax, rotary
embedding.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from costmodel.errors import NotApplicableError
from costmodel.mixers.attention import attended_tokens, masks_its_room
from costmodel.mixers.base import AbstractMixer, Linear
from costmodel.mixers.recurrent import runs_in_torch
from costmodel.mixers.sparse_index import fp8_bytes, index_operations
from costmodel.operation import Array, Operation, Operations, causal_pairs
from costmodel.workload import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseIndex:
    """Lightning indexer: which ``top_k`` tokens a query attends to.

    owns_keys  False for layers that reuse the selection of an earlier layer: no weights, no index
               keys
    """

    n_heads: int
    head_dim: int
    top_k: int
    owns_keys: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MLA(AbstractMixer):
    """One latent-attention layer.

    q_lora_rank   rank of the query projection; None: one full matrix
    index         sparse index, None for dense attention
    """

    KIND: ClassVar[str] = "mla"
    HAS_KV: ClassVar[bool] = True

    n_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: bool = False
    index: SparseIndex | None = None

    @property
    def qk_head_dim(self) -> int:
        """Size of a query or expanded key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_elements(self) -> int:
        """Cached elements per token, the index left out."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def linears(self, d_model: int) -> tuple[Linear, ...]:
        """Down-projections as one matmul, up-projections, output, and those of the index."""
        heads, r = self.n_heads, self.kv_lora_rank
        q_out, kv_a = heads * self.qk_head_dim, self.latent_elements
        up = heads * (self.qk_nope_head_dim + self.v_head_dim)
        out: list[Linear]
        if self.q_lora_rank is None:
            out = [
                Linear(name="q_proj", n_in=d_model, n_out=q_out, role="attention"),
                _linear("kv_a_proj", d_model, kv_a, bias=self.bias),
            ]
        else:
            out = [
                _linear("qkv_a_proj", d_model, self.q_lora_rank + kv_a, bias=self.bias),
                _linear("q_b_proj", self.q_lora_rank, q_out),
            ]
        out += [
            _linear("kv_b_proj", r, up),
            _linear("o_proj", heads * self.v_head_dim, d_model, bias=self.bias),
        ]
        if self.index is not None and self.index.owns_keys:
            i = self.index
            out += [
                _linear("index_q_proj", self.q_lora_rank or d_model, i.n_heads * i.head_dim),
                _linear("index_k_proj", d_model, i.head_dim),
                Linear(
                    name="index_weights_proj",
                    n_in=d_model,
                    n_out=i.n_heads,
                    role="attention",
                    quantisable=False,
                ),
            ]
        return tuple(out)

    def other_parameters(self, d_model: int) -> int:
        """Norms of the compressed query and latent; weight and bias of the index key's
        LayerNorm.
        """
        index = 2 * self.index.head_dim if self.index and self.index.owns_keys else 0
        return (self.q_lora_rank or 0) + self.kv_lora_rank + index

    def sharded(self, tp: int) -> "MLA":
        """Heads divide; down-projections, latent cache and index are on every GPU."""
        if self.n_heads % tp:
            raise NotApplicableError(f"{self.n_heads} attention heads do not divide by tp={tp}")
        return replace(self, n_heads=self.n_heads // tp)

    def kv_elements_per_token(self) -> int:
        """Latent, rotary key and index key of one token."""
        index = self.index.head_dim if self.index and self.index.owns_keys else 0
        return self.latent_elements + index

    def latent_bytes(self, point: Point) -> float:
        """Bytes of one token's latent and rotary key."""
        if point.kv_dtype == "fp8":
            return fp8_bytes(self.kv_lora_rank) + 2.0 * self.qk_rope_head_dim
        return self.latent_elements * point.kv_element_bytes

    def index_bytes(self, point: Point) -> float:
        """Bytes of one token's index key."""
        if self.index is None or not self.index.owns_keys:
            return 0.0
        if point.kv_dtype == "fp8":
            return fp8_bytes(self.index.head_dim)
        return self.index.head_dim * point.kv_element_bytes

    def state_bytes(self, point: Point) -> Array:
        """``B T (latent + index)`` bytes."""
        per_token = self.latent_bytes(point) + self.index_bytes(point)
        return point.batch * point.cached_tokens * per_token

    def attended(self, tokens: Array) -> Array:
        """Tokens a query sees of ``tokens``: all, or the index's top-k."""
        return tokens if self.index is None else np.minimum(tokens, float(self.index.top_k))

    def prefill(self, point: Point) -> Operations:
        """Attention over the prompt in expanded form, after the index has chosen."""
        s, b = point.prompt_tokens, point.element_bytes
        pairs = causal_pairs(s, None if self.index is None else self.index.top_k)
        expanded = 2.0 * (self.qk_head_dim + self.v_head_dim) * self.n_heads
        absorbed = 2.0 * (2 * self.kv_lora_rank + self.qk_rope_head_dim) * self.n_heads
        if point.level == "reference":  # eager and SDPA mask the full square
            executed = s * s * expanded
        elif self.index is None:
            executed = pairs * expanded
        else:
            executed = pairs * np.where(np.asarray(s) > self.index.top_k, absorbed, expanded)
        qkvo = point.batch * s * (2.0 * self.n_heads * (self.qk_head_dim + self.v_head_dim) * b)
        attention = Operation(
            name="mla_attention",
            kind="mla_prefill_attention",
            flops=point.batch * pairs * expanded,
            executed_flops=point.batch * executed,
            state_bytes=point.batch * s * self.latent_bytes(point),
            activation_bytes=qkvo,
            transient_bytes=qkvo,
            dtype=point.dtype,
            shape={
                "batch": point.batch,
                "q_len": s,
                "kv_len": s,
                "pairs": pairs,
                "n_heads": self.n_heads,
                "n_kv_heads": self.n_heads,
                "head_dim": self.qk_head_dim,
                "v_head_dim": self.v_head_dim,
                "window_tokens": np.inf,
            },
            formula="2 (n + p + v) N per pair, causal; with an index at most k keys per query",
        )
        spare: Operations = ()
        if masks_its_room(point):  # what the prompt leaves free is expanded too
            spare = (self._expand(point, point.reserved_tokens - s),)
        return (*self._index_operations(point, phase="prefill"), attention, *spare)

    def decode(self, point: Point) -> Operations:
        """Absorbed form: every head reads the same latents."""
        t = point.cached_tokens
        read = self.attended(t)
        per_token = 2.0 * (2 * self.kv_lora_rank + self.qk_rope_head_dim) * self.n_heads
        executed = self.attended(t + 1) * per_token
        if runs_in_torch(point):  # transformers attends to expanded, masked heads
            executed = attended_tokens(point) * (
                2.0 * (self.qk_head_dim + self.v_head_dim) * self.n_heads
            )
        latent = self.latent_bytes(point)
        attention = Operation(
            name="mla_attention",
            kind="mla_decode_attention",
            flops=point.batch * read * per_token,
            executed_flops=point.batch * executed,
            state_bytes=point.batch * (read + 1) * latent,
            activation_bytes=point.batch
            * (self.n_heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim))
            * point.element_bytes,
            dtype=point.dtype,
            shape={
                "batch": point.batch,
                "q_len": 1.0,
                "kv_len": read,
                "n_heads": self.n_heads,
                "latent_dim": self.kv_lora_rank,
                "rope_dim": self.qk_rope_head_dim,
                "kv_bytes": point.batch * read * latent,
            },
            formula="read B T (r + p) b once; 2 (2 r + p) N FLOPs per token",
        )
        out = (*self._index_operations(point, phase="decode"), attention)
        if not runs_in_torch(point):
            return out
        out = (*out, self._expand(point, attended_tokens(point) - 1))
        if point.engine.kv_growth != "cat":
            return out
        held = point.batch * t * (latent + self.index_bytes(point))
        copy = Operation(
            name="cache_cat",
            kind="elementwise",
            workspace_bytes=2 * held,
            transient_bytes=held,
            launches=2,
            source="transformers 5.23 cache_utils.py DynamicLayer.update (torch.cat)",
            formula="read and write the whole layer cache: 2 B T (r + p) b",
        )
        return (*out, copy)

    def _expand(self, point: Point, t: Array) -> Operation:
        """What transformers does besides: expand ``t`` cached latents to heads at each step."""
        b = point.element_bytes
        width = self.n_heads * (self.qk_nope_head_dim + self.v_head_dim)
        expanded = point.batch * t * (self.n_heads * (self.qk_head_dim + self.v_head_dim) * b)
        return Operation(
            name="expand_latents",
            kind="gemm",
            flops=0.0,
            executed_flops=point.batch * t * (2.0 * self.kv_lora_rank * width),
            workspace_bytes=2 * expanded,
            transient_bytes=expanded,
            launches=3,
            dtype=point.dtype,
            shape={
                "m": point.batch * t,
                "n": float(width),
                "k": float(self.kv_lora_rank),
            },
            source="transformers 5.23 models/deepseek_v3 expand_kv",
            formula="2 B T r N (n + v) FLOPs; B T N (n + p + v) b written and read",
        )

    def _index_operations(self, point: Point, *, phase: Literal["prefill", "decode"]) -> Operations:
        """Scores of all earlier tokens, and the top-k of them."""
        i = self.index
        if i is None or not i.owns_keys:
            return ()
        prefill = phase == "prefill"
        t = point.prompt_tokens if prefill else point.cached_tokens
        pairs = causal_pairs(t) if prefill else t
        square = t * t if prefill else t + 1
        return index_operations(
            point,
            phase=phase,
            n_heads=i.n_heads,
            head_dim=i.head_dim,
            top_k=i.top_k,
            candidates=t,
            pairs=pairs,
            executed_pairs=square if point.level == "reference" else pairs,
            key_bytes=self.index_bytes(point),
            new_keys=0.0 if prefill else 1.0,
            eager_weights=True,
        )


def _linear(name: str, n_in: int, n_out: int, *, bias: bool = False) -> Linear:
    return Linear(name=name, n_in=n_in, n_out=n_out, role="attention", bias=n_out if bias else 0)

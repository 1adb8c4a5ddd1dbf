"""Softmax attention with a KV cache: MHA, GQA, MQA; full, sliding-window or chunked.

State   B * min(T, W) * K * (Hk + Hv) * b bytes, W the window or chunk (infinite for full attention)
Prefill 2 * (Hk + Hv) * N FLOPs for every query-key pair
Decode  the same for min(T, W) pairs per sequence, of a chunked layer for T mod W: a token sees its
        own chunk only; useful work counts cached tokens, executed work also the token's own key

B batch, T cached tokens, N query heads, K KV heads, Hk and Hv the key and value head sizes, b bytes
per element. Ignored: softmax (about 5 exp-class operations per pair against 4 * H multiplications).
Reference: jax-ml/scaling-book, transformers.md and inference.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from costmodel.errors import NotApplicableError
from costmodel.mixers.base import AbstractMixer, Linear
from costmodel.mixers.recurrent import runs_in_torch
from costmodel.operation import (
    Array,
    Operation,
    Operations,
    blocked_pairs,
    causal_pairs,
    chunked_pairs,
)
from costmodel.workload import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(AbstractMixer):
    """One attention layer.

    window_tokens  sliding window: a token sees itself and the window_tokens - 1 before it
    chunk_tokens   chunked attention: a token sees only its own chunk
    input_dim      width the projections read when it is not d_model (Zamba2: hidden and embedding)
    k_eq_v         values are the key projection, so there is no v matrix (both are still cached)
    owns_cache     False for layers that read another layer's cache and have no k and v matrices
    output_gate    q is projected to twice its width; the second half gates the output
    o_dim          width the output projection writes when it is not d_model
    eager          transformers has no fused attention for it (a soft cap, sinks, an old model)
    extra_parameters  inner norms, sinks and the like, in elements
    """

    KIND: ClassVar[str] = "attention"
    HAS_KV: ClassVar[bool] = True

    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_head_dim: int
    window_tokens: int | None = None
    chunk_tokens: int | None = None
    input_dim: int | None = None
    o_dim: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    k_eq_v: bool = False
    owns_cache: bool = True
    output_gate: bool = False
    eager: bool = False
    extra_parameters: int = 0

    def linears(self, d_model: int) -> tuple[Linear, ...]:
        """The fused q, k, v projection and the output projection."""
        q = self.n_heads * self.head_dim * (2 if self.output_gate else 1)
        k = self.n_kv_heads * self.head_dim if self.owns_cache else 0
        v = self.n_kv_heads * self.v_head_dim if self.owns_cache and not self.k_eq_v else 0
        o_in, o_out = self.n_heads * self.v_head_dim, self.o_dim or d_model
        return (
            Linear(
                name="qkv_proj",
                n_in=self.input_dim or d_model,
                n_out=q + k + v,
                role="attention",
                bias=q + k + v if self.qkv_bias else 0,
            ),
            Linear(
                name="o_proj",
                n_in=o_in,
                n_out=o_out,
                role="attention",
                bias=o_out if self.o_bias else 0,
            ),
        )

    def other_parameters(self, d_model: int) -> int:
        """Inner norms and sinks."""
        return self.extra_parameters

    def sharded(self, tp: int) -> "Attention":
        """Query heads divide; KV heads divide, and replicate when there are fewer than GPUs."""
        if self.n_heads % tp:
            raise NotApplicableError(f"{self.n_heads} attention heads do not divide by tp={tp}")
        if self.n_kv_heads % tp and tp % self.n_kv_heads:
            raise NotApplicableError(f"{self.n_kv_heads} KV heads and tp={tp} do not divide")
        return replace(self, n_heads=self.n_heads // tp, n_kv_heads=max(1, self.n_kv_heads // tp))

    @property
    def limit_tokens(self) -> float:
        """Most tokens the cache holds; infinite for full attention."""
        return float(self.window_tokens or self.chunk_tokens or np.inf)

    def kv_elements_per_token(self) -> int:
        """K and V elements of one token."""
        return self.n_kv_heads * (self.head_dim + self.v_head_dim) if self.owns_cache else 0

    def max_kv_tokens(self) -> int | None:
        """The window or chunk."""
        return self.window_tokens or self.chunk_tokens

    def held_tokens(self, point: Point) -> Array:
        """Tokens the cache holds per sequence."""
        limit = self.limit_tokens
        bounded = self.max_kv_tokens() is not None
        if bounded and point.engine.fixed_state_layout == "transformers":
            limit -= 1
        return np.minimum(point.cached_tokens, limit)

    def state_bytes(self, point: Point) -> Array:
        """``B * min(T, W) * K * (Hk + Hv) * b``."""
        return (
            point.batch
            * self.held_tokens(point)
            * (self.kv_elements_per_token() * point.kv_element_bytes)
        )

    def prompt_pairs(self, prompt_tokens: Array) -> Array:
        """Query-key pairs of the causal prompt, per head."""
        if self.chunk_tokens:
            return chunked_pairs(prompt_tokens, self.chunk_tokens)
        return causal_pairs(prompt_tokens, self.window_tokens)

    def flops_per_pair(self) -> float:
        """2 * (Hk + Hv) * N: the score and the weighted sum, all query heads."""
        return 2.0 * (self.head_dim + self.v_head_dim) * self.n_heads

    def alive_elements(self) -> int:
        """Elements of one token beside attention: q, k, v and gate, q and k rotated, the output."""
        q, k = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        out = self.n_heads * self.v_head_dim
        gate = out if self.output_gate else 0
        return 2 * (q + k) + self.n_kv_heads * self.v_head_dim + gate + out

    def prefill(self, point: Point) -> Operations:
        """One flash-style pass: K and V written to the cache and read once by the kernel."""
        written = point.batch * (
            np.minimum(point.prompt_tokens, self.limit_tokens)
            * (self.kv_elements_per_token() * point.kv_element_bytes)
        )
        return (
            prefill_attention(
                self,
                point,
                pairs=self.prompt_pairs(point.prompt_tokens),
                executed_pairs=self._blocked_pairs(point),
                state_bytes=written,
            ),
        )

    def _blocked_pairs(self, point: Point) -> Array | None:
        """Pairs that an engine without a kernel for windows computes; None: the kernel's."""
        if point.level == "reference":
            return None
        if masks_its_room(point):
            return self._masked_pairs(point)
        block = float(point.engine.score_block_tokens)
        if not block or self.window_tokens is None:
            return None
        s, w = point.prompt_tokens, float(self.window_tokens)
        return np.where(s <= w, causal_pairs(s), blocked_pairs(s, w, block))

    def _masked_pairs(self, point: Point) -> Array | None:
        """Pairs that transformers computes over its preallocated cache: eager attention all there
        is room for, fused attention the causal ones, or the square once a window needs a mask.
        """
        s = point.prompt_tokens
        if self.eager:
            return s * (point.reserved_tokens if self.limit_tokens == np.inf else s)
        if self.limit_tokens == np.inf:
            return None
        return np.where(s < self.limit_tokens, causal_pairs(s), s * s)

    def decode(self, point: Point) -> Operations:
        """Read the cache once, write one token."""
        held = read = np.minimum(point.cached_tokens, self.limit_tokens)
        executed = np.minimum(attended_tokens(point), self.limit_tokens)
        if self.chunk_tokens:  # a token sees its own chunk only; transformers masks the rest
            read = np.mod(point.cached_tokens, float(self.chunk_tokens))
            executed = executed if runs_in_torch(point) else read + 1.0
        per_token = self.n_kv_heads * (self.head_dim + self.v_head_dim) * point.kv_element_bytes
        operations = [
            decode_attention(
                self,
                point,
                read_tokens=read,
                executed_tokens=executed,
                read_bytes=point.batch * read * per_token,
                written_bytes=point.batch
                * (float(self.kv_elements_per_token()) * point.kv_element_bytes),
            )
        ]
        if point.engine.kv_growth == "cat" and self.owns_cache:
            operations.append(
                Operation(
                    name="cache_cat",
                    kind="elementwise",
                    workspace_bytes=2 * point.batch * held * per_token,
                    transient_bytes=point.batch * held * per_token,
                    launches=2,
                    source="transformers 5.23 cache_utils.py DynamicLayer.update (torch.cat)",
                    formula="read and write the whole layer cache: 2 * B * T * K * (Hk + Hv) * b",
                )
            )
        return tuple(operations)


def attended_tokens(point: Point) -> Array:
    """Tokens that a step's attention multiplies with: the cached ones and its own; of transformers'
    StaticCache all there is room for, the rest of them masked.
    """
    if masks_its_room(point):
        return point.reserved_tokens
    return point.cached_tokens + 1


def masks_its_room(point: Point) -> bool:
    """Whether transformers' own attention runs over a preallocated cache."""
    return runs_in_torch(point) and point.engine.kv_growth == "preallocated"


def prefill_attention(
    mixer: Attention,
    point: Point,
    *,
    pairs: Array,
    state_bytes: Array,
    name: str = "attention",
    executed_pairs: Array | None = None,
    source: str = "",
    formula: str = "2 * (Hk + Hv) * N * pairs",
    unfitted: str = "",
    shape: Mapping[str, Array] | None = None,
) -> Operation:
    """A flash-style attention kernel over a prompt.

    ``pairs`` are the useful query-key pairs per head and sequence. What torch's flop counter counts
    is the full square (``reference`` level), whatever the kernel skips; ``executed_pairs``
    overrides. ``unfitted``: see ``Operation``.
    """
    s = point.prompt_tokens
    if executed_pairs is None:
        executed_pairs = s * s if point.level == "reference" else pairs
    per_pair = mixer.flops_per_pair()
    b = point.element_bytes
    q_out = point.batch * s * (mixer.n_heads * (mixer.head_dim + mixer.v_head_dim) * b)
    flops = point.batch * pairs * per_pair
    return Operation(
        name=name,
        kind="prefill_attention",
        flops=flops,
        executed_flops=flops
        if executed_pairs is pairs
        else point.batch * executed_pairs * per_pair,
        state_bytes=state_bytes,
        activation_bytes=q_out,
        dtype=point.dtype,
        transient_bytes=q_out,
        shape={
            "batch": point.batch,
            "q_len": s,
            "kv_len": s,
            "pairs": pairs,
            "n_heads": mixer.n_heads,
            "n_kv_heads": mixer.n_kv_heads,
            "head_dim": mixer.head_dim,
            "v_head_dim": mixer.v_head_dim,
            "window_tokens": mixer.limit_tokens,
            **(shape or {}),
        },
        unfitted=unfitted,
        source=source,
        formula=formula,
    )


def decode_attention(
    mixer: Attention,
    point: Point,
    *,
    read_tokens: Array,
    executed_tokens: Array,
    read_bytes: Array,
    written_bytes: Array,
    name: str = "attention",
    vector_flops: Array = 0.0,
    workspace_bytes: Array = 0.0,
    transient_bytes: Array = 0.0,
    launches: float = 1.0,
    source: str = "",
    formula: str = "read B * T * K * (Hk + Hv) * b; 2 * (Hk + Hv) * N * B * T FLOPs",
    unfitted: str = "",
) -> Operation:
    """One decode-attention kernel over ``read_tokens`` cached tokens per sequence."""
    per_pair = mixer.flops_per_pair()
    b = point.element_bytes
    return Operation(
        name=name,
        kind="decode_attention",
        flops=point.batch * read_tokens * per_pair,
        executed_flops=point.batch * executed_tokens * per_pair,
        vector_flops=vector_flops,
        state_bytes=read_bytes + written_bytes,
        workspace_bytes=workspace_bytes,
        activation_bytes=point.batch * (mixer.n_heads * (mixer.head_dim + mixer.v_head_dim) * b),
        transient_bytes=transient_bytes,
        launches=launches,
        dtype=point.dtype,
        shape={
            "batch": point.batch,
            "q_len": 1.0,
            "kv_len": read_tokens,
            "n_heads": mixer.n_heads,
            "n_kv_heads": mixer.n_kv_heads,
            "head_dim": mixer.head_dim,
            "v_head_dim": mixer.v_head_dim,
            "kv_bytes": read_bytes,
        },
        unfitted=unfitted,
        source=source,
        formula=formula,
    )

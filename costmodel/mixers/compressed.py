"""Compressed attention (DeepSeek-V4): a sliding window beside a compressed stream of the whole
past.

One KV head whose key is its value. Three kinds of layer, by the ratio m of tokens per compressed
entry:

    m = 0    window only
    m = 128  "heavily compressed": every query also sees all entries of the finished windows
    m = 4    "compressed sparse": overlapping windows (each entry mixes 2 m tokens), and an index
             with its own compressed keys chooses the top-k entries per query

State   B b [ min(T, W) h                                       window, K = V
            + floor(T/m) (h + i)                                entries and index keys (i only if
                                                                sparse)
            + (T mod m) 2 s (h + i) + o 2 m (h + i) ]           buffered projections, overlap
        s = 2 and o = 1 (once a window is finished) for sparse layers, else s = 1 and o = 0
Prefill 4 h N FLOPs per pair; pairs are the window's and floor((t+1)/m) entries, at most top-k
Decode  min(T, W) tokens and the entries read once

Source: transformers 5.23 ``models/deepseek_v4``. Ignored: softmax pooling of the compressor
(elementwise). ``fp8`` entries are priced in the format of V3.2's latents (rotary part in 16 bits,
one fp32 scale per 128 elements): inferred, engines may use other scales.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import NotApplicableError
from costmodel.mixers.base import AbstractMixer, Linear
from costmodel.mixers.sparse_index import fp8_bytes, index_operations
from costmodel.operation import Array, Operation, Operations, causal_pairs
from costmodel.workload import Point


def entry_pairs(n_queries: Array, ratio: int, top_k: int | None) -> Array:
    """Pairs of queries and compressed entries: the sum over t = 1..S of min(floor(t / m), k)."""
    s: NDArray[np.float64] = np.asarray(n_queries, dtype=np.float64)
    ramp = s if top_k is None else np.minimum(s, float(ratio) * top_k)
    n = np.floor(ramp / ratio)
    base: Array = ratio * n * (n - 1) / 2 + n * (ramp - n * ratio + 1)
    return base if top_k is None else base + (s - ramp) * top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedAttention(AbstractMixer):
    """One layer; see the module docstring for the kinds.

    ratio          m; 0 for window-only layers
    index_heads, index_dim, top_k   the index of sparse layers; 0 heads without one
    o_groups, o_rank   block-diagonal first half of the output projection
    streams        residual streams of the block, each ``stream_width`` wide: hyper-connections mix
                   them with an n x n matrix at both of the block's sums; 1 without
    """

    KIND: ClassVar[str] = "compressed_attention"
    HAS_KV: ClassVar[bool] = True

    n_heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int
    o_rank: int
    window_tokens: int
    ratio: int = 0
    index_heads: int = 0
    index_dim: int = 0
    top_k: int = 0
    streams: int = 1
    stream_width: int = 0

    @property
    def sparse(self) -> bool:
        """Whether an index chooses entries (and windows overlap)."""
        return self.index_heads > 0

    @property
    def series(self) -> int:
        """Projected series per token: two when windows overlap."""
        return 2 if self.sparse else 1

    def linears(self, d_model: int) -> tuple[Linear, ...]:
        """Query, key-value, grouped output, compressor and index projections."""
        q_out = self.n_heads * self.head_dim
        out = [
            _linear("q_a_proj", d_model, self.q_lora_rank),
            _linear("q_b_proj", self.q_lora_rank, q_out),
            _linear("kv_proj", d_model, self.head_dim),
            _linear("o_a_proj", q_out // self.o_groups, self.o_groups * self.o_rank),
            _linear("o_b_proj", self.o_groups * self.o_rank, d_model),
        ]
        if self.ratio:
            out.append(_linear("compressor", d_model, 2 * self.series * self.head_dim))
        if self.sparse:
            out += [
                _linear("index_compressor", d_model, 2 * self.series * self.index_dim),
                _linear("index_q_proj", self.q_lora_rank, self.index_heads * self.index_dim),
                Linear(
                    name="index_weights_proj",
                    n_in=d_model,
                    n_out=self.index_heads,
                    role="attention",
                    quantisable=False,
                ),
            ]
        return tuple(out)

    def other_parameters(self, d_model: int) -> int:
        """Norms, sinks, position biases of the compressors."""
        total = self.q_lora_rank + self.head_dim + self.n_heads
        if self.ratio:
            total += self.ratio * self.series * self.head_dim + self.head_dim
        if self.sparse:
            total += self.ratio * self.series * self.index_dim + self.index_dim
        return total

    def sharded(self, tp: int) -> "CompressedAttention":
        """Query heads and output groups divide; the single KV head and the index replicate."""
        if self.n_heads % tp or self.o_groups % tp:
            raise NotApplicableError(
                f"{self.n_heads} heads in {self.o_groups} output groups do not divide by tp={tp}"
            )
        return replace(self, n_heads=self.n_heads // tp, o_groups=self.o_groups // tp)

    def kv_elements_per_token(self) -> int:
        """Elements one more token adds once the window is full: (h + i) / m, rounded down; h for
        window-only layers while the window fills.
        """
        if not self.ratio:
            return self.head_dim
        return (self.head_dim + self.index_dim) // self.ratio

    def max_kv_tokens(self) -> int | None:
        """The window, for layers that have only that."""
        return None if self.ratio else self.window_tokens

    def entry_bytes(self, point: Point) -> float:
        """One cached vector of the window or the compressed stream."""
        if point.kv_dtype == "fp8":
            return fp8_bytes(self.head_dim - self.rope_dim) + 2.0 * self.rope_dim
        return self.head_dim * point.kv_element_bytes

    def index_entry_bytes(self, point: Point) -> float:
        """One compressed index key."""
        if not self.sparse:
            return 0.0
        if point.kv_dtype == "fp8":
            return fp8_bytes(self.index_dim)
        return self.index_dim * point.kv_element_bytes

    def state_bytes(self, point: Point) -> Array:
        """See the module docstring; projections waiting for their window are in the model dtype.

        transformers keeps W - 1 tokens, and in window-only layers the same vector as key and value.
        """
        t = np.asarray(point.cached_tokens, dtype=np.float64)
        transformers = point.engine.fixed_state_layout == "transformers"
        copies = 2.0 if transformers and not self.ratio else 1.0
        held = np.minimum(t, self.window_tokens - transformers)
        per_sequence = held * (copies * self.entry_bytes(point))
        if self.ratio:
            entries = np.floor(t / self.ratio)
            waiting = t - entries * self.ratio
            width = (self.head_dim + self.index_dim) * point.element_bytes
            per_sequence = (
                per_sequence
                + entries * (self.entry_bytes(point) + self.index_entry_bytes(point))
                + waiting * (2 * self.series * width)
            )
            if self.sparse:
                per_sequence = per_sequence + (entries > 0) * (2.0 * self.ratio * width)
        return point.batch * per_sequence

    def _entries(self, tokens: Array) -> Array:
        """Compressed entries a query at the end sees."""
        if not self.ratio:
            return np.float64(0.0)
        entries = np.floor(np.asarray(tokens, dtype=np.float64) / self.ratio)
        return np.minimum(entries, float(self.top_k)) if self.sparse else entries

    def prefill(self, point: Point) -> Operations:
        """Window and entries in one attention; the index before it."""
        s, b = point.prompt_tokens, point.element_bytes
        pairs = causal_pairs(s, self.window_tokens)
        if self.ratio:
            pairs = pairs + entry_pairs(s, self.ratio, self.top_k if self.sparse else None)
        per_pair = 4.0 * self.head_dim * self.n_heads
        square = s * (s + (np.floor(s / self.ratio) if self.ratio else 0.0))
        qo = point.batch * s * (2.0 * self.n_heads * self.head_dim * b)
        attention = Operation(
            name="compressed_attention",
            kind="mla_prefill_attention",
            flops=point.batch * pairs * per_pair,
            executed_flops=point.batch
            * (square if point.level == "reference" else pairs)
            * per_pair,
            state_bytes=self.state_bytes(point.at(s)),
            activation_bytes=qo,
            transient_bytes=qo,
            dtype=point.dtype,
            shape={
                "batch": point.batch,
                "q_len": s,
                "kv_len": s,
                "pairs": pairs,
                "n_heads": self.n_heads,
                "n_kv_heads": 1,
                "head_dim": self.head_dim,
                "v_head_dim": self.head_dim,
                "window_tokens": float(self.window_tokens),
            },
            formula="4 h N per pair: window, and floor((t+1)/m) entries, at most top-k",
        )
        index = self._index_operations(point, phase="prefill")
        return (*index, attention, *self._stream_operations(point, point.batch * s))

    def decode(self, point: Point) -> Operations:
        """Read the window and the chosen entries once."""
        t = np.asarray(point.cached_tokens, dtype=np.float64)
        window = np.minimum(t, float(self.window_tokens))
        read = window + self._entries(t)
        executed = np.minimum(t + 1, float(self.window_tokens)) + self._entries(t + 1)
        per_pair = 4.0 * self.head_dim * self.n_heads
        entry = self.entry_bytes(point)
        attention = Operation(
            name="compressed_attention",
            kind="mla_decode_attention",
            flops=point.batch * read * per_pair,
            executed_flops=point.batch * executed * per_pair,
            state_bytes=point.batch * (read + 1) * entry,
            activation_bytes=point.batch
            * (2.0 * self.n_heads * self.head_dim * point.element_bytes),
            dtype=point.dtype,
            shape={
                "batch": point.batch,
                "q_len": 1.0,
                "kv_len": read,
                "n_heads": self.n_heads,
                "latent_dim": self.head_dim,
                "rope_dim": 0,
                "kv_bytes": point.batch * read * entry,
            },
            formula="read B (min(T, W) + entries) h b once; 4 h N FLOPs each",
        )
        index = self._index_operations(point, phase="decode")
        return (*index, attention, *self._stream_operations(point, point.batch))

    def _stream_operations(self, point: Point, tokens: Array) -> Operations:
        """Collapse, expand and mix the residual streams, before and after both of the block's
        parts.
        """
        n, d = self.streams, self.stream_width
        if n == 1:
            return ()
        moved = tokens * (3.0 * n * d * point.element_bytes)
        return (
            Operation(
                name="hyper_connection_mix",
                kind="elementwise",
                count=2.0,
                flops=tokens * (2.0 * n * n * d),
                vector_flops=tokens * (4.0 * n * d),
                activation_bytes=moved,
                transient_bytes=moved,
                launches=3,
                dtype=point.dtype,
                formula="2 n^2 d FLOPs per token and sum; n streams read twice and written",
            ),
        )

    def _index_operations(self, point: Point, *, phase: Literal["prefill", "decode"]) -> Operations:
        """Scores of the compressed index keys, and the top-k entries."""
        if not self.sparse:
            return ()
        prefill = phase == "prefill"
        t = point.prompt_tokens if prefill else point.cached_tokens
        entries = np.floor(np.asarray(t, dtype=np.float64) / self.ratio)
        pairs = entry_pairs(t, self.ratio, None) if prefill else entries
        square = t * entries if prefill else entries
        return index_operations(
            point,
            phase=phase,
            n_heads=self.index_heads,
            head_dim=self.index_dim,
            top_k=self.top_k,
            candidates=entries,
            pairs=pairs,
            executed_pairs=square if point.level == "reference" else pairs,
            key_bytes=self.index_entry_bytes(point),
            new_keys=0.0,
        )


def _linear(name: str, n_in: int, n_out: int) -> Linear:
    return Linear(name=name, n_in=n_in, n_out=n_out, role="attention")

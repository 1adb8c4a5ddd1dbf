"""StreamingLLM: the first I tokens (attention sinks) and the last W; the middle is dropped for
good.

Xiao et al., arXiv 2309.17453. Already the prompt is attended through that band, so prefill is
linear. State per layer: B K min(T, I + W) (Hk + Hv) b.

positions=cache (mit-han-lab/streaming-llm): keys are cached before rotation and rotated anew on
every step with their place in the cache. positions=fixed (thunlp/InfLLM ``stream_llm.py``, the
benchmark's harness): local keys keep true distances, sinks one fixed distance.

``ideal``: a banded attention kernel and a ring buffer. ``reference``: positions=cache runs the
prompt through eager attention and concatenates the cache anew on every step; positions=fixed works
in chunks of 8192 and re-rotates its window in fp32. Its kernel computes the band; plain torch
multiplies every query of a chunk with the whole chunk, the window before it and the sinks.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.fused_kernels import fused_step
from costmodel.methods.base import (
    PRESETS,
    AbstractMethod,
    Mask,
    Preset,
    Scope,
    Stage,
    State,
    attention_of,
    check_at_least,
    kept,
    layer_bytes,
    within_pass,
)
from costmodel.methods.chains import (
    alive_around_bytes,
    blocked_transient_bytes,
    cache_cat,
    computed_pairs,
    elementwise,
    rotate_in_fp32,
)
from costmodel.methods.eager import eager_prompt, eager_step, rotate_keys
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention, prefill_attention
from costmodel.operation import Array, Operation, Operations, causal_pairs
from costmodel.workload import Point

_MIT_CACHE = "mit-han-lab/streaming-llm streaming_llm/kv_cache.py"
_MIT_LLAMA = "mit-han-lab/streaming-llm streaming_llm/pos_shift/modify_llama.py"
_INF = "thunlp/InfLLM inf_llm/attention/stream_llm.py"
_CHUNK = 8192.0  # tokens the InfLLM harness feeds at once


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingLLM(AbstractMethod):
    """Attention sinks and a rolling window."""

    NAME: ClassVar[str] = "streaming_llm"
    TITLE: ClassVar[str] = "StreamingLLM: attention sinks and a rolling window"
    REFERENCE: ClassVar[str] = "Xiao et al., arXiv 2309.17453; github.com/mit-han-lab/streaming-llm"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"prefill", "evict", "store"})
    ACTS: ClassVar[str] = "during prefill and on every decoded token"
    SCOPE: ClassVar[Scope] = "unbounded"
    DOES_NOT_SAVE: ClassVar[str] = (
        "weights or MLP work; what leaves the window cannot be recovered, so retrieval is lost."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = (
        "streaming-llm repository",
        "InfLLM (stream-llm)",
        "kvpress (after prefill)",
        "TensorRT-LLM",
    )
    PARAMETERS: ClassVar[dict[str, str]] = {
        "sink_tokens": "first tokens kept; fewer is smaller",
        "window_tokens": "latest tokens kept; fewer is smaller",
        "positions": "cache (keys rotated every step) or fixed (keys rotated once)",
        "preset": "the benchmark's 2x, 4x, 6x or 8x budgets, from the prompt's length",
    }
    STATE_FORMULA: ClassVar[str] = "B K min(T, I + W) (Hk + Hv) b"
    PRESET_SETS: ClassVar[tuple[str, ...]] = ("sink_tokens", "window_tokens")

    sink_tokens: int = 4
    window_tokens: int = 1020
    positions: Literal["cache", "fixed"] = "cache"
    preset: Preset | None = None

    def __post_init__(self) -> None:
        check_at_least("streaming_llm", 0, sink_tokens=self.sink_tokens)
        check_at_least("streaming_llm", 1, window_tokens=self.window_tokens)

    def budget(self, prompt_tokens: Array) -> tuple[Array, Array]:
        """(sinks, window). A preset keeps a share of the prompt, 2.1 % of it as sinks."""
        if self.preset is None:
            return float(self.sink_tokens), float(self.window_tokens)
        total = np.floor(np.asarray(prompt_tokens, dtype=np.float64) * PRESETS[self.preset])
        total = np.maximum(total, 1.0)
        sinks = np.floor(0.021 * total)
        return sinks, total - sinks

    def resolved(self, context_tokens: int) -> "StreamingLLM":
        """The preset's budgets for this context."""
        if self.preset is None:
            return self
        sinks, window = self.budget(float(context_tokens))
        return replace(self, sink_tokens=int(sinks), window_tokens=int(window), preset=None)

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """Nothing has left the window yet."""
        sinks, window = self.budget(prompt_tokens)
        return np.asarray(cached_tokens) <= sinks + window

    def tokens(self, point: Point) -> Array:
        """Tokens in the cache."""
        sinks, window = self.budget(point.prompt_tokens)
        return kept(sinks + window, point.cached_tokens)

    def state(self, group: MixerGroup, point: Point) -> State:
        """Sinks and window."""
        mixer = attention_of(group)
        size = group.n_layers * layer_bytes(mixer, point, self.tokens(point))
        # published code concatenates: there is no room besides
        return State(size, allocated=None if point.level == "ideal" else size)

    def fed_tokens(self, point: Point) -> float:
        """The InfLLM harness feeds chunks; the original repository the whole prompt."""
        chunked = point.level == "reference" and self.positions == "fixed"
        return _CHUNK if chunked else 0.0

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Every query sees the sinks and the window: at most I + W keys."""
        mixer = attention_of(group)
        sinks, window = self.budget(point.prompt_tokens)
        pairs = causal_pairs(point.prompt_tokens, sinks + window)
        c = self.tokens(point.at(point.prompt_tokens))
        if point.level == "reference" and self.positions == "cache":
            return self._eager_prefill(mixer, point, pairs, c)
        stages = point.level == "reference" and bool(point.engine.score_block_tokens)
        banded = prefill_attention(
            mixer,
            point,
            name="banded_attention",
            pairs=pairs,
            executed_pairs=_two_stage_pairs(point.prompt_tokens, sinks, window)
            if stages
            else computed_pairs(point, sinks + window),
            state_bytes=layer_bytes(mixer, point, c),
            source=f"{_INF}, Triton multi-stage kernel" if point.level == "reference" else "",
            formula="2 (Hk + Hv) N for each of S queries and at most I + W keys",
            shape={"window_tokens": sinks + window},
        )
        (banded,) = within_pass((banded,), point)
        banded = replace(
            banded,
            activation_bytes=banded.activation_bytes
            + layer_bytes(mixer, point, point.prompt_tokens - c),
        )
        if point.level == "ideal":
            alive = blocked_transient_bytes(mixer, point, sinks + window, fp32=False)
            return (replace(banded, transient_bytes=np.maximum(banded.transient_bytes, alive)),)
        s = point.prompt_tokens
        chunk = np.minimum(s, _CHUNK)
        if stages:  # scores joined, their softmax, and a stage's masked copy: 4 b each
            keys = np.minimum(s, chunk + window) + sinks
            b = point.element_bytes
            scores = point.batch * mixer.n_heads * chunk * keys * (4 * b)
            repeated = layer_bytes(mixer, point, keys) * (mixer.n_heads / mixer.n_kv_heads)
            alive = scores + repeated + alive_around_bytes(mixer, point)
            banded = replace(banded, transient_bytes=np.maximum(banded.transient_bytes, alive))
        return (
            banded,
            elementwise(
                "chunk_cat",
                count=np.ceil(s / _CHUNK),
                workspace_bytes=2 * layer_bytes(mixer, point, window + chunk),
                transient_bytes=layer_bytes(mixer, point, window + chunk),
                launches=2,
                source=f"{_INF} torch.cat of the window and the chunk",
                formula="window and chunk of K and V read and written, per chunk of 8192",
            ),
            rotate_in_fp32(mixer, point, window + chunk, count=np.ceil(s / _CHUNK)),
        )

    def _eager_prefill(self, mixer: Attention, point: Point, pairs: Array, c: Array) -> Operations:
        s = point.prompt_tokens
        sinks, _ = self.budget(s)
        return (
            rotate_keys(mixer, point, s, source=f"{_MIT_LLAMA} apply_rotary_pos_emb_single"),
            *eager_prompt(mixer, point, pairs=pairs, source=_MIT_LLAMA),
            *_sink_scores(mixer, point, sinks),
            elementwise(
                "evict",
                state_bytes=layer_bytes(mixer, point, c),
                workspace_bytes=layer_bytes(mixer, point, s) + layer_bytes(mixer, point, c),
                transient_bytes=layer_bytes(mixer, point, s),
                launches=2,
                source=f"{_MIT_CACHE} StartRecentKVCache",
                formula="K and V of the prompt written, I + W tokens read and concatenated",
            ),
        )

    @staticmethod
    def _stages_copied(mixer: Attention, point: Point, c: Array) -> Array:
        """Bytes of a step's copies on plain torch: joined, cut into stages, repeated to all query
        heads.
        """
        if not point.engine.score_block_tokens:
            return 0.0
        return layer_bytes(mixer, point, c) * (2.0 + mixer.n_heads / mixer.n_kv_heads)

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Attention over sinks and window; ``cache`` rotates every key again."""
        mixer = attention_of(group)
        c = self.tokens(point)
        keys = point.batch * c * (mixer.n_kv_heads * mixer.head_dim)
        if point.level == "ideal":
            attention = decode_attention(
                mixer,
                point,
                read_tokens=c,
                executed_tokens=c + 1,
                read_bytes=layer_bytes(mixer, point, c),
                written_bytes=layer_bytes(mixer, point, 1.0),
                name="sink_attention",
                vector_flops=3 * keys if self.positions == "cache" else 0.0,
                formula="I + W tokens read once, the oldest of the window overwritten",
            )
            return fused_step(point, "ring", attention)
        if self.positions == "fixed":
            return (
                cache_cat(mixer, point, c, source=f"{_INF} torch.cat"),
                rotate_in_fp32(mixer, point, c),
                decode_attention(
                    mixer,
                    point,
                    read_tokens=c,
                    executed_tokens=c + 1,
                    read_bytes=layer_bytes(mixer, point, c),
                    written_bytes=layer_bytes(mixer, point, 1.0),
                    transient_bytes=self._stages_copied(mixer, point, c),
                    launches=2,
                    source=f"{_INF}, Triton multi-stage kernel",
                    formula="window, then sinks",
                ),
            )
        return (
            elementwise(
                "evict",
                workspace_bytes=2 * layer_bytes(mixer, point, c),
                transient_bytes=layer_bytes(mixer, point, c),
                launches=2,
                source=f"{_MIT_CACHE} StartRecentKVCache",
                formula="slices of K and V concatenated anew",
            ),
            cache_cat(mixer, point, c, source=f"{_MIT_LLAMA} torch.cat"),
            rotate_keys(mixer, point, c, source=f"{_MIT_LLAMA} apply_rotary_pos_emb_single"),
            *eager_step(mixer, point, c, source=_MIT_LLAMA),
        )


def _sink_scores(mixer: Attention, point: Point, sinks: Array) -> Operations:
    """Scores of the sinks again, by queries at their places in the cache: what token by token a
    prompt's queries meet. Only this package runs it, upstream leaves its prompt dense.
    """
    if not point.engine.score_block_tokens:
        return ()
    scores = point.batch * mixer.n_heads * point.prompt_tokens * sinks
    return (
        Operation(
            name="sink_scores",
            kind="elementwise",
            executed_flops=scores * (2.0 * mixer.head_dim),
            workspace_bytes=scores * (3 * point.element_bytes),
            launches=3,
            source="measure/methods/streaming_llm.py",
            formula="2 Hk N S I FLOPs: queries at their places in the cache against the sinks",
        ),
    )


def _two_stage_pairs(prompt_tokens: Array, sinks: Array, window: Array) -> Array:
    """Pairs that plain torch computes, masked ones too, chunk by chunk: every query of a chunk with
    the chunk and the window before it, and once tokens have left the window with the sinks.
    """
    s = np.asarray(prompt_tokens, dtype=np.float64)
    pairs: Array = np.zeros(np.broadcast_shapes(s.shape, np.shape(sinks), np.shape(window)))
    for start in np.arange(0.0, np.max(s, initial=0.0), _CHUNK):
        queries = np.clip(s - start, 0.0, _CHUNK)
        kept_tokens = np.minimum(start, sinks + window) + queries
        far = np.where(start + queries > window, np.minimum(sinks, kept_tokens), 0.0)
        pairs = pairs + queries * (np.minimum(kept_tokens, queries + window) + far)
    return pairs

"""Quest: keep the whole cache, read only the pages whose keys may matter to the query.

Tang et al., arXiv 2406.10774; code mit-han-lab/Quest. Every page of p tokens and KV head keeps the
elementwise minimum and maximum of its keys; a decode step scores all pages with
sum_i max(q_i min_i, q_i max_i) and attends to the best max(3, budget // p) of them. The first two
layers and prefill are dense.

State per layer: B K [T (Hk + Hv) b + ceil(T / p) 2 Hk b]: more than full attention, by 1/p.
Bytes of a decode step: metadata and budget tokens instead of T tokens. ``reference`` has the same
fused kernels, per query head, with materialised page scores (batch 1, no GQA upstream).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.fused_kernels import fused_step
from costmodel.methods.base import (
    AbstractMethod,
    Mask,
    Scope,
    Stage,
    State,
    attention_of,
    check_at_least,
    layer_bytes,
)
from costmodel.methods.chains import elementwise, select
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Array, Operations
from costmodel.workload import Point

_CONTROLLER = "mit-han-lab/Quest quest/utils/controller.py"
_ATTENTION = "mit-han-lab/Quest quest/models/QuestAttention.py"
_DENSE_LAYERS = 2
_MIN_PAGES = 3.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(AbstractMethod):
    """Query-aware page selection."""

    NAME: ClassVar[str] = "quest"
    TITLE: ClassVar[str] = "Quest: attend only to the pages that may matter"
    REFERENCE: ClassVar[str] = "Tang et al., arXiv 2406.10774; github.com/mit-han-lab/Quest"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"evict", "store"})
    ACTS: ClassVar[str] = "on every decoded token"
    SCOPE: ClassVar[Scope] = "unbounded"
    DOES_NOT_SAVE: ClassVar[str] = (
        "memory (the whole cache stays, plus 1/page of it) or prefill; only decode reads less."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = ("Quest repository (CUDA, batch 1)", "MInference")
    PARAMETERS: ClassVar[dict[str, str]] = {
        "page_tokens": "tokens per page; larger pages mean less metadata and coarser choice",
        "keep_tokens": "tokens a step reads; fewer is faster, memory stays",
    }
    STATE_FORMULA: ClassVar[str] = "B K [T (Hk + Hv) b + ceil(T / p) 2 Hk b]"

    page_tokens: int = 16
    keep_tokens: int = 2048

    def __post_init__(self) -> None:
        check_at_least("quest", 1, page_tokens=self.page_tokens)
        check_at_least("quest", self.page_tokens, keep_tokens=self.keep_tokens)

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """A step reads everything."""
        return np.asarray(cached_tokens) <= self.keep_tokens

    def pages(self, tokens: Array) -> Array:
        """Pages in the cache."""
        return np.ceil(np.asarray(tokens, dtype=np.float64) / self.page_tokens)

    def metadata_bytes(self, mixer: Attention, point: Point, tokens: Array) -> Array:
        """Minimum and maximum key of every page in one layer, whole batch."""
        per_page = 2.0 * mixer.n_kv_heads * mixer.head_dim * point.kv_element_bytes
        return point.batch * self.pages(tokens) * per_page

    def state(self, group: MixerGroup, point: Point) -> State:
        """Everything and the metadata; whole pages are allocated."""
        mixer = attention_of(group)
        t = point.cached_tokens
        metadata = self.metadata_bytes(mixer, point, t)
        paged = layer_bytes(mixer, point, self.pages(t) * self.page_tokens)
        return State(
            group.n_layers * (layer_bytes(mixer, point, t) + metadata),
            allocated=group.n_layers * (paged + metadata),
        )

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Minimum and maximum key of every page."""
        mixer = attention_of(group)
        s = point.prompt_tokens
        keys = point.batch * s * (mixer.n_kv_heads * mixer.head_dim)
        reference = point.level == "reference"
        return (
            elementwise(
                "page_min_max",
                vector_flops=2 * keys,
                state_bytes=self.metadata_bytes(mixer, point, s),
                workspace_bytes=keys * point.kv_element_bytes if reference else 0.0,
                activation_bytes=0.0 if reference else keys * point.kv_element_bytes,
                source="mit-han-lab/Quest quest/utils append_kv" if reference else "",
                formula="keys read, two vectors per page written",
            ),
        )

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Dense in the first two cache-keeping layers, else estimate, choose, attend."""
        mixer = attention_of(group)
        dense = sum(i < _DENSE_LAYERS for i in group.indices) / group.n_layers
        sparse = tuple(
            replace(op, count=op.count * (1.0 - dense)) for op in self._sparse(mixer, point)
        )
        if dense == 0:
            return sparse
        native = tuple(replace(op, count=op.count * dense) for op in mixer.decode(point))
        return native + sparse

    def _sparse(self, mixer: Attention, point: Point) -> Operations:
        t = point.cached_tokens
        pages = self.pages(t)
        chosen = np.minimum(max(_MIN_PAGES, self.keep_tokens // self.page_tokens), pages)
        tokens = np.minimum(chosen * self.page_tokens, t)
        metadata = self.metadata_bytes(mixer, point, t)
        reference = point.level == "reference"
        rows = point.batch * (mixer.n_heads if reference else mixer.n_kv_heads)
        b = point.kv_element_bytes
        # plain torch has no attention that reads pages: they are copied for every query head
        copied = layer_bytes(mixer, point, tokens) * (mixer.n_heads / mixer.n_kv_heads)
        copies = reference and bool(point.engine.score_block_tokens)
        new = point.batch * mixer.n_kv_heads * (2.0 * mixer.head_dim * b)
        estimate = elementwise(
            "estimate_pages",
            vector_flops=point.batch * pages * (4.0 * mixer.n_heads * mixer.head_dim),
            state_bytes=metadata + 2 * new,
            workspace_bytes=rows * pages * b,
            source=f"{_ATTENTION} decode_estimate" if reference else "",
            formula="metadata read once; 4 Hk N FLOPs per page; the new token's page updated",
        )
        return fused_step(
            point,
            "quest",
            replace(estimate, shape={"page_tokens": float(self.page_tokens)}),
            select(
                "select_pages",
                rows=rows,
                length=pages,
                keep=chosen,
                workspace_bytes=rows * (pages * (b + (4.0 if reference else 0.0)) + chosen * 4.0),
                source=f"{_CONTROLLER} topk_dindices_buffer" if reference else "",
                formula="top-k over the pages of every head",
            ),
            decode_attention(
                mixer,
                point,
                read_tokens=tokens,
                executed_tokens=tokens + 1,
                read_bytes=layer_bytes(mixer, point, tokens),
                written_bytes=layer_bytes(mixer, point, 1.0),
                workspace_bytes=2 * copied if copies else 0.0,
                transient_bytes=copied if copies else 0.0,
                launches=2 if reference else 1,
                source=f"{_ATTENTION} decode_sparse_attn" if reference else "",
                formula="min(T, pages p) tokens read once",
            ),
        )

"""MInference: sparse attention over the prompt, vertical and slash patterns; a full cache.

Jiang et al., arXiv 2407.02490; code microsoft/MInference. Per head, the last 64 queries are scored
against all keys; the best columns (vertical) and diagonals (slash) are attended by every query. The
published head file of Llama-3.1-8B averages v + s = 3004 of them, which is ``kept_tokens``.

Pairs per head: sum over queries of min(position, kept). Index: 2 N 64 S Hk FLOPs. Decode is dense.
``reference``: K and V repeated to all query heads, scores of the 64 queries materialised, one head
after another, and diagonals computed in blocks of 64, so a query computes one more block.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.methods.base import (
    AbstractMethod,
    Mask,
    Scope,
    Stage,
    State,
    attention_of,
    check_at_least,
    layer_bytes,
    within_pass,
)
from costmodel.methods.chains import (
    alive_around_bytes,
    blocked_transient_bytes,
    elementwise,
    select,
)
from costmodel.methods.eager import repeat_kv, softmax_chain_bytes
from costmodel.mixers.attention import prefill_attention
from costmodel.operation import Array, Operation, Operations, causal_pairs
from costmodel.workload import Point

_CODE = "microsoft/MInference minference/modules/minference_forward.py vertical_and_slash_kernel"
_LAST_QUERIES = 64.0
_BLOCK = 64.0
#: Where little is left out its pairs look like those of whole prompts to a fitted family.
_UNFITTED = "no table of measured kernels holds MInference's sparse attention"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MInference(AbstractMethod):
    """Vertical-slash sparse prefill."""

    NAME: ClassVar[str] = "minference"
    TITLE: ClassVar[str] = "MInference: sparse prefill by vertical and slash patterns"
    REFERENCE: ClassVar[str] = "Jiang et al., arXiv 2407.02490; github.com/microsoft/MInference"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"prefill"})
    ACTS: ClassVar[str] = "during prefill only"
    SCOPE: ClassVar[Scope] = "unbounded"
    DOES_NOT_SAVE: ClassVar[str] = "memory or decode time: cache and decode are those of full."
    REALISED_BY: ClassVar[tuple[str, ...]] = (
        "MInference repository (Triton, CUDA)",
        "vLLM (patch)",
        "SGLang",
    )
    PARAMETERS: ClassVar[dict[str, str]] = {
        "kept_tokens": "keys a query attends to (vertical + slash, mean of heads); fewer is faster",
    }
    STATE_FORMULA: ClassVar[str] = "as full attention: B T K (Hk + Hv) b"

    kept_tokens: int = 3004

    def __post_init__(self) -> None:
        check_at_least("minference", 1, kept_tokens=self.kept_tokens)

    @property
    def block_tokens(self) -> int:
        """Tokens of a slash block; smaller where few tokens are kept."""
        return min(int(_BLOCK), max(1, self.kept_tokens // 2))

    @property
    def kept_blocks(self) -> int:
        """Slash blocks of a query where half of the kept tokens are in blocks."""
        return max(1, self.kept_tokens // 2 // self.block_tokens)

    def _unfused_pairs(self, prompt_tokens: Array, *, square: bool) -> Array:
        """Pairs of an engine without a sparse kernel: dense causal rows as long as they see no
        more than what is kept (whole blocks of them; ``square`` as torch's counter counts them),
        then the kept tokens for every row.
        """
        dense = float(self.kept_tokens // self.block_tokens * self.block_tokens)
        first = dense * dense if square else causal_pairs(dense)
        pairs: Array = first + (prompt_tokens - dense) * self.kept_tokens
        return pairs

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """Every query attends to everything before it."""
        return np.asarray(prompt_tokens) <= self.kept_tokens

    def state(self, group: MixerGroup, point: Point) -> State:
        """The model's own."""
        return State(group.n_layers * group.mixer.state_bytes(point))

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """Find the columns and diagonals, then attend to them."""
        mixer = attention_of(group)
        s = point.prompt_tokens
        b = point.element_bytes
        pairs = causal_pairs(s, float(self.kept_tokens))
        reference = point.level == "reference"
        executed = causal_pairs(s, self.kept_tokens + _BLOCK) if reference else pairs
        if point.engine.score_block_tokens:
            executed = self._unfused_pairs(s, square=reference)
        heads = point.batch * mixer.n_heads
        queries = np.minimum(_LAST_QUERIES, s)
        scores = heads * queries * s
        sparse = prefill_attention(
            mixer,
            point,
            pairs=pairs,
            executed_pairs=executed,
            state_bytes=sum((op.state_bytes for op in attention), np.float64(0.0)),
            name="sparse_attention",
            source=_CODE if reference else "",
            formula="2 (Hk + Hv) N for each of S queries and min(position, kept) keys",
            unfitted=_UNFITTED,
        )
        (sparse,) = within_pass((sparse,), point)
        unfused = blocked_transient_bytes(mixer, point, np.inf, block=_LAST_QUERIES)
        index = Operation(
            name="index_scores",
            kind="prefill_attention",
            executed_flops=scores * (2.0 * mixer.head_dim),
            vector_flops=0.0 if reference else 6 * scores,
            activation_bytes=heads * queries * (mixer.head_dim * b),
            workspace_bytes=scores * b if reference else heads * s * 8.0,
            # published code holds one head's at a time
            transient_bytes=scores * b / mixer.n_heads if reference else heads * s * 8.0 + unfused,
            dtype=point.dtype,
            shape={**sparse.shape, "q_len": queries, "pairs": queries * s, "v_head_dim": 0.0},
            unfitted=_UNFITTED,
            source=_CODE if reference else "",
            formula="2 Hk N 64 S FLOPs: the last 64 queries against all keys",
        )
        choose = select(
            "select_pattern",
            rows=2 * heads,
            length=s,
            keep=self.kept_tokens / 2,
            workspace_bytes=heads * (s * 8.0 + self.kept_tokens * 4.0),
            launches=4 * mixer.n_heads if reference else 2,
            source=f"{_CODE}, one head after another" if reference else "",
            formula="column and diagonal sums of every head, top-k of both",
        )
        if not reference:
            return index, choose, sparse
        softmax = elementwise(
            "index_softmax",
            vector_flops=6 * scores,
            workspace_bytes=scores * (softmax_chain_bytes(b) + 2 * b) + heads * s * 8.0,
            transient_bytes=scores * (2 * b + 4) / mixer.n_heads,
            launches=6 * mixer.n_heads,
            source=_CODE,
            formula="B N 64 S (8 b + 8): mask, softmax in fp32, sums over columns and diagonals",
        )
        repeated = layer_bytes(mixer, point, s) * (mixer.n_heads / mixer.n_kv_heads)
        around = (repeated if mixer.n_heads > mixer.n_kv_heads else 0.0) + alive_around_bytes(
            mixer, point
        )
        sparse = replace(
            sparse,
            launches=2 * mixer.n_heads,
            transient_bytes=sparse.transient_bytes + around,
        )
        repeat = repeat_kv(mixer, point, s, source=f"{_CODE} repeat_kv", from_state=False)
        return *repeat, index, softmax, choose, sparse

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """The model's own."""
        return group.mixer.decode(point)

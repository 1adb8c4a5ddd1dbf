"""The lightning indexer of sparse attention: score every candidate, keep the best k.

Scores  2 h d FLOPs per pair of a query and a candidate (h index heads of size d); fp32 scores
        written
Select  the scores read, k positions per query written
"""

from typing import Literal

import numpy as np

from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Point

#: Elements that share one fp32 scale in 8-bit latents and index keys.
SCALE_GROUP = 128


def fp8_bytes(elements: int) -> float:
    """8-bit elements with their fp32 scales."""
    return elements + 4.0 * -(-elements // SCALE_GROUP)


def index_operations(
    point: Point,
    *,
    phase: Literal["prefill", "decode"],
    n_heads: int,
    head_dim: int,
    top_k: int,
    candidates: Array,
    pairs: Array,
    executed_pairs: Array,
    key_bytes: float,
    new_keys: Array,
    eager_weights: bool = False,
) -> Operations:
    """Scoring and selection of one layer.

    candidates  keys a query at the end is scored against, per sequence
    pairs       query-candidate pairs that causality allows; ``executed_pairs`` what runs
    key_bytes   of one index key; ``new_keys`` keys written besides those read
    eager_weights  whether the eager implementation weighs scores with a matmul
    """
    queries: Array = point.prompt_tokens if phase == "prefill" else np.float64(1.0)
    # the eager path weighs the heads' scores with a matmul, kernels while they score
    weighing = 2.0 * n_heads if point.level == "reference" and eager_weights else 0.0
    scores = point.batch * (queries * candidates) * 4.0
    score = Operation(
        name="index_score",
        kind="mla_prefill_attention" if phase == "prefill" else "mla_decode_attention",
        flops=point.batch * pairs * (2.0 * n_heads * head_dim),
        executed_flops=point.batch * executed_pairs * (2.0 * n_heads * head_dim + weighing),
        vector_flops=point.batch * pairs * (2.0 * n_heads),
        state_bytes=point.batch * (candidates + new_keys) * key_bytes,
        activation_bytes=point.batch * queries * (n_heads * (head_dim + 1) * point.element_bytes),
        workspace_bytes=scores,
        # the eager path holds the scores of every index head at once
        transient_bytes=scores * (n_heads if point.level == "reference" else 1),
        dtype=point.dtype,
        shape={
            "batch": point.batch,
            "q_len": queries,
            "kv_len": candidates,
            "pairs": pairs,
            "n_heads": n_heads,
            "n_kv_heads": 1,
            "head_dim": head_dim,
            "v_head_dim": 0,
            "latent_dim": head_dim,
            "rope_dim": 0,
            "kv_bytes": point.batch * candidates * key_bytes,
            "window_tokens": np.inf,
        },
        formula="2 h d FLOPs per query and candidate; fp32 scores written",
    )
    select = Operation(
        name="index_topk",
        kind="select",
        workspace_bytes=scores + point.batch * queries * (4.0 * top_k),
        vector_flops=point.batch * (queries * candidates),
        shape={
            "batch": point.batch,
            "rows": point.batch * queries,
            "length": candidates,
            "k": top_k,
        },
        formula="fp32 scores read, top-k positions written",
    )
    return score, select

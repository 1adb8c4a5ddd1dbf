"""Seconds of a whole attention module with a sparse index (DSA), from physical parameters.

The published tables time the module: projections into latents and heads, the index that scores all
cached tokens, the choice of the best 2,048, attention over those, output projection.

    products   projections' FLOPs / (e_c peak) and their weights / (e_b bw)
    index      score FLOPs / (e_i fp8 peak) and 132 bytes per cached token / (e_b bw), + t_select
               per query token, + p passes over the scores, 4 bytes per query and cached token, in
               prefill of all sequences (scores of a batch are one matrix, mostly masked)
    attention  min(kv, 2048) latents per query token: bytes / (e_g bw) gathered, FLOPs / (e_a peak)
               of heads filled up to whole blocks (FlashMLA: 64)
    time       max(eager, t0 + t_wide (quantised products) + sum of the three)

Short prompts (kv up to 2,048 in prefill) run dense attention instead and skip the index; modules
that reuse an earlier layer's choice skip it too.

What is ignored: overlap between the parts. Dimensions: DeepSeek-V3.2 and GLM-5 configs.
"""

from dataclasses import dataclass

import numpy as np

from costmodel.hardware import HardwareProfile
from costmodel.kernels.kinds import KernelKind, Shape, Work
from costmodel.kernels.physics import Prior, limited, overlapped, tensor_peak
from costmodel.operation import Array

#: Tokens the index keeps, latent and rope elements, index head size, bytes of an index entry.
SELECTED_TOKENS = 2048.0
LATENT_DIM, ROPE_DIM = 512.0, 64.0
INDEX_DIM, INDEX_ENTRY_BYTES = 128.0, 132.0
#: An index score.
SCORE_BYTES = 4.0
#: Largest decode batch SGLang captures a graph for, by device memory (its server arguments'
#: defaults), and where it changes.
CAPTURED_BATCH = (256.0, 512.0)
LARGE_MEMORY_BYTES = 100e9


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseParameters:
    """One family of attention modules with a sparse index.

    launch_s            start of the module's kernels, t0
    head_s              more per head of this GPU
    bandwidth_fraction  attained share of DRAM bandwidth, e_b
    tensor_fraction     attained share of the dense peak in projections, e_c
    index_fraction      attained share of the fp8 peak in index scores, e_i
    attention_fraction  attained share of the dense peak in attention, e_a
    gather_fraction     attained share of DRAM bandwidth of gathered latents, e_g
    score_passes        times the matrix of index scores passes DRAM
    token_s             more per query token: norms, rotary, quantisation, selection
    unhidden_fraction   share of the shorter of compute and memory that nothing hides
    eager_s             host time per call; only in tables made without a captured graph
    eager_fp8_s         more with fp8 weights; eager_fp8_cache_s: with an fp8 cache
    uncaptured_s        the same, for decode batches larger than the captured graphs
    head_block          attention runs whole blocks of so many heads
    """

    launch_s: float
    head_s: float
    bandwidth_fraction: float
    tensor_fraction: float
    index_fraction: float
    attention_fraction: float
    gather_fraction: float

    token_s: float
    unhidden_fraction: float
    eager_s: float = 0.0
    eager_fp8_s: float = 0.0
    eager_fp8_cache_s: float = 0.0
    uncaptured_s: float = 0.0
    head_block: float = 1.0
    score_passes: float = 0.0


PRIORS: dict[str, Prior] = {
    "launch_s": Prior(6e-5, 0.5, 5e-6, 1e-3, "start of the module's kernels"),
    "head_s": Prior(3e-7, 1.0, 1e-9, 1e-5, "more per head"),
    "bandwidth_fraction": Prior(0.7, 0.25, 0.1, 1.0, "attained share of DRAM bandwidth"),
    "tensor_fraction": Prior(0.55, 0.35, 0.05, 1.0, "dense peak share of projections"),
    "index_fraction": Prior(0.3, 0.7, 0.01, 1.0, "fp8 peak share of index scores"),
    "attention_fraction": Prior(0.4, 0.6, 0.02, 1.0, "dense peak share of attention"),
    "gather_fraction": Prior(0.5, 0.6, 0.02, 4.0, "DRAM share of gathered latents"),
    "score_passes": Prior(1.0, 0.5, 0.05, 8.0, "passes over the matrix of index scores"),
    "token_s": Prior(1e-8, 1.2, 1e-10, 5e-6, "more per query token"),
    "unhidden_fraction": Prior(0.3, 0.5, 0.001, 1.0, "share of the shorter activity not hidden"),
}
CONTEXT_PRIORS = PRIORS | {
    "eager_s": Prior(5e-4, 1.5, 1e-7, 5e-3, "host time per call, no captured graph"),
    "eager_fp8_s": Prior(3e-4, 0.7, 1e-7, 2e-3, "more with fp8 weights"),
    "eager_fp8_cache_s": Prior(1e-4, 0.7, 1e-7, 2e-3, "more with an fp8 cache"),
}
GENERATION_PRIORS = PRIORS | {
    "uncaptured_s": Prior(1e-3, 0.7, 1e-5, 5e-3, "host time of batches beyond the captured graphs"),
}


def module_work(shape: Shape) -> dict[str, Array]:
    """FLOPs and bytes of the module's parts; names as in the module docstring.

    Shape: batch sequences of q_len new tokens after ``prefix`` cached ones.
    """
    q = np.asarray(shape["q_len"], dtype=np.float64)
    heads = np.asarray(shape["n_heads"], dtype=np.float64)
    tokens = shape["batch"] * q
    kv = shape["prefix"] + q
    hidden, q_rank = shape["hidden"], shape["q_rank"]
    nope, value = shape["nope_dim"], shape["value_dim"]
    index_heads = shape["index_heads"]
    latent = LATENT_DIM + ROPE_DIM
    down = hidden * (q_rank + latent)
    up = q_rank * heads * (nope + ROPE_DIM) + heads * LATENT_DIM * (nope + value)
    index = q_rank * index_heads * INDEX_DIM + hidden * (INDEX_DIM + index_heads)
    weights = down + up + heads * value * hidden + index * shape["has_index"]
    mean_kv = shape["prefix"] + (q + 1.0) / 2.0
    dense = shape["dense"]
    attended = np.where(dense > 0, mean_kv, np.minimum(mean_kv, SELECTED_TOKENS))
    absorbed = 2.0 * (latent + LATENT_DIM)
    expanded = 2.0 * (nope + ROPE_DIM + value)
    per_pair = np.where(dense > 0, expanded, absorbed)
    gathered = np.where(dense > 0, shape["batch"] * kv, tokens * attended)
    indexed = shape["has_index"] * np.where(dense > 0, 0.0, 1.0)
    scored_with = np.where(q > 1.0, shape["batch"] * kv, kv)
    return {
        "tokens": tokens,
        "projection_flops": 2.0 * tokens * weights,
        "weight_bytes": weights * shape["weight_bytes"],
        "index_flops": 2.0 * tokens * mean_kv * index_heads * INDEX_DIM * indexed,
        "index_bytes": shape["batch"] * kv * INDEX_ENTRY_BYTES * indexed,
        "score_bytes": tokens * scored_with * SCORE_BYTES * indexed,
        "attention_flops": tokens * attended * heads * per_pair,
        "latent_bytes": gathered * latent * shape["element_bytes"],
        "least_bytes": np.minimum(gathered, shape["batch"] * kv) * latent * shape["element_bytes"],
    }


def sparse_time_s(
    parameters: SparseParameters, device: HardwareProfile, shape: Shape, *, cold: bool = True
) -> Array:
    """Seconds of one layer's attention module. Shape: that of the amounts broadcast."""
    p = parameters
    w = module_work(shape)
    bandwidth = device.hbm_bytes_per_s * p.bandwidth_fraction
    peak = tensor_peak(device, "bf16")
    peak8 = tensor_peak(device, "fp8")
    product_peak = np.where(np.less(shape["weight_bytes"], 1.5), peak8, peak)
    products = overlapped(
        w["projection_flops"] / (product_peak * p.tensor_fraction),
        w["weight_bytes"] / bandwidth,
        p.unhidden_fraction,
    )
    index = overlapped(
        w["index_flops"] / (peak8 * p.index_fraction),
        w["index_bytes"] / bandwidth,
        p.unhidden_fraction,
    )
    scores = p.score_passes * w["score_bytes"] / device.hbm_bytes_per_s
    heads = np.asarray(shape["n_heads"], dtype=np.float64)
    filled = np.ceil(heads / p.head_block) * p.head_block / heads
    attention = overlapped(
        filled * w["attention_flops"] / (peak * p.attention_fraction),
        w["latent_bytes"] / (device.hbm_bytes_per_s * p.gather_fraction),
        p.unhidden_fraction,
    )
    own = p.launch_s + p.head_s * shape["n_heads"] + p.token_s * w["tokens"]
    seconds = own + products + index + scores + attention
    if not cold:
        captured = CAPTURED_BATCH[0 if device.memory_bytes < LARGE_MEMORY_BYTES else 1]
        decode = np.equal(shape["q_len"], 1.0)
        beyond = decode & np.greater(shape["batch"], captured)
        eager = (
            p.eager_s
            + np.where(np.less(shape["weight_bytes"], 1.5), p.eager_fp8_s, 0.0)
            + np.where(np.less(shape["element_bytes"], 1.5), p.eager_fp8_cache_s, 0.0)
        )
        host = np.where(decode, np.where(beyond, p.uncaptured_s, 0.0), eager)
        seconds = np.maximum(seconds, host)
    flops = w["projection_flops"] + w["index_flops"] + w["attention_flops"]
    n_bytes = w["weight_bytes"] + w["index_bytes"] + w["least_bytes"]
    return limited(seconds, flops, peak8, n_bytes, device, cold)


def _time(
    parameters: SparseParameters, device: HardwareProfile, shape: Shape, variant: str, cold: bool
) -> Array:
    return sparse_time_s(parameters, device, shape, cold=cold)


def _work(device: HardwareProfile, shape: Shape, variant: str) -> Work:
    w = module_work(shape)
    # fp8 work counted as the bf16 FLOPs that take as long.
    peak = tensor_peak(device, "bf16")
    gain = peak / tensor_peak(device, "fp8")
    projections = w["projection_flops"] * np.where(np.less(shape["weight_bytes"], 1.5), gain, 1.0)
    flops = projections + w["index_flops"] * gain + w["attention_flops"]
    n_bytes = w["weight_bytes"] + w["index_bytes"] + w["least_bytes"]
    return Work(flops, peak, n_bytes)


def _priors(kernel: str, variant: str) -> dict[str, Prior]:
    if variant == "context":
        return CONTEXT_PRIORS
    # Modules that reuse an earlier layer's choice start few kernels: the host keeps up.
    return PRIORS if "skip" in kernel else GENERATION_PRIORS


SHAPE = (
    "batch", "q_len", "prefix", "n_heads", "hidden", "q_rank", "nope_dim", "value_dim",
    "index_heads", "has_index", "dense", "weight_bytes", "element_bytes",
)  # fmt: skip
KIND = KernelKind(
    name="sparse_attention",
    parameters=SparseParameters,
    shape=SHAPE,
    variants=("generation", "context"),
    priors=_priors,
    structure=lambda kernel, variant: {"head_block": 64.0 if "flashmla" in kernel else 1.0},
    time_s=_time,
    work=_work,
)

"""Seconds of a mixture of experts' matrix products, from physical parameters.

T tokens choose k of E experts; this GPU holds E_l experts of inner size I in a model of width H.
Two grouped products run one after the other, gate and up (N = 2 I, K = H), then down (N = H,
K = I). Each hit expert with L tokens needs ceil(L / R) tiles of R rows and C columns; with S SMs

    per CTA   K max(2 R C S / (q e_c peak), C a / r) + t_tile
    compute   waves(tiles * N / C / S) per CTA
    memory    (hit experts' weights + activations) / (e_b bw)
    after     what the kernel after a product (activation, weighted sum) passes, / (e_b bw)
    time      t0 + sum over both of (longer + u shorter + after) + t_expert hit + t_row assigned

R x C is the best of 16, 32, 64, ... up to ``tile_rows`` rows, as a tuned library picks it: with any
one of them more tokens never take less time, so neither do they with the best. A kernel that has
tuned tiles for some shapes only takes its defaults for the others, of a tensor rate lower by q
(see ``moe_tiles``).

Loads come from ``routing``: random, dealt out evenly, or a power law with this GPU the busiest one,
as in the published tables. Activations of all T k assignments pass DRAM, also those of experts that
other GPUs hold: Triton kernels keep their rows and skip the products. FlashInfer's sort them out
first and pass what this GPU's experts get.

What is ignored: the router, shared experts (dense products of their own), exchange between GPUs.
"""

from dataclasses import dataclass

import numpy as np

from costmodel.hardware import HardwareProfile
from costmodel.kernels import moe_tiles
from costmodel.kernels.kinds import KernelKind, Shape, Work, peak_of
from costmodel.kernels.moe_tiles import Tile, tiles
from costmodel.kernels.physics import (
    Prior,
    clock_ratio,
    element_bytes,
    limited,
    overlapped,
    tensor_peak,
    units,
    waves,
)
from costmodel.kernels.routing import loads
from costmodel.operation import Array

#: Passes over a product's outputs by the kernel after it: the activation reads them all and writes
#: half, the weighted sum reads them all and writes one of k.
AFTER_PASSES = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeParameters:
    """One kernel family of grouped expert products.

    launch_s            start of the kernels (sorting, two products, activation, sum), t0
    bandwidth_fraction  attained share of DRAM bandwidth, e_b
    tensor_fraction     attained share of the dense peak, e_c
    stream_bytes_per_s  what one SM streams from the cache at 1.8 GHz, r
    tile_rows           most rows of a tile
    tile_s              prologue and epilogue of one tile, t_tile
    wave_rounding       0 perfect sharing .. 1 whole waves
    expert_s            more per expert hit
    row_s               more per assignment: permutation and weighted sum
    unhidden_fraction   share of the shorter of compute and memory that nothing hides, u
    eager_s             host time per call; only in tables made without a captured graph
    default_share       tensor rate of default tiles over that of tuned ones, q
    tile_rule           which tiles are taken (``moe_tiles``); not fitted
    local_rows          1 where rows of other GPUs' experts are left out; not fitted
    """

    launch_s: float
    bandwidth_fraction: float
    tensor_fraction: float
    stream_bytes_per_s: float
    tile_rows: float
    tile_s: float
    wave_rounding: float
    expert_s: float
    row_s: float
    unhidden_fraction: float
    eager_s: float = 0.0
    default_share: float = 1.0
    tile_rule: float = moe_tiles.BEST
    local_rows: float = 0.0


PRIORS: dict[str, Prior] = {
    "launch_s": Prior(3e-5, 0.6, 2e-6, 4e-4, "start of the kernels"),
    "bandwidth_fraction": Prior(0.8, 0.15, 0.2, 1.0, "attained share of DRAM bandwidth"),
    "tensor_fraction": Prior(0.5, 0.35, 0.08, 1.0, "attained share of the dense peak"),
    "stream_bytes_per_s": Prior(8e10, 0.6, 5e9, 1e12, "one SM from the cache, at 1.8 GHz"),
    "tile_rows": Prior(100.0, 0.4, 16.0, 256.0, "most rows of a tile"),
    "tile_s": Prior(1.5e-6, 0.6, 1e-8, 2e-5, "prologue and epilogue of a tile"),
    "wave_rounding": Prior(0.4, 0.5, 0.02, 1.0, "0 perfect sharing, 1 whole waves"),
    "expert_s": Prior(5e-8, 1.2, 1e-10, 5e-6, "more per expert hit"),
    "row_s": Prior(1e-9, 1.2, 1e-11, 1e-7, "more per assignment"),
    "unhidden_fraction": Prior(0.3, 0.5, 0.001, 1.0, "share of the shorter activity not hidden"),
    "eager_s": Prior(2e-6, 2.0, 1e-7, 1e-3, "host time per call, no captured graph"),
}

#: What kernels with tuned tiles for some shapes add.
DEFAULT_TILE_PRIORS: dict[str, Prior] = PRIORS | {
    "default_share": Prior(0.8, 0.2, 0.3, 1.0, "tensor rate of default tiles over tuned ones"),
}


def moe_time_s(
    parameters: MoeParameters,
    device: HardwareProfile,
    tokens: Array,
    hidden: Array,
    inner: Array,
    top_k: Array,
    n_experts: Array,
    local_experts: Array,
    dtype: str = "bf16",
    *,
    skew: Array = 0.0,
    dealt: Array = 0.0,
    leftovers_first: Array = 0.0,
    cold: bool = True,
) -> Array:
    """Seconds of one layer's routed experts on one GPU. Shape: that of the arguments broadcast.

    ``inner`` is this GPU's share of the experts' inner size, ``dtype`` a variant of the kind;
    ``skew``, ``dealt`` and
    ``leftovers_first`` say how tokens are routed (see ``routing``).
    """
    routing = {"skew": skew, "dealt": dealt, "leftovers_first": leftovers_first, "inner": inner}
    sizes = (tokens, top_k, n_experts, local_experts)
    up = grouped_product_time_s(
        parameters, device, 2.0 * inner, hidden, *sizes, dtype, **routing, cold=cold
    )
    down = grouped_product_time_s(
        parameters, device, hidden, inner, *sizes, dtype, **routing, cold=cold
    )
    seconds: Array = up + down
    if not cold and parameters.eager_s:
        seconds = np.maximum(seconds, parameters.eager_s)
    return seconds


def grouped_product_time_s(
    parameters: MoeParameters,
    device: HardwareProfile,
    n: Array,
    k: Array,
    tokens: Array,
    top_k: Array,
    n_experts: Array,
    local_experts: Array,
    dtype: str = "bf16",
    *,
    skew: Array = 0.0,
    dealt: Array = 0.0,
    leftovers_first: Array = 0.0,
    inner: Array = 0.0,
    cold: bool = True,
) -> Array:
    """Seconds of one of the two grouped products, [rows, k] times [k, n] per expert.

    ``inner`` tells whether the kernel has tuned tiles for the shape; 0 is none.

    Half of what both pay together (sorting, permutation, start) is counted here.
    """
    p = parameters
    width = element_bytes(dtype)
    peak = tensor_peak(device, "fp8" if width == 1.0 else dtype)
    classes = loads(
        tokens,
        top_k,
        n_experts,
        local_experts,
        skew,
        dealt=dealt,
        leftovers_first=leftovers_first,
    )
    hit: Array = sum((c for c, _ in classes), np.float64(0.0))
    assigned: Array = sum((c * load for c, load in classes), np.float64(0.0))
    passed = assigned if p.local_rows else np.asarray(tokens, dtype=np.float64) * top_k
    weights = hit * n * k * width
    compute: Array = np.float64(np.inf)
    shape = (tokens, local_experts, inner)
    for tile in tiles(p.tile_rule, p.tile_rows, p.default_share, shape, device.name, dtype):
        count: Array = sum((c * np.ceil(load / tile.rows) for c, load in classes), np.float64(0.0))
        product = _product_s(p, device, tile, count, (n, k), peak, width)
        compute = np.minimum(compute, np.where(tile.allowed, product, np.inf))
    moved = weights + passed * (n + k) * 2.0
    memory = moved / (p.bandwidth_fraction * device.hbm_bytes_per_s)
    shared = 0.5 * (p.launch_s + p.expert_s * hit + p.row_s * passed)
    after = passed * n * (AFTER_PASSES * 2.0 / (p.bandwidth_fraction * device.hbm_bytes_per_s))
    seconds = shared + after + overlapped(compute, memory, p.unhidden_fraction)
    return limited(seconds, 2.0 * n * k * assigned, peak, weights, device, cold)


def _product_s(
    p: MoeParameters,
    device: HardwareProfile,
    tile: Tile,
    n_tiles: Array,
    size: tuple[Array, Array],
    peak: float,
    width: float,
) -> Array:
    columns, depth = size
    sms = units(device)
    stream = p.stream_bytes_per_s * clock_ratio(device)
    per_k = np.maximum(
        2.0 * tile.rows * tile.columns * sms / (tile.share * p.tensor_fraction * peak),
        tile.columns * (width / stream),
    )
    ctas = n_tiles * np.ceil(columns / tile.columns)
    seconds: Array = waves(ctas / sms, p.wave_rounding) * (depth * per_k + p.tile_s)
    return seconds


def _time(
    parameters: MoeParameters, device: HardwareProfile, shape: Shape, variant: str, cold: bool
) -> Array:
    tokens, hidden, inner, top_k, n_experts, local = (shape[name] for name in SHAPE[:6])
    sizes = (tokens, hidden, inner, top_k, n_experts, local)
    return moe_time_s(parameters, device, *sizes, variant, **_routing(shape), cold=cold)


def _routing(shape: Shape) -> dict[str, Array]:
    return {name: shape.get(name, 0.0) for name in SHAPE[6:]}


def _work(device: HardwareProfile, shape: Shape, variant: str) -> Work:
    sizes = (shape[name] for name in ("tokens", "top_k", "n_experts", "local_experts"))
    classes = loads(*sizes, **_routing(shape))
    hit: Array = sum((c for c, _ in classes), np.float64(0.0))
    assigned: Array = sum((c * load for c, load in classes), np.float64(0.0))
    weights = 3.0 * shape["hidden"] * shape["inner"] * element_bytes(variant)
    flops = 6.0 * shape["hidden"] * shape["inner"] * assigned
    return Work(flops, peak_of(device, variant), np.minimum(hit, assigned) * weights)


def _structure(kernel: str, variant: str) -> dict[str, float]:
    local_rows = float("flashinfer" in kernel)
    return {"tile_rule": moe_tiles.tile_rule(kernel), "local_rows": local_rows}


def _priors(kernel: str, variant: str) -> dict[str, Prior]:
    return PRIORS if moe_tiles.tile_rule(kernel) == moe_tiles.BEST else DEFAULT_TILE_PRIORS


SHAPE = (
    "tokens", "hidden", "inner", "top_k", "n_experts", "local_experts",
    "skew", "dealt", "leftovers_first",
)  # fmt: skip
KIND = KernelKind(
    name="moe_gemm",
    parameters=MoeParameters,
    shape=SHAPE,
    variants=("bf16", "fp8", "fp8_block"),
    priors=_priors,
    structure=_structure,
    time_s=_time,
    work=_work,
)

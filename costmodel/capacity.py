"""The largest batch and context that fit, and the fewest GPUs: solved, not scanned.

Memory is affine in the batch beyond one prefill chunk, so the largest batch is read off two points
and checked at its neighbours; the largest context is bracketed with whole grids evaluated at once.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import NotApplicableError
from costmodel.layout import holding_operations
from costmodel.memory import memory_of
from costmodel.model import Model
from costmodel.operation import Array

_MAX_BATCH = float(2**24)
_MAX_CONTEXT = float(2**30)
#: Shares of a bracket that are tried, and the contexts around where memory would cross the limit.
_EVENLY = np.linspace(0.0, 1.0, 129)
_NEAR = np.arange(-64.0, 65.0)
TP_CANDIDATES = (1, 2, 4, 8, 16, 32, 64)

Peak = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


def solve_max_batch(
    peak: Peak, capacity: float, context: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Largest batch that fits, per context; 0 where not even one sequence does.

    ``peak(batch, context)`` takes broadcastable arrays. Memory is affine in the batch once it
    exceeds one prefill chunk: the answer is read off two large batches, then walked to the
    exact edge.
    """
    c = np.asarray(context, dtype=np.float64)[..., None]
    probe = peak(np.array([1.0, 2.0, 2.0**21, 2.0**22]), c)
    slope_far = (probe[..., 3] - probe[..., 2]) / 2.0**21
    far = np.floor((capacity - probe[..., 2]) / slope_far + 2.0**21)
    slope_near = probe[..., 1] - probe[..., 0]
    near = np.floor((capacity - probe[..., 0]) / slope_near + 1.0)
    guess = np.clip(np.where(far > 2, far, near), 0.0, _MAX_BATCH)
    # Bracket with the guesses and their neighbours; halve only where none was the edge.
    tried = np.clip(np.stack([guess, guess + 1, near, near + 1], axis=-1), 1.0, _MAX_BATCH)
    fits = peak(tried, c) <= capacity
    low = np.where(fits, tried, 0.0).max(axis=-1)
    high = np.where(fits, _MAX_BATCH, tried).min(axis=-1)
    while np.any(high - low > 1):
        middle = np.floor((low + high) / 2)
        fits = (middle >= 1) & (peak(np.maximum(middle, 1.0)[..., None], c)[..., 0] <= capacity)
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return np.where(probe[..., 0] <= capacity, np.maximum(low, 1.0), 0.0)


def solve_max_context(
    peak: Peak, capacity: float, batch: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Largest context that fits, per batch; 0 where none does, infinity where memory does not grow.

    A cache's size may saw (a block is quantised every R tokens), so the answer is an edge: it
    fits and the next token does not. A grid over all contexts brackets it; memory grows nearly
    straight from there, so the next grid has every context around where it would cross, and the
    bracket evenly: two evaluations are usually enough.
    """
    b = np.asarray(batch, dtype=np.float64)[..., None]
    every = np.floor(_MAX_CONTEXT**_EVENLY)
    grid: NDArray[np.float64] = np.broadcast_to(every, (*b.shape[:-1], every.size))
    bytes_ = peak(b, grid)
    first_fits, last_fits = bytes_[..., 0] <= capacity, bytes_[..., -1] <= capacity
    while True:
        low, high, low_bytes, high_bytes = _bracket(grid, bytes_, capacity)
        if not np.any(high - low > 1):
            break
        grown = np.maximum(high_bytes - low_bytes, 1.0)
        share = np.clip((capacity - low_bytes) / grown, 0.0, 1.0)
        near = np.floor(low + share * (high - low)) + _NEAR
        even = np.floor(low + (high - low) * _EVENLY)
        grid = np.sort(np.clip(np.concatenate([even, near], axis=-1), low, high), axis=-1)
        bytes_ = peak(b, grid)
    return np.where(last_fits, np.inf, np.where(first_fits, low[..., 0], 0.0))


def _bracket(
    grid: NDArray[np.float64], bytes_: NDArray[np.float64], capacity: float
) -> tuple[NDArray[np.float64], ...]:
    """The last point of a sorted grid that fits and the next that does not, with their bytes.

    The first point counts as fitting, the last as not.
    """
    fits = (bytes_ <= capacity) | (grid == grid[..., :1])
    fits &= grid < grid[..., -1:]
    last = fits.shape[-1] - 1 - np.argmax(fits[..., ::-1], axis=-1)[..., None]
    ends = (np.take_along_axis(a, i, axis=-1) for i in (last, last + 1) for a in (grid, bytes_))
    low, low_bytes, high, high_bytes = ends
    return low, high, low_bytes, high_bytes


def peak_bytes(model: Model, batch: Array, context: Array, output: Array) -> NDArray[np.float64]:
    """Peak bytes of one GPU."""
    point = model.point(batch, context, output)
    compressed = model.run.stack.prompt_operations(
        replace(point, prompt_tokens=context, cached_tokens=context)
    )
    prefill = (*compressed, *holding_operations(model.run, point, decode=False))
    shape = np.broadcast_shapes(np.shape(batch), np.shape(context), np.shape(output))
    memory = memory_of(model.run, point, output, prefill)
    return np.broadcast_to(np.asarray(memory.peak_bytes), shape)


def solve(
    model: Model,
    batch: NDArray[np.float64],
    context: NDArray[np.float64],
    output: NDArray[np.float64],
    out: dict[str, NDArray[np.float64]],
) -> None:
    """Fill the solved metrics in place. Each distinct input is solved once."""
    pairs, where = np.unique(np.stack([context, output]), axis=1, return_inverse=True)
    solved = solve_max_batch(
        lambda b, c: peak_bytes(model, b, c, pairs[1][:, None]), model.capacity_bytes, pairs[0]
    )
    out["max_batch"][:] = solved[where.ravel()]
    pairs, where = np.unique(np.stack([batch, output]), axis=1, return_inverse=True)
    solved = solve_max_context(
        lambda b, c: peak_bytes(model, b, c, pairs[1][:, None]), model.capacity_bytes, pairs[0]
    )
    out["max_context_tokens"][:] = solved[where.ravel()]
    out["min_gpus"][:] = _min_gpus(model, batch, context, output, out["fits"] > 0)


def _min_gpus(
    model: Model, batch: Array, context: Array, output: Array, fits: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Smallest tensor-parallel degree that holds the point; NaN where none of them does.

    ``fits``: whether the point fits the model's own degree.
    """
    found = np.full(np.shape(batch), np.nan)
    for tp in TP_CANDIDATES:
        try:
            sharded = model.sharded(tp)
        except NotApplicableError:
            continue
        ok = fits
        if sharded is not model:
            ok = peak_bytes(sharded, batch, context, output) <= model.capacity_bytes
        found = np.where(np.isnan(found) & ok, float(tp), found)
        if not np.any(np.isnan(found)):
            break
    return found

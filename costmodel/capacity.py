"""The largest batch and context that fit, and the fewest GPUs: solved, not scanned.

Memory is affine in the batch beyond one prefill chunk, so the largest batch is read off two points
and checked at its neighbours; the largest context is bracketed with whole grids evaluated at once.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import NotApplicableError
from costmodel.memory import memory_of
from costmodel.model import Model
from costmodel.operation import Array

_MAX_BATCH = float(2**24)
_MAX_CONTEXT = float(2**30)
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
    fits and the next token does not. Grids of 257 contexts are evaluated at once, four times.
    """
    b = np.asarray(batch, dtype=np.float64)[..., None]
    low = np.ones(b.shape)
    high = np.full(b.shape, _MAX_CONTEXT)
    steps = np.linspace(0.0, 1.0, 257)
    ends = peak(b, np.concatenate([low, high], axis=-1)) <= capacity
    first_fits, last_fits = ends[..., 0], ends[..., 1]
    logarithmic = True
    while np.any(high - low > 1):
        grid = low * (high / low) ** steps if logarithmic else low + (high - low) * steps
        grid = np.floor(np.maximum(grid, low))
        grid[..., -1:] = high
        fits = peak(b, grid) <= capacity
        fits[..., 0] = True
        fits[..., -1] = False
        edge = fits.shape[-1] - 1 - np.argmax(fits[..., ::-1], axis=-1)[..., None]
        new_low = np.take_along_axis(grid, edge, axis=-1)
        after = np.where(grid > new_low, grid, np.inf).min(axis=-1, keepdims=True)
        low, high = new_low, np.minimum(after, high)
        logarithmic = False
    return np.where(last_fits, np.inf, np.where(first_fits, low[..., 0], 0.0))


def peak_bytes(model: Model, batch: Array, context: Array, output: Array) -> NDArray[np.float64]:
    """Peak bytes of one GPU."""
    point = model.point(batch, context, output)
    prefill = model.prefill(batch, context, output)
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
    out["min_gpus"][:] = _min_gpus(model, batch, context, output)


def _min_gpus(model: Model, batch: Array, context: Array, output: Array) -> NDArray[np.float64]:
    """Smallest tensor-parallel degree that holds the point; NaN where none of them does."""
    found = np.full(np.shape(batch), np.nan)
    for tp in TP_CANDIDATES:
        try:
            sharded = model.sharded(tp)
        except NotApplicableError:
            continue
        ok = peak_bytes(sharded, batch, context, output) <= model.capacity_bytes
        found = np.where(np.isnan(found) & ok, float(tp), found)
        if not np.any(np.isnan(found)):
            break
    return found

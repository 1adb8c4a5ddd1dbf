"""Peaks and capacity.

    peak = weights + state by tier + the largest transient of the phase + what the engine reserves

Capacity is solved: memory is affine in the batch beyond one prefill chunk, so the largest batch is
read off two points and checked at its neighbours; the largest context is bracketed with whole
grids evaluated at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from costmodel.architecture import MixerGroup
from costmodel.layout import Execution, decode_operations, prefill_operations
from costmodel.methods.base import State
from costmodel.operation import Array, Operations
from costmodel.workload import Point

_MAX_BATCH = float(2**24)
_MAX_CONTEXT = float(2**30)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Memory:
    """Bytes on one GPU (host where named), for the whole batch; the workload's shape."""

    weights_bytes: Array
    state_bytes: Array
    state_host_bytes: Array
    state_allocated_bytes: Array
    peak_prefill_bytes: Array
    peak_decode_bytes: Array

    @property
    def peak_bytes(self) -> Array:
        """The larger of the two phases."""
        return np.maximum(self.peak_prefill_bytes, self.peak_decode_bytes)


def state_of(run: Execution, point: Point) -> tuple[Array, Array, Array]:
    """(device, host, allocated) bytes of all layers with ``point.cached_tokens`` cached."""
    device: Array = np.float64(0.0)
    host: Array = np.float64(0.0)
    allocated: Array = np.float64(0.0)
    for group in run.mixer_groups:
        state = run.stack.state(group, point)
        device, host = device + state.device, host + state.host
        allocated = allocated + _allocated(run, group, point, state)
    return device, host, allocated


def _allocated(run: Execution, group: MixerGroup, point: Point, state: State) -> Array:
    """What the method sets aside, or what the engine does where the method leaves it open."""
    own = state.allocated
    if own is not None and not np.any(np.isnan(own)):
        return own
    room = state.device
    if group.mixer.HAS_KV:
        more = run.stack.state(group, point.at(_room_tokens(point))).device
        room = np.maximum(room, more)
    return room if own is None else np.where(np.isnan(own), room, own)


def _room_tokens(point: Point) -> Array:
    """Tokens for which the engine has made room when ``point.cached_tokens`` are cached."""
    engine = point.engine
    if engine.kv_growth == "preallocated":
        return point.reserved_tokens
    if engine.kv_growth == "paged" and engine.block_tokens > 1:
        return np.ceil(point.cached_tokens / engine.block_tokens) * engine.block_tokens
    return point.cached_tokens


def largest_transient(operations: Operations) -> Array:
    """Bytes beyond weights and state that the neediest operation has alive."""
    out: Array = np.float64(0.0)
    for op in operations:
        out = np.maximum(out, op.transient_bytes)
    return out


def memory_of(
    run: Execution,
    point: Point,
    output_tokens: Array,
    prefill: Operations | None = None,
    decode: Operations | None = None,
    decode_transient_bytes: Array = 0.0,
) -> Memory:
    """State after the prompt, and the peaks of both phases (the decode peak after the last token).

    ``prefill`` and ``decode`` are operations when the caller has them already; what ``decode``
    leaves out may be given as its largest transient.
    """
    engine = point.engine
    prompt = point.at(point.prompt_tokens)
    device, host, allocated = state_of(run, prompt)
    last = point.at(point.prompt_tokens + output_tokens)
    _, _, allocated_last = state_of(run, last)
    weights = run.weights_bytes
    reserved = engine.reserved_bytes[0 if run.tp == 1 else 1]
    fixed = weights + reserved
    prefill = prefill_operations(run, prompt) if prefill is None else prefill
    decode = decode_operations(run, last) if decode is None else decode
    transient = np.maximum(decode_transient_bytes, largest_transient(decode))
    return Memory(
        weights_bytes=weights,
        state_bytes=device,
        state_host_bytes=host,
        state_allocated_bytes=allocated,
        peak_prefill_bytes=fixed + allocated + largest_transient(prefill),
        peak_decode_bytes=fixed + np.maximum(allocated, allocated_last) + transient,
    )


def peak_bytes(run: Execution, point: Point, output_tokens: Array) -> Array:
    """The larger peak of both phases."""
    return memory_of(run, point, output_tokens).peak_bytes


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
    low = np.zeros_like(guess)
    high = np.full_like(guess, _MAX_BATCH)
    # Bracket with the guess and its neighbours; halve only where the guess was not the edge.
    for candidate in (guess, guess + 1, near, near + 1):
        candidate = np.clip(candidate, 1.0, _MAX_BATCH)
        fits = peak(candidate[..., None], c)[..., 0] <= capacity
        low = np.where(fits, np.maximum(low, candidate), low)
        high = np.where(fits, high, np.minimum(high, candidate))
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
    first_fits = peak(b, low)[..., 0] <= capacity
    last_fits = peak(b, high)[..., 0] <= capacity
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

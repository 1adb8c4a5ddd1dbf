"""Peaks of memory.

peak = weights + state by tier + the largest transient of the phase + what the engine reserves

Steps of our own kernels keep room of their own besides (``costmodel.fused_room``).
"""

from dataclasses import dataclass

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.fused_room import alive_bytes, room_bytes
from costmodel.layout import Execution, holding_operations
from costmodel.methods.base import State
from costmodel.operation import Array, Operations
from costmodel.workload import Point


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


def largest_transient(operations: Operations, n_units: float = 1.0) -> Array:
    """Bytes beyond weights and state that the neediest operation has alive, on so many SMs."""
    out: Array = np.float64(0.0)
    for op in operations:
        out = np.maximum(out, alive_bytes(op, n_units))
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
    # a CPU has no context; what libraries keep for themselves is not the engine's to reserve
    reserved = 0.0 if run.hardware.is_cpu else engine.reserved_bytes[0 if run.tp == 1 else 1]
    fixed = weights + reserved
    prefill = holding_operations(run, prompt, decode=False) if prefill is None else prefill
    decode = holding_operations(run, last, decode=True) if decode is None else decode
    sms = float(run.hardware.n_units or 100)
    transient = np.maximum(decode_transient_bytes, largest_transient(decode, sms))
    return Memory(
        weights_bytes=weights,
        state_bytes=device,
        state_host_bytes=host,
        state_allocated_bytes=allocated,
        peak_prefill_bytes=fixed + allocated + largest_transient(prefill, sms),
        peak_decode_bytes=fixed
        + np.maximum(allocated, allocated_last)
        + room_bytes(decode, sms)
        + transient,
    )

"""Runs one point in this process and returns what was observed. Called in a worker.

    build weights -> state: fill exact caches layer by layer, read their storages
    -> prefill: empty caches, run the prompt, repeat   (TTFT; the first run counts FLOPs and memory)
    -> decode: put the caches back to T tokens, one step, repeat      (TPOT; on a GPU also captured)
    -> energy: steps over a window, where there is a counter

A canary before and after, and what others did to the device in between, say whether to believe it.
"""

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch

from measure.available_memory import Available
from measure.capture import captured_step, rewinding
from measure.devices.base import AbstractDevice, Call, Captured
from measure.devices.energy import EnergyReading, Unavailable, measure_energy
from measure.devices.open import open_device
from measure.flops import count_flops
from measure.live_memory import LiveBytes
from measure.memory_check import checked
from measure.observation_options import How
from measure.points import MeasurePoint
from measure.reliability import judged
from measure.sessions import Session, open_session
from measure.timing import FIXED_BUDGET, Budget, Sampler, Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Phase:
    """One phase: FLOPs and peak of the first run, then times."""

    flops: int | None = None
    peak_bytes: int | None = None
    memory: dict[str, int | None] | None = None
    timing: Timing | None = None


def observe(point: MeasurePoint, how: How | None = None) -> dict[str, Any]:
    """Measure ``point``; keys as the metrics of a record, with samples, statistics and quality."""
    how = how or How()
    if point.tp > 1:
        # every rank must make the same calls: nothing may depend on the time they take
        how = replace(how, budget=FIXED_BUDGET, energy_s=0.0)
    release()
    device = open_device(point.device, point.threads, pinned=point.tp == 1)
    source = device.energy_source()
    idle_w = None if isinstance(source, Unavailable) else source.watts()
    device.start_watching()
    canary_before = device.canary_s()
    session = open_session(point, device.device)
    memory = _memory_check(session, device, how)
    if "status" in memory:
        return memory
    state_bytes, state_host_bytes = session.state_bytes()
    session.prepare()

    if how.skips_prefill:
        prefill = _Phase()
        session.fill()
    else:
        prefill = _phase(session, device, session.prefill, session.clear, how.budget)
    session.mark()
    decode = _phase(session, device, session.decode, session.reset, how.budget)
    assert decode.timing is not None
    session.reset()
    captured, graph = _captured(session, device, point, how.budget)
    best = captured or decode.timing
    energy = _energy(session, device, source, graph.replay, best, how.energy_s, idle_w)
    timings = {} if prefill.timing is None else {"ttft_s": prefill.timing}
    timings["tpot_s"] = best
    if captured is not None:
        timings["tpot_eager_s"] = decode.timing
    watched, warnings = device.watched()
    joules = energy.joules_per_step()
    return {
        "weights_bytes": session.weights_bytes,
        "state_bytes": state_bytes,
        "state_host_bytes": state_host_bytes,
        "state_allocated_bytes": session.allocated_bytes,
        "peak_prefill_bytes": prefill.peak_bytes,
        "peak_decode_bytes": decode.peak_bytes,
        "executed_prefill_flops": prefill.flops,
        "executed_decode_flops": decode.flops,
        "ttft_s": None if prefill.timing is None else prefill.timing.statistics.median_s,
        "tpot_s": best.statistics.median_s,
        "tokens_per_s": point.batch / best.statistics.median_s,
        "energy_j_per_token": None if joules is None else joules / point.batch,
        "energy": energy.as_record(),
        "memory": {"prefill": prefill.memory, "decode": decode.memory},
        "graph_captured": captured is not None,
        "graph_reason": graph.reason,
        "graph_failed": graph.failed,
        "message": _message(how),
        **memory,
        **session.details(),
        **judged(
            timings,
            session.logits,
            canary=(canary_before, device.canary_s()),
            watched=watched,
            warnings=warnings,
        ),
    }


def _memory_check(session: Session, device: AbstractDevice, how: How) -> dict[str, Any]:
    """Compare on a device whose free memory only this process can see; the host's was before."""
    available = device.available_bytes() if device.name != "cpu" else None
    if how.needed_bytes is None or available is None:
        return {}
    limit = f"what the driver has free on {device.name}"
    # the weights are there already
    return checked(how.needed_bytes, Available(available + session.weights_bytes, limit))


def _phase(
    session: Session, device: AbstractDevice, call: Call, before: Call, budget: Budget | None
) -> _Phase:
    """Run ``call`` once, counting FLOPs and memory, then time it."""
    before()
    resident = session.weights_bytes + session.allocated_bytes
    device.start_peaks()
    with LiveBytes() as live:
        flops = count_flops(call, square=session.point.realisation == "reference")
    peaks = device.peaks()
    flush = device.flush(resident)

    def put_back() -> None:
        before()
        if flush is not None:
            flush()

    timing = _sampler(device, session).time(call, before=put_back, budget=budget)
    counted = resident + live.peak
    return _Phase(
        flops=flops,
        peak_bytes=(counted if peaks.allocated is None else peaks.allocated)
        + (peaks.overhead or 0),
        memory={
            "overhead_bytes": peaks.overhead,
            "counted_bytes": counted,
            "allocated_bytes": peaks.allocated,
            "reserved_bytes": peaks.reserved,
            "in_use_bytes": peaks.in_use,
        },
        timing=timing,
    )


def _sampler(device: AbstractDevice, session: Session) -> Sampler:
    """The device's clock; of several processes on a CPU the wall's, as a thread that waits for
    another does not work.
    """
    sampler = device.sampler()
    if session.point.tp == 1 or sampler.stopwatch is not None:
        return sampler
    return Sampler(name="wall", clock=sampler.wall)


def _captured(
    session: Session, device: AbstractDevice, point: MeasurePoint, budget: Budget | None
) -> tuple[Timing | None, Captured]:
    """Time a decode step as a replayed graph, where the best form is asked for and can be captured.

    Nothing of the point comes after it but the energy: a failed capture can disturb nothing else.
    """
    if not device.has_graphs:
        return None, Captured(replay=None, reason="a CPU has no launches to capture")
    if point.realisation != "best":
        return None, Captured(replay=None, reason="the reference form runs eagerly")
    captured = captured_step(session, device)
    if captured.replay is None:
        return None, captured
    flush = device.flush(session.weights_bytes + session.allocated_bytes)

    def put_back() -> None:
        session.reset()
        if flush is not None:
            flush()

    timing = device.sampler().time(captured.replay, before=put_back, budget=budget)
    return timing, captured


def _energy(
    session: Session,
    device: AbstractDevice,
    source: Any,
    graph: Call | None,
    timing: Timing,
    window_s: float,
    idle_w: float | None,
) -> EnergyReading:
    """Joules of decode steps. Replays go on to the end of the room, then count from T again; an
    eager step is put back after each, which is part of what the counter sees.
    """
    if window_s <= 0:
        return EnergyReading(status="unavailable", reason="not asked for")

    def eager() -> None:
        session.decode()
        session.reset()

    session.reset()
    return measure_energy(
        eager if graph is None else rewinding(graph, session),
        source,
        synchronize=device.synchronize,
        step_s=timing.statistics.median_s,
        idle_w=idle_w,
        window_s=window_s,
    )


def _message(how: How) -> str:
    if not how.skips_prefill:
        return ""
    return (
        f"the prompt was not run (predicted {how.predicted_ttft_s:.3g} s, at most "
        f"{how.max_prefill_s:g} s asked for): caches hold random tokens"
    )


def release() -> None:
    """Give memory of the last point back, for the next one in this process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

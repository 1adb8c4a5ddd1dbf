"""Runs one point in this process and returns what was observed. Called in a worker.

    build weights -> state: fill exact caches layer by layer, read their storages
    -> prefill: empty caches, run the prompt, repeat        (TTFT; the first run counts FLOPs)
    -> decode: put the caches back to T tokens, one step, repeat                         (TPOT)

A canary before and after, and the CPU use of others in between, say whether to believe it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from costmodel.errors import MeasurementError
from measure.canary import canary_s
from measure.engine import TORCH_DTYPES, Decoder, random_weights
from measure.flops import count_flops
from measure.load import ForeignLoad
from measure.methods.base import AbstractLayerCache
from measure.mixers import build_cache
from measure.mixers.base import LayerState
from measure.numerics import numerics_of
from measure.points import MeasurePoint
from measure.statistics import INVALID_FRACTION, NOISY_FRACTION, warnings_of
from measure.timing import Budget, Sampler, Timing

#: Canary after over canary before: beyond this the machine changed speed during the point.
CANARY_FRACTION = 0.10
#: Other work on the machine, in cores, above which a record warns.
FOREIGN_CORES = 0.10


def observe(point: MeasurePoint, budget: Budget | None = None) -> dict[str, Any]:
    """Measure ``point``; keys as the metrics of a record, with samples, statistics and quality."""
    torch.set_num_threads(point.threads)
    device, dtype = torch.device(point.device), TORCH_DTYPES[point.dtype]
    load = ForeignLoad()
    canary_before = canary_s()
    model = point.executed
    weights = random_weights(model, dtype, device, point.seed)
    room = point.context_tokens + point.output_tokens
    decoder = Decoder(model, weights, n_positions=room)
    state_bytes, state_host_bytes = _exact_state_bytes(point, dtype, device)
    caches = _caches(point, dtype, device, reserve_tokens=room)
    generator = torch.Generator(device=device).manual_seed(point.seed)
    shape = (point.batch, point.context_tokens)
    prompt = torch.randint(model.vocab_size, shape, generator=generator, device=device)
    sampler = Sampler.for_cpu(point.threads)

    run = _Run(decoder, caches, prompt)
    prefill_flops = count_flops(run.prefill)
    prefill = sampler.time(run.prefill, before=run.clear, budget=budget)
    run.mark()
    decode_flops = count_flops(run.decode)
    decode = sampler.time(run.decode, before=run.reset, budget=budget)
    run.reset()
    return {
        "weights_bytes": weights.nbytes,
        "state_bytes": state_bytes,
        "state_host_bytes": state_host_bytes,
        "state_allocated_bytes": sum(c.storage_bytes for c in caches),
        # Allocator peaks of a CPU process cannot be told from what libraries reserve.
        "peak_prefill_bytes": None,
        "peak_decode_bytes": None,
        "executed_prefill_flops": prefill_flops,
        "executed_decode_flops": decode_flops,
        "ttft_s": prefill.statistics.median_s,
        "tpot_s": decode.statistics.median_s,
        "energy_j_per_token": None,
        **_reliability(
            {"ttft_s": prefill, "tpot_s": decode}, run.logits, load, canary_before, canary_s()
        ),
    }


class _Run:
    """The decoder with its caches and inputs; ``logits`` of the last call."""

    def __init__(self, decoder: Decoder, caches: list[LayerState], prompt: Tensor) -> None:
        self.decoder, self.caches, self.prompt = decoder, caches, prompt
        self.token = prompt[:, -1:]
        self.snapshots: list[Any] = []
        self.logits = torch.empty(0)

    def clear(self) -> None:
        for cache in self.caches:
            cache.clear()

    def prefill(self) -> None:
        self.logits = self.decoder.prefill(self.prompt, self.caches)

    def mark(self) -> None:
        self.snapshots = [cache.snapshot() for cache in self.caches]

    def decode(self) -> None:
        self.logits = self.decoder.decode(self.token, self.caches)

    def reset(self) -> None:
        for cache, snapshot in zip(self.caches, self.snapshots, strict=True):
            cache.restore(snapshot)


def _caches(
    point: MeasurePoint, dtype: torch.dtype, device: torch.device, reserve_tokens: int
) -> list[LayerState]:
    mixers = [mixer for layer in point.executed.layers for mixer in layer.mixers]
    numerics = numerics_of(point.executed.family, d_model=point.executed.d_model)
    n_kv_layers, caches = sum(m.HAS_KV for m in mixers), []
    for index, mixer in enumerate(mixers):
        cache = build_cache(
            point.stack,
            mixer,
            batch=point.batch,
            dtype=dtype,
            device=device,
            reserve_tokens=reserve_tokens,
            fused=point.engine == "lccost",
        )
        if isinstance(cache, AbstractLayerCache):
            ordinal = sum(m.HAS_KV for m in mixers[:index])
            cache.place(ordinal, n_kv_layers, numerics.rope)
        caches.append(cache)
    return caches


def _exact_state_bytes(
    point: MeasurePoint, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """Bytes of the storages that hold T tokens and no spare room, on the device and on the host;
    one layer is alive at a time.
    """
    total = on_host = 0
    for cache in _caches(point, dtype, device, reserve_tokens=0):
        cache.fill(point.context_tokens, point.seed)
        if cache.storage_bytes != cache.held_bytes:
            raise MeasurementError(
                f"{point.stack.spec}: expected no spare room in an exact cache, got "
                f"{cache.storage_bytes} bytes for {cache.held_bytes}"
            )
        total += cache.storage_bytes
        on_host += cache.host_bytes if isinstance(cache, AbstractLayerCache) else 0
        cache.clear()
    return total, on_host


def _reliability(
    timings: dict[str, Timing],
    logits: Tensor,
    load: ForeignLoad,
    canary_before: float,
    canary_after: float,
) -> dict[str, Any]:
    """Status, validity with its reasons, samples and statistics."""
    foreign = load.foreign_cores()
    change = canary_after / canary_before - 1.0
    warnings = [
        f"{name}: {text}"
        for name, timing in timings.items()
        for text in warnings_of(timing.statistics, timing.samples)
    ]
    if foreign > FOREIGN_CORES:
        warnings.append(f"other work used {foreign:.2f} cores meanwhile")
    if abs(change) > CANARY_FRACTION:
        warnings.append(f"the machine changed speed: canary {change:+.0%} from before to after")
    spread = max(t.statistics.iqr_fraction for t in timings.values())
    finite = bool(torch.isfinite(logits).all())
    if not finite:
        warnings.append("logits are not finite")
    return {
        "status": "noisy" if spread > NOISY_FRACTION else "ok",
        "is_valid": finite and spread <= INVALID_FRACTION,
        "samples": {name: list(t.samples) for name, t in timings.items()},
        "statistics": {
            name: {
                **dataclasses.asdict(t.statistics),
                "timer": t.timer,
                "first_call_s": t.first_call_s,
                "warmups": t.warmups,
                "gated_blocks": t.gated,
                "forced_blocks": t.forced,
            }
            for name, t in timings.items()
        },
        "quality": {
            "warnings": warnings,
            "foreign_cores": foreign,
            "involuntary_switches": load.involuntary_switches(),
            "canary_before_s": canary_before,
            "canary_after_s": canary_after,
            "rss_peak_bytes": _rss_peak_bytes(),
        },
    }


def _rss_peak_bytes() -> int | None:
    """Most memory this process ever had resident, libraries included."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text("ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None

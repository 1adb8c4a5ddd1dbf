"""Whether to believe what was observed: status, validity with its reason, warnings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from measure.statistics import INVALID_FRACTION, JUDGED, NOISY_FRACTION, warnings_of
from measure.timing import Timing

#: Canary after over canary before: beyond this the machine changed speed during the point.
CANARY_FRACTION = 0.10


def judged(
    timings: Mapping[str, Timing],
    logits: Tensor,
    *,
    canary: tuple[float, float],
    watched: Mapping[str, Any],
    warnings: list[str],
) -> dict[str, Any]:
    """Keys of a record: status, is_valid, invalid_reason, samples, statistics, quality.

    ``noisy`` says that the times of a metric spread, that blocks were kept although others used the
    machine, or that the machine changed speed; the figures stand, and are worth a second look.
    """
    spread = max(t.statistics.iqr_fraction for name, t in timings.items() if name in JUDGED)
    change = canary[1] / canary[0] - 1.0
    doubts = [
        f"{name}: {text}"
        for name, timing in timings.items()
        for text in warnings_of(timing.statistics, timing.samples)
    ]
    forced = sum(t.forced for t in timings.values())
    if forced:
        doubts.append(f"{forced} blocks of samples were kept although others used the machine")
    if abs(change) > CANARY_FRACTION:
        doubts.append(f"the machine changed speed: canary {change:+.0%} from before to after")
    invalid = []
    if not torch.isfinite(logits).all():
        invalid.append("logits are not finite")
    if spread > INVALID_FRACTION:
        invalid.append(f"times spread by {spread:.0%} of the median")
    noisy = spread > NOISY_FRACTION or forced > 0 or abs(change) > CANARY_FRACTION
    return {
        "status": "noisy" if noisy else "ok",
        "is_valid": not invalid,
        "invalid_reason": "; ".join(invalid) or None,
        "samples": {name: list(t.samples) for name, t in timings.items()},
        "statistics": {name: _summary(t) for name, t in timings.items()},
        "quality": {
            "warnings": [*doubts, *warnings, *invalid],
            "canary_before_s": canary[0],
            "canary_after_s": canary[1],
            **watched,
        },
    }


def _summary(timing: Timing) -> dict[str, Any]:
    found = {
        **dataclasses.asdict(timing.statistics),
        "timer": timing.timer,
        "first_call_s": timing.first_call_s,
        "warmups": timing.warmups,
        "gated_blocks": timing.gated,
        "forced_blocks": timing.forced,
    }
    if timing.host_samples:  # seconds until a call returned: what the host needs to start it
        ordered = sorted(timing.host_samples)
        found["host_median_s"] = ordered[len(ordered) // 2]
    return found

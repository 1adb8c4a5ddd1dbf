"""What steps of ``kernels_gpu.py`` are held against: predictions, ceilings, required figures."""

from dataclasses import asdict
from typing import Any

import kernel_cases as made

from costmodel.architecture import MixerGroup
from costmodel.engines import load_engine
from costmodel.fused_kernels import work_of
from costmodel.hardware import HardwareProfile
from costmodel.kernels import time_operation
from costmodel.kernels.fused import arithmetic_s
from costmodel.methods.parse import parse_method
from costmodel.operation import Operation
from costmodel.workload import Point

#: Methods whose kernels must reach a share of the copy bandwidth, not only of their ceiling.
PLAIN = ("full", "fp8_kv", "streaming_llm")
#: Speed over bf16 SDPA at 128k x 8: required, aimed at.
FASTER = {"kivi:bits=2": (2.5, 4.0), "kivi:bits=4": (1.9, 2.7)}
CEILING_SHARE, COPY_SHARE, SCORING_COST = 0.75, 0.80, 0.10


def operation(spec: str, context: int, batch: int) -> Operation:
    """The step of one layer as the cost model has it, level ideal."""
    at = Point(
        batch=float(batch),
        prompt_tokens=float(context),
        cached_tokens=float(context),
        reserved_tokens=float(context + made.ROOM_TOKENS),
        dtype="bf16",
        kv_dtype="bf16",
        level="ideal",
        engine=load_engine("lccost"),
    )
    # the third of its model's caches, as in ``twin_case``
    group = MixerGroup(made.GEOMETRY, 1, (2,), 3)
    (step,) = parse_method(spec).resolved(context).decode(group, at)
    return step


def ceiling_bytes_per_s(step: Operation, copy: float, hardware: HardwareProfile) -> float:
    """The smaller of the copy bandwidth and what the kernel's arithmetic allows."""
    arithmetic = float(arithmetic_s(hardware, work_of(step, float(hardware.n_units or 100))))
    n_bytes = float(step.hbm_bytes)
    return n_bytes / max(n_bytes / copy, arithmetic)


def figures(
    spec: str, context: int, batch: int, copy: float, hardware: HardwareProfile
) -> dict[str, Any]:
    """What a step is held against, and what ``lccost calibrate --table`` builds it from again."""
    step = operation(spec, context, batch)
    return {
        "kernel": step.kernel,
        "method_spec": spec,
        "phase": "decode",
        "mixer": {"kind": "attention", **asdict(made.GEOMETRY)},
        "dtype": "bf16",
        "reserved_tokens": context + made.ROOM_TOKENS,
        "bytes": float(step.hbm_bytes),
        "copy_bytes_per_s": copy,
        "ceiling_bytes_per_s": ceiling_bytes_per_s(step, copy, hardware),
        "predicted_s": float(time_operation(step, hardware).mid_s),
    }


def is_judged(context: int, batch: int) -> bool:
    """Whether figures are required of a point."""
    return context >= 32_768 and batch >= 8


def unmeasured(
    records: list[dict[str, Any]], points: list[tuple[int, int]], methods: tuple[str, ...]
) -> list[str]:
    """Kernels at points of which figures are required and no record is there."""
    there = {(r["case"], r["context_tokens"], r["batch"]) for r in records if r["form"] == "fused"}
    return [
        f"{spec} at {context:,} x {batch}"
        for context, batch in points
        if is_judged(context, batch)
        for spec in methods
        if (spec, context, batch) not in there
    ]


def required(records: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """The figures required of the kernels, with whether they are met; only what was measured."""
    at = {(r["case"], r["form"], r["context_tokens"], r["batch"]): r for r in records}
    out = []
    for (name, form, context, batch), r in at.items():
        if form != "fused" or not is_judged(context, batch):
            continue
        where = f"{name} at {context:,} x {batch}"
        share = r["bytes_per_s"] / r["ceiling_bytes_per_s"]
        text = f"{where}: {share:.0%} of the ceiling ({CEILING_SHARE:.0%})"
        out.append((text, share >= CEILING_SHARE))
        if name in PLAIN:
            share = r["bytes_per_s"] / r["copy_bytes_per_s"]
            text = f"{where}: {share:.0%} of the copy bandwidth ({COPY_SHARE:.0%})"
            out.append((text, share >= COPY_SHARE))
        plain = at.get(("full", "kept", context, batch))
        if name == "h2o" and plain is not None:
            cost = r["seconds"] / plain["seconds"] - 1
            text = f"{where}: {cost:.0%} over plain decode of what is kept ({SCORING_COST:.0%})"
            out.append((text, cost <= SCORING_COST))
    sdpa = [
        r for (name, *rest), r in at.items() if name.startswith("sdpa") and rest[1:] == [131_072, 8]
    ]
    fastest = min((r["seconds"] for r in sdpa), default=None)
    for name, (least, aim) in FASTER.items():
        r = at.get((name, "fused", 131_072, 8))
        if r is not None and fastest is not None:
            ratio = fastest / r["seconds"]
            text = f"{name}: {ratio:.2f} x as fast as bf16 SDPA at 128k x 8 ({least}, aim {aim})"
            out.append((text, ratio >= least))
    return out

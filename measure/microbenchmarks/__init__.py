"""Times of the operation classes of ``costmodel.kernels.curves`` on a device of this machine.

Runs in a worker. What the weights and caches of a real pass do is imitated: buffers rotate through
a pool, so that every call finds cold data; what is reused in a real pass (activations, the unpacked
piece of a quantised cache) is reused here. No shape is one that a bundled model has.
"""

from typing import Any

import torch

from measure.devices.open import open_device
from measure.microbenchmarks import attention, dense, dropping, kivi, methods, recurrent
from measure.microbenchmarks.bench import Bench
from measure.microbenchmarks.plan import FULL, GPU, GPU_QUICK, QUICK, Plan
from measure.progress import progress

_PER_DTYPE = {
    "gemm": dense.gemm,
    "prefill attention": attention.prefill,
    "decode attention": attention.decode,
    "elementwise": dense.elementwise,
    "quantised cache": kivi.quantised_cache,
    "windowed attention": attention.windowed,
    "scored and banded prompts": dropping.prompts,
    "steps over kept tokens": dropping.steps,
    "other methods": methods.others,
    "convolutions": recurrent.convolutions,
    "scans": recurrent.scans,
}


def run(quick: bool, threads: int, device: str = "cpu") -> dict[str, Any]:
    """Measure everything; curves, peaks and the canary as plain data."""
    if device == "cpu":
        return run_plan(QUICK if quick else FULL, threads)
    return run_plan(GPU_QUICK if quick else GPU, threads, device)


def run_plan(plan: Plan, threads: int, device: str = "cpu") -> dict[str, Any]:
    """Measure what ``plan`` says."""
    opened = open_device(device, threads, pinned=False)
    before = opened.canary_s()
    with (
        opened.device,  # where every tensor below is made
        progress("calibrate", 1 + len(plan.dtypes) * len(_PER_DTYPE)) as report,
        torch.inference_mode(),
    ):
        bench = Bench(plan, opened)
        dense.stream(bench)
        if device != "cpu":
            dense.host_link(bench)
        dropping.selection(bench)
        report("stream, dispatch, selection")
        for dtype in plan.dtypes:
            for name, measure in _PER_DTYPE.items():
                measure(bench, dtype)
                report(f"{name} {dtype}")
    results = bench.results
    return {
        "curves": results.curves,
        "flops_per_s": results.flops_per_s,
        "cold_bytes_per_s": results.cold_bytes_per_s,
        "canary_before_s": before,
        "host_link_bytes_per_s": results.host_link_bytes_per_s,
        "device_title": torch.cuda.get_device_name(opened.device) if device != "cpu" else "cpu",
        "canary_after_s": opened.canary_s(),
        "timer": bench.sampler.name,
    }

"""Times of the operation classes of ``costmodel.kernels.curves`` on this machine's CPU.

Runs in a worker. What the weights and caches of a real pass do is imitated: buffers rotate through
a pool, so that every call finds cold data; what is reused in a real pass (activations, the unpacked
piece of a quantised cache) is reused here. No shape is one that a bundled model has.
"""

from typing import Any

import torch

from measure.canary import canary_s
from measure.microbenchmarks import attention, dense, dropping, kivi, methods, recurrent
from measure.microbenchmarks.bench import Bench
from measure.microbenchmarks.plan import FULL, QUICK, Plan
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


def run(quick: bool, threads: int) -> dict[str, Any]:
    """Measure everything; curves, peaks and the canary as plain data."""
    return run_plan(QUICK if quick else FULL, threads)


def run_plan(plan: Plan, threads: int) -> dict[str, Any]:
    """Measure what ``plan`` says."""
    torch.set_num_threads(threads)
    bench = Bench(plan, threads)
    before = canary_s()
    with (
        progress("calibrate", 1 + len(plan.dtypes) * len(_PER_DTYPE)) as report,
        torch.inference_mode(),
    ):
        dense.stream(bench)
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
        "canary_after_s": canary_s(),
        "timer": bench.sampler.name,
    }

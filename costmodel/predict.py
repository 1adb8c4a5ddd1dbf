"""The main entry: architecture, method, workload and hardware in, a Prediction out.

    predict(load_architecture("llama-3.1-8b"), "kivi:bits=2", Workload.of(1, [8192, 131072]),
            load_hardware("h100-sxm"))

Everything broadcasts: one call prices a whole sweep. Large workloads are evaluated in chunks that
stay in cache, so a million points need no more memory than their results.
"""

import numpy as np

from costmodel import capacity
from costmodel.architecture import Architecture
from costmodel.basis import weakest
from costmodel.chunks import chunks, distinct, in_threads
from costmodel.hardware import HardwareProfile
from costmodel.methods.stack import MethodStack
from costmodel.model import Model
from costmodel.options import Options
from costmodel.phase import BOUNDS
from costmodel.results import METRICS, Prediction
from costmodel.workload import Level, Workload

#: Metrics that are solved rather than evaluated.
SOLVED = ("max_batch", "max_context_tokens", "min_gpus")


def predict(
    architecture: Architecture,
    method: str | MethodStack,
    workload: Workload,
    hardware: HardwareProfile,
    *,
    dtype: str | None = None,
    weight_dtype: str = "checkpoint",
    level: Level = "ideal",
    tp: int = 1,
    engine: str | None = None,
    memory_fraction: float = 0.9,
    solve: bool = True,
) -> Prediction:
    """Price one model, method and device over a workload.

    ``engine`` defaults to vllm for ``ideal`` and transformers for ``reference`` (torch on a CPU).
    Operations take the times of kernel families fitted for it on this GPU (basis ``calibrated``),
    else of the nearest ones (``transferred``), else the prior. ``dtype`` defaults to the
    checkpoint's 16-bit type. ``solve=False`` skips ``max_batch``, ``max_context_tokens`` and
    ``min_gpus`` (NaN).

    Raises ``NotApplicableError`` where method, model and device do not go together,
    ``ConfigError`` for impossible options. Arrays in the result have ``workload.shape``.
    """
    options = Options(
        dtype=dtype,
        weight_dtype=weight_dtype,
        level=level,
        tp=tp,
        engine=engine,
        memory_fraction=memory_fraction,
    )
    model = Model.of(architecture, method, hardware, options)
    shape = workload.shape
    batch, context, output = (
        np.broadcast_to(a, shape).ravel()
        for a in (workload.batch, workload.context_tokens, workload.output_tokens)
    )
    size = batch.size
    # Pages that stay zero are never touched: a fifth of the metrics of a dense model on one GPU.
    out = {name: np.zeros(size) for name in METRICS if solve or name not in SOLVED}
    bounds = {name: np.zeros(size, dtype=np.intp) for name in ("prefill_bound", "decode_bound")}
    # What depends on the batch alone is priced once for every distinct batch.
    batches, where = distinct(batch)
    step = model.step(batches)

    def evaluate(part: slice) -> tuple[dict[str, float], frozenset[str]]:
        """Write one chunk's metrics and bounds; shares of its bases, why some are priors."""
        found = model.evaluate(batch[part], context[part], output[part], step.take(where[part]))
        for name, value in found.values.items():
            if np.ndim(value) or value != 0.0:
                out[name][part] = value
        for name, index in found.bounds.items():
            bounds[name][part] = index
        return found.bases, found.unfitted

    bases: dict[str, float] = {}
    unfitted: frozenset[str] = frozenset()
    for shares, reasons in in_threads(evaluate, chunks(size)):
        unfitted |= reasons
        for name, share in shares.items():
            bases[name] = bases.get(name, 0.0) + share
    if solve and size:
        capacity.solve(model, batch, context, output, out)
    else:
        out |= {name: np.broadcast_to(np.float64(np.nan), size) for name in SOLVED}
    names = np.array(BOUNDS)
    return Prediction(
        architecture=architecture,
        method=model.run.stack,
        workload=workload,
        hardware=hardware,
        level=level,
        engine=model.engine.name,
        dtype=model.dtype,
        weight_dtype=weight_dtype,
        tp=tp,
        memory_fraction=memory_fraction,
        metrics={k: out[k].reshape(shape) for k in METRICS},
        prefill_bound=names.take(bounds["prefill_bound"]).reshape(shape),
        decode_bound=names.take(bounds["decode_bound"]).reshape(shape),
        basis=weakest(bases, unfitted),
        unfitted=tuple(sorted(unfitted)),
    )

"""Kernels inside whole passes against the same kernels measured alone.

Kernel tables hold single kernels, replayed for milliseconds at boost clocks on constant data. In a
pass they run hotter and closer together:

    kernel in a pass    = its time + (factor - 1) (its time - t0)           factors above 1
                        = its time - (1 - factor) (its time - its roofline at the bandwidth that
                          its family attains) below: what a replayed graph saves, never the moving
                          of bytes
    factor              = compute_factor             kernels of a prompt (attention, scans)
                        = memory factor              kernels of a step (attention, scans)
                        = memory factor (1 - s) + compute_factor s      products, which are in both
                          s = i^2 / (i^2 + i0^2), i their FLOPs per byte
    pass                = sum of its kernels + n layers x layer_s + host time per step
    first token         = that pass + first_token_s

compute_factor is what sustained power and real operands cost where tensor cores bind; the memory
factors stay near 1 (streaming is not throttled, and prefetch into the next kernel pays for cold
caches). What draws power is multiplying, not what waits for what: s goes by the product alone and
not by which limit of the device binds it, so neither a better device nor less work ever takes
longer. The factors are the parameters of all engines' published runs of dense models, of which
``costmodel/data/serving.toml`` says what was fitted on how many runs and how far off unseen ones
were. Leaving any engine or any GPU out of that fit moves compute_factor between 1.14 and 1.40, the
factor on products in steps between 0.95 and 1.07, that on attention in steps between 0.30 and 0.54,
layer_s between 1.6 and 3.7 us, the host time per step between 0.21 and 0.58 ms and first_token_s
between 0.8 and 5.0 ms.
"""

import functools
import math
import tomllib
from dataclasses import dataclass
from typing import Any

import numpy as np

from costmodel.files import DATA
from costmodel.intervals import REACH
from costmodel.operation import Array, Operation
from costmodel.units import DTYPE_BYTES

#: Table of ``serving.toml`` that holds the fit of all engines' runs.
_POOLED = "any"
#: Classes of its judged metrics that are passes: steps alone and under load, first tokens.
_CLASSES = ("step_dense", "tpot_dense", "ttft_dense")
#: 16-bit FLOPs per byte, i0, at which power starts to tell: the ridge of the GPUs of the runs (A100
#: 153, H100 295, B200 281, L40S 419).
RIDGE_FLOPS_PER_BYTE = 290.0
_PREFILL = frozenset({"prefill_attention", "mla_prefill_attention", "scan_prefill"})
_DECODE_ATTENTION = frozenset({"decode_attention", "mla_decode_attention"})
_STEP = _DECODE_ATTENTION | {"scan_step"}


@dataclass(frozen=True, slots=True, kw_only=True)
class InSitu:
    """What becomes of kernels in a pass; see the module's docstring.

    compute_factor, matmul_memory_factor, attention_memory_factor, collective_factor
                    time in a pass against alone, by what binds
    step_s          host time per step of an engine that replays captured graphs
    layer_s         gaps between the kernels of one layer
    first_token_s   what a first token takes besides its prefill
    scatter         mean |log| by which the passes of an engine that no fit had seen are off
    n_runs          published runs of dense models behind it
    """

    compute_factor: float
    matmul_memory_factor: float
    attention_memory_factor: float
    collective_factor: float
    step_s: float
    layer_s: float
    first_token_s: float
    scatter: float
    n_runs: int

    def memory_factor(self, kind: str) -> float:
        """The factor on the memory side of an operation kind."""
        attends = kind in _DECODE_ATTENTION
        return self.attention_memory_factor if attends else self.matmul_memory_factor

    def kernel_factor(self, operation: Operation) -> Array:
        """The factor on the time of an operation's kernel; see the module's docstring."""
        if operation.kind in _PREFILL:
            return self.compute_factor
        memory = self.memory_factor(operation.kind)
        if operation.kind in _STEP:
            return memory
        width = DTYPE_BYTES[operation.dtype] / 2.0  # a narrow product draws less
        intensity = operation.flops * width / np.maximum(operation.moved_bytes, 1.0)
        square = np.square(intensity)
        share = square / (square + RIDGE_FLOPS_PER_BYTE**2)
        return memory + (self.compute_factor - memory) * share

    def interval(self, spread: float = 0.0) -> tuple[float, float]:
        """(low, high) factors on a kernel in a pass whose family was transferred with so much
        ``spread`` (of the logarithm): transfers err by themselves, which adds to the scatter of
        passes as squares.
        """
        reach = math.hypot(REACH * self.scatter, spread)
        return math.exp(-reach), math.exp(reach)


def _pooled() -> dict[str, Any]:
    """The one table of the file that is needed: reading all of it would be felt at start-up."""
    text = (DATA / "serving.toml").read_text("utf-8")
    head = f'[engine."{_POOLED}"]'
    _, found, rest = text.partition(head)
    own, *_ = rest.partition("\n[")
    row: dict[str, Any] = tomllib.loads(found + own)["engine"][_POOLED]
    return row


@functools.cache
def in_situ() -> InSitu:
    """The fit that ships."""
    row = _pooled()
    p = row["parameters"]
    classes = [row["held_out_percent"][name] for name in _CLASSES]
    return InSitu(
        compute_factor=p["prefill_factor"],
        matmul_memory_factor=p["matmul_factor"],
        attention_memory_factor=p["attention_factor"],
        collective_factor=p["collective_factor"],
        step_s=p["step_s"],
        layer_s=p["layer_s"],
        first_token_s=p["start_s"],
        scatter=max(c["scatter"] for c in classes),
        n_runs=int(sum(v["n"] for k, v in row["held_out_percent"].items() if k.endswith("dense"))),
    )

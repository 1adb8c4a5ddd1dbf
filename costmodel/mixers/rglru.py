"""RG-LRU recurrent block (Griffin, RecurrentGemma).

State   B (4 w + (k - 1) w b) bytes: w channels of an elementwise recurrence, k convolution kernel
        (transformers keeps k - 1 columns here too, on the module)
Work    linear in the prompt: the gates are block-diagonal matmuls, 2 * 2 w^2 / n FLOPs per token
        over n blocks; the recurrence h = a h + sqrt(1 - a^2) (i x) is elementwise, about 10 w

arXiv 2402.19427; google-deepmind/recurrentgemma ``torch/layers.py``. Not modelled: transformers'
Python loop over the prompt.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from costmodel.errors import NotApplicableError
from costmodel.fused_kernels import fused_step
from costmodel.mixers.base import AbstractMixer, Linear
from costmodel.mixers.recurrent import STATE_ELEMENT_BYTES, convolution, runs_in_torch, scan
from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class RGLRU(AbstractMixer):
    """One recurrent block: two input branches, convolution, gated recurrence, output.

    width     w, recurrence channels
    n_blocks  blocks of the two gate matrices
    """

    KIND: ClassVar[str] = "rglru"
    HAS_KV: ClassVar[bool] = False

    width: int
    n_blocks: int
    conv_kernel: int

    def linears(self, d_model: int) -> tuple[Linear, ...]:
        """Both branches as one matmul, and the output; all with bias."""
        w = self.width
        return (
            Linear(name="linear_xy", n_in=d_model, n_out=2 * w, bias=2 * w),
            Linear(name="linear_out", n_in=w, n_out=d_model, bias=d_model),
        )

    def other_parameters(self, d_model: int) -> int:
        """Convolution with bias, the recurrence's decay, two block-diagonal gates with bias."""
        w, block = self.width, self.width // self.n_blocks
        return w * (self.conv_kernel + 1) + w + 2 * (self.n_blocks * block * block + w)

    def sharded(self, tp: int) -> "RGLRU":
        """Blocks divide."""
        if self.n_blocks % tp:
            raise NotApplicableError(f"{self.n_blocks} RG-LRU blocks do not divide by tp={tp}")
        return replace(self, width=self.width // tp, n_blocks=self.n_blocks // tp)

    def state_bytes(self, point: Point) -> Array:
        """``B (4 w + (k - 1) w b)``."""
        columns = (self.conv_kernel - 1) * self.width * point.element_bytes
        return point.batch * (STATE_ELEMENT_BYTES * self.width + columns)

    def prefill(self, point: Point) -> Operations:
        """Convolution, gates and scan over the prompt."""
        *before, recurrence = self._operations(point, prefill=True)
        return (*before, *fused_step(point, "rglru_scan", recurrence))

    def decode(self, point: Point) -> Operations:
        """Convolution, gates and one step."""
        return self._operations(point, prefill=False)

    def _operations(self, point: Point, *, prefill: bool) -> Operations:
        w, block = self.width, self.width // self.n_blocks
        tokens = point.batch * (point.prompt_tokens if prefill else np.float64(1.0))
        moved = tokens * (3.0 * w * point.element_bytes)
        gates = Operation(
            name="rglru_gates",
            kind="gemm",
            flops=tokens * (4.0 * w * block),
            activation_bytes=moved,
            transient_bytes=moved if prefill else 0.0,
            launches=2,
            dtype=point.dtype,
            shape={"m": tokens, "n": float(2 * block), "k": float(block), "groups": self.n_blocks},
            formula="two block-diagonal gates: 4 w^2 / n FLOPs per token",
        )
        columns = convolution(point, channels=w, kernel=self.conv_kernel, prefill=prefill)
        if not prefill and runs_in_torch(point):  # a step sums products, elementwise
            columns = replace(columns, executed_flops=np.float64(0.0))
        return (
            columns,
            gates,
            scan(
                point,
                name="rglru_scan" if prefill else "rglru_step",
                prefill=prefill,
                state_elements=w,
                flops_per_token=0.0,
                vector_flops_per_token=10.0 * w,
                activation_elements=4 * w,
                shape={
                    "n_heads": float(w),
                    "head_dim": 1.0,
                    "d_state": 1.0,
                    "n_groups": 1.0,
                    "chunk": 1.0,
                },
                formula="elementwise recurrence, about 10 w per token; no matmul",
            ),
        )

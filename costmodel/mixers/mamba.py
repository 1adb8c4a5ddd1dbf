"""Mamba (selective state space, version 1): Mamba, Falcon-Mamba, Jamba.

State   B (4 E N + (k - 1) E b) bytes: E inner channels, N state size, k convolution kernel
Prefill a parallel scan, linear in the prompt; hidden states stay on chip
Decode  one recurrence step: read and write the state

FLOPs per token besides the projections: 2 k E (convolution) and 2 E N (readout C h); the recurrence
h = exp(dt A) h + dt B x is elementwise, about 7 E N. arXiv 2312.00752; state-spaces/mamba
``modules/mamba_simple.py``. Not modelled: the fallback without kernels, which writes all hidden
states.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from costmodel.errors import NotApplicableError
from costmodel.mixers.base import AbstractMixer, Linear
from costmodel.mixers.recurrent import convolution, fixed_state_bytes, scan
from costmodel.operation import Array, Operations
from costmodel.workload import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba(AbstractMixer):
    """One Mamba-1 layer.

    d_inner      E, inner channels
    d_state      N, state elements per channel
    dt_rank      rank of the step-size projection
    inner_norms  norms on step size, B and C (Jamba): ``dt_rank + 2 N`` parameters
    """

    KIND: ClassVar[str] = "mamba"
    HAS_KV: ClassVar[bool] = False

    d_inner: int
    d_state: int
    dt_rank: int
    conv_kernel: int
    conv_bias: bool = True
    bias: bool = False
    inner_norms: bool = False

    def linears(self, d_model: int) -> tuple[Linear, ...]:
        """Input (x and gate), step size and B, C, step-size expansion, output."""
        e, x_out = self.d_inner, self.dt_rank + 2 * self.d_state
        return (
            Linear(name="in_proj", n_in=d_model, n_out=2 * e, bias=2 * e if self.bias else 0),
            Linear(name="x_proj", n_in=e, n_out=x_out),
            Linear(name="dt_proj", n_in=self.dt_rank, n_out=e, bias=e, quantisable=False),
            Linear(name="out_proj", n_in=e, n_out=d_model, bias=d_model if self.bias else 0),
        )

    def other_parameters(self, d_model: int) -> int:
        """Convolution, A, D and inner norms."""
        e, n = self.d_inner, self.d_state
        norms = self.dt_rank + 2 * n if self.inner_norms else 0
        return e * self.conv_kernel + (e if self.conv_bias else 0) + e * n + e + norms

    def sharded(self, tp: int) -> "Mamba":
        """Channels divide."""
        if self.d_inner % tp:
            raise NotApplicableError(f"{self.d_inner} Mamba channels do not divide by tp={tp}")
        return replace(self, d_inner=self.d_inner // tp)

    def state_bytes(self, point: Point) -> Array:
        """``B (4 E N + (k - 1) E b)``."""
        return fixed_state_bytes(
            point,
            state_elements=self.d_inner * self.d_state,
            conv_channels=self.d_inner,
            conv_kernel=self.conv_kernel,
        )

    def prefill(self, point: Point) -> Operations:
        """Convolution and scan over the prompt."""
        return self._operations(point, prefill=True)

    def decode(self, point: Point) -> Operations:
        """Convolution and one recurrence step."""
        return self._operations(point, prefill=False)

    def _operations(self, point: Point, *, prefill: bool) -> Operations:
        e, n = self.d_inner, self.d_state
        return (
            convolution(point, channels=e, kernel=self.conv_kernel, prefill=prefill),
            scan(
                point,
                name="selective_scan" if prefill else "selective_state_update",
                prefill=prefill,
                state_elements=e * n,
                flops_per_token=2.0 * e * n,
                vector_flops_per_token=7.0 * e * n + 8.0 * e,
                activation_elements=4 * e + 2 * n,  # x, gate, step size, output; B and C
                shape={
                    "n_heads": float(e),
                    "head_dim": 1.0,
                    "d_state": float(n),
                    "n_groups": 1.0,
                    "chunk": 1.0,
                },
                formula="state E N read and written; 2 E N readout, 7 E N elementwise per token",
            ),
        )

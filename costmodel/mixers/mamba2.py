"""Mamba-2 (state space duality): Codestral, Bamba, Nemotron-H, Zamba2, Falcon-H1, Granite 4.

State   B (4 H P N + (k - 1) (E + 2 G N) b) bytes: H heads of P channels (E = H P), N state size,
        G groups
Prefill chunked matmuls of c tokens: per token 2 c N G (C B^T) + 2 c E (scores times x) + 4 E N
        (chunk states in and out)
Decode  one recurrence step

Useful FLOPs per token besides the projections: 2 k (E + 2 G N) and 4 E N (outer-product update and
readout); decay is elementwise. arXiv 2405.21060; state-spaces/mamba ``ops/triton/ssd_combined.py``.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from costmodel.errors import NotApplicableError
from costmodel.fused_kernels import fused_step
from costmodel.mixers.base import AbstractMixer, Linear
from costmodel.mixers.recurrent import (
    convolution,
    fixed_state_bytes,
    gated_norm,
    runs_in_torch,
    scan,
)
from costmodel.operation import Array, Operations
from costmodel.workload import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2(AbstractMixer):
    """One Mamba-2 layer.

    norm  gated RMSNorm of the output (E parameters); without it the gate only multiplies
    """

    KIND: ClassVar[str] = "mamba2"
    HAS_KV: ClassVar[bool] = False

    n_heads: int
    head_dim: int
    d_state: int
    n_groups: int
    conv_kernel: int
    chunk_tokens: int = 256
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    norm: bool = True

    @property
    def d_inner(self) -> int:
        """E = H P."""
        return self.n_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    def linears(self, d_model: int) -> tuple[Linear, ...]:
        """Input (gate, x, B, C, step size) and output."""
        n_out = self.d_inner + self.conv_channels + self.n_heads
        return (
            Linear(name="in_proj", n_in=d_model, n_out=n_out, bias=n_out if self.in_bias else 0),
            Linear(
                name="out_proj",
                n_in=self.d_inner,
                n_out=d_model,
                bias=d_model if self.out_bias else 0,
            ),
        )

    def other_parameters(self, d_model: int) -> int:
        """Convolution, step-size bias, A, D and the gated norm."""
        conv = self.conv_channels * (self.conv_kernel + (1 if self.conv_bias else 0))
        return conv + 3 * self.n_heads + (self.d_inner if self.norm else 0)

    def sharded(self, tp: int) -> "Mamba2":
        """Heads divide; groups divide, and replicate when there are fewer than GPUs."""
        if self.n_heads % tp:
            raise NotApplicableError(f"{self.n_heads} Mamba-2 heads do not divide by tp={tp}")
        if self.n_groups % tp and tp % self.n_groups:
            raise NotApplicableError(f"{self.n_groups} Mamba-2 groups and tp={tp} do not divide")
        return replace(self, n_heads=self.n_heads // tp, n_groups=max(1, self.n_groups // tp))

    def state_bytes(self, point: Point) -> Array:
        """``B (4 H P N + (k - 1) (E + 2 G N) b)``."""
        return fixed_state_bytes(
            point,
            state_elements=self.d_inner * self.d_state,
            conv_channels=self.conv_channels,
            conv_kernel=self.conv_kernel,
        )

    def prefill(self, point: Point) -> Operations:
        """Convolution, chunked scan and gated norm over the prompt."""
        e, n, g = self.d_inner, self.d_state, self.n_groups
        s, c = point.prompt_tokens, float(self.chunk_tokens)
        n_chunks = np.ceil(s / c)
        padded = point.batch * n_chunks * c
        states = point.batch * n_chunks * (4.0 * e * n)
        scores = point.batch * n_chunks * (4.0 * g * c * c)
        executed = padded * (2.0 * c * n * g + 2.0 * c * e + 4.0 * e * n)
        if runs_in_torch(point):  # groups repeated to heads; all chunk states against all
            executed = padded * (2.0 * c * n * self.n_heads + 2.0 * c * e + 4.0 * e * n)
            executed = executed + point.batch * (n_chunks + 1) ** 2 * (2.0 * e * n)
        conv, recurrence, norm = self._operations(
            point,
            prefill=True,
            executed=executed,
            workspace=2 * (states + scores),
            transient=states + scores,
        )
        return (conv, *fused_step(point, "ssd_scan", recurrence), norm)

    def decode(self, point: Point) -> Operations:
        """Convolution, one recurrence step and gated norm."""
        readout = point.batch * (2.0 * self.d_inner * self.d_state)
        return self._operations(
            point, prefill=False, executed=readout if runs_in_torch(point) else None
        )

    def _operations(
        self,
        point: Point,
        *,
        prefill: bool,
        executed: Array | None = None,
        workspace: Array = 0.0,
        transient: Array = 0.0,
    ) -> Operations:
        e, n, g = self.d_inner, self.d_state, self.n_groups
        return (
            convolution(
                point, channels=self.conv_channels, kernel=self.conv_kernel, prefill=prefill
            ),
            scan(
                point,
                name="ssd_chunk_scan" if prefill else "selective_state_update",
                prefill=prefill,
                state_elements=e * n,
                flops_per_token=4.0 * e * n,
                vector_flops_per_token=(0.0 if prefill else 2.0 * e * n) + 8.0 * e,
                activation_elements=2 * e + 2 * g * n + self.n_heads,
                executed_flops=executed,
                workspace_bytes=workspace,
                transient_bytes=transient,
                launches=5 if prefill else 1,
                shape={
                    "n_heads": float(self.n_heads),
                    "head_dim": float(self.head_dim),
                    "d_state": float(n),
                    "n_groups": float(g),
                    "chunk": float(self.chunk_tokens) if prefill else 1.0,
                },
                source="state-spaces/mamba ops/triton/ssd_combined.py" if prefill else "",
                formula="chunked 2 c N G + 2 c E + 4 E N per token; useful 4 E N",
            ),
            gated_norm(point, width=e, prefill=prefill),
        )

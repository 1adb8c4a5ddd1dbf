"""Delta-rule linear attention: Gated DeltaNet (Qwen3-Next, Qwen3.5) and Kimi Delta Attention (KDA).

State   B (4 V dk dv + (k - 1) (2 K dk + V dv) b) bytes: V value heads of size dv, K key heads of
        size dk, k the kernel of the convolution over queries, keys and values
Prefill chunks of c = 64 tokens: per token and value head 6 c dk + 4 c dv + c^2 / 3 + 6 dk dv
        (K K^T, Q K^T, their products with the triangular inverse, and the state matmuls)
Decode  S = a S + k (v - k S)^T, o = q S: 6 dk dv useful FLOPs per value head, decay elementwise

Gated DeltaNet decays each head by a scalar; KDA each key channel by its own factor, from a low-rank
gate. arXiv 2412.06464, 2510.26692; fla-org/flash-linear-attention ``ops/gated_delta_rule``,
``ops/kda``.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from costmodel.errors import NotApplicableError
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

#: Tokens per chunk in the fla kernels.
CHUNK_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRule(AbstractMixer):
    """One delta-rule layer.

    form  "gdn": scalar decay per head, output gate from a full projection;
          "kda": decay per key channel and output gate through rank-dk projections
    """

    KIND: ClassVar[str] = "delta"
    HAS_KV: ClassVar[bool] = False

    form: Literal["gdn", "kda"]
    n_key_heads: int
    n_value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int

    @property
    def d_key(self) -> int:
        """Width of all key heads."""
        return self.n_key_heads * self.key_dim

    @property
    def d_value(self) -> int:
        """Width of all value heads."""
        return self.n_value_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """Queries, keys and values."""
        return 2 * self.d_key + self.d_value

    @property
    def state_elements(self) -> int:
        """V dk dv."""
        return self.n_value_heads * self.key_dim * self.value_dim

    def linears(self, d_model: int) -> tuple[Linear, ...]:
        """Projections in, gates, and out."""
        out = Linear(name="out_proj", n_in=self.d_value, n_out=d_model)
        if self.form == "gdn":
            return (
                Linear(name="in_proj_qkvz", n_in=d_model, n_out=self.conv_channels + self.d_value),
                Linear(
                    name="in_proj_ba",
                    n_in=d_model,
                    n_out=2 * self.n_value_heads,
                    quantisable=False,
                ),
                out,
            )
        rank = self.key_dim
        return (
            Linear(name="qkv_proj", n_in=d_model, n_out=self.conv_channels),
            Linear(name="gates_a_proj", n_in=d_model, n_out=2 * rank),
            Linear(name="f_b_proj", n_in=rank, n_out=self.d_key),
            Linear(name="g_b_proj", n_in=rank, n_out=self.d_value),
            Linear(name="b_proj", n_in=d_model, n_out=self.n_value_heads, quantisable=False),
            out,
        )

    def other_parameters(self, d_model: int) -> int:
        """Convolution without bias, A, step-size bias, output norm of one head."""
        bias = self.n_value_heads if self.form == "gdn" else self.d_key
        return self.conv_channels * self.conv_kernel + self.n_value_heads + bias + self.value_dim

    def sharded(self, tp: int) -> "DeltaRule":
        """Key and value heads divide; key heads replicate when there are fewer than GPUs."""
        if self.n_value_heads % tp or (self.n_key_heads % tp and tp % self.n_key_heads):
            raise NotApplicableError(
                f"{self.n_key_heads} key and {self.n_value_heads} value heads and tp={tp}"
            )
        return replace(
            self,
            n_key_heads=max(1, self.n_key_heads // tp),
            n_value_heads=self.n_value_heads // tp,
        )

    def state_bytes(self, point: Point) -> Array:
        """``B (4 V dk dv + (k - 1) (2 K dk + V dv) b)``."""
        return fixed_state_bytes(
            point,
            state_elements=self.state_elements,
            conv_channels=self.conv_channels,
            conv_kernel=self.conv_kernel,
        )

    def prefill(self, point: Point) -> Operations:
        """Convolution, chunked delta rule and gated norm over the prompt."""
        c, dk, dv = float(CHUNK_TOKENS), float(self.key_dim), float(self.value_dim)
        n_chunks = np.ceil(point.prompt_tokens / c)
        padded = point.batch * n_chunks * c
        intra = 6 * c * dk + 4 * c * dv + c * c / 3
        if runs_in_torch(point):  # triangular solves or elementwise scores in place of matmuls
            intra = 4 * c * dk + 2 * c * dv if self.form == "gdn" else 2 * c * dk + 4 * c * dv
        per_token = self.n_value_heads * (intra + 6 * dk * dv)
        b = point.element_bytes
        # chunk states, the triangular inverse, and the transformed keys and values
        written = point.batch * n_chunks * (self.state_elements * b) + padded * (
            self.n_value_heads * (c + dk + 2 * dv) * b
        )
        return self._operations(
            point,
            prefill=True,
            executed=padded * per_token,
            workspace=2 * written,
            transient=written,
        )

    def decode(self, point: Point) -> Operations:
        """Convolution, one recurrence step and gated norm."""
        # transformers' torch code does a step with elementwise products and sums
        executed = np.float64(0.0) if runs_in_torch(point) else None
        return self._operations(point, prefill=False, executed=executed)

    def _operations(
        self,
        point: Point,
        *,
        prefill: bool,
        executed: Array | None = None,
        workspace: Array = 0.0,
        transient: Array = 0.0,
    ) -> Operations:
        rule = "gated_delta_rule" if self.form == "gdn" else "kda"
        return (
            convolution(
                point, channels=self.conv_channels, kernel=self.conv_kernel, prefill=prefill
            ),
            scan(
                point,
                name=f"chunk_{rule}" if prefill else f"fused_recurrent_{rule}",
                prefill=prefill,
                state_elements=self.state_elements,
                flops_per_token=6.0 * self.state_elements,
                vector_flops_per_token=(0.0 if prefill else 1.0 * self.state_elements)
                + 8.0 * self.d_value,
                activation_elements=self.conv_channels + self.d_value + 2 * self.n_value_heads,
                executed_flops=executed,
                workspace_bytes=workspace,
                transient_bytes=transient,
                launches=6 if prefill else 1,
                shape={
                    "n_heads": float(self.n_value_heads),
                    "head_dim": float(self.value_dim),
                    "d_state": float(self.key_dim),
                    "n_groups": float(self.n_key_heads),
                    "chunk": float(CHUNK_TOKENS) if prefill else 1.0,
                },
                source=f"fla-org/flash-linear-attention ops/{rule}",
                formula="useful 6 V dk dv; chunked per head 6 c dk + 4 c dv + c^2/3 + 6 dk dv",
            ),
            gated_norm(point, width=self.d_value, prefill=prefill),
        )

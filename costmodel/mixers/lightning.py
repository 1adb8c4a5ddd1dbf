"""Lightning attention (MiniMax-01): linear attention with a fixed decay per head.

State   B 4 N h^2 bytes: one h x h matrix in fp32 for each of N heads
Prefill blocks of c tokens: per token 4 c N h (scores and their product with the values inside a
block)
        and 4 N h^2 (state in and out)
Decode  S = a S + k^T v, o = q S: 4 N h^2 useful FLOPs, decay elementwise

arXiv 2501.08313, 2405.17381; transformers 5.23 ``models/minimax``.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from costmodel.errors import NotApplicableError
from costmodel.mixers.base import AbstractMixer, Linear
from costmodel.mixers.recurrent import STATE_ELEMENT_BYTES, gated_norm, scan
from costmodel.operation import Array, Operations
from costmodel.workload import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Lightning(AbstractMixer):
    """One lightning-attention layer."""

    KIND: ClassVar[str] = "lightning"
    HAS_KV: ClassVar[bool] = False

    n_heads: int
    head_dim: int
    block_tokens: int = 256

    @property
    def width(self) -> int:
        """All heads."""
        return self.n_heads * self.head_dim

    @property
    def state_elements(self) -> int:
        """N h^2."""
        return self.width * self.head_dim

    def linears(self, d_model: int) -> tuple[Linear, ...]:
        """Queries, keys and values; output gate; output."""
        return (
            Linear(name="qkv_proj", n_in=d_model, n_out=3 * self.width),
            Linear(name="output_gate", n_in=d_model, n_out=self.width),
            Linear(name="out_proj", n_in=self.width, n_out=d_model),
        )

    def other_parameters(self, d_model: int) -> int:
        """Norm of the output."""
        return self.width

    def sharded(self, tp: int) -> "Lightning":
        """Heads divide."""
        if self.n_heads % tp:
            raise NotApplicableError(f"{self.n_heads} lightning heads do not divide by tp={tp}")
        return replace(self, n_heads=self.n_heads // tp)

    def state_bytes(self, point: Point) -> Array:
        """``B 4 N h^2``; transformers keeps the state in the model dtype."""
        transformers = point.engine.fixed_state_layout == "transformers"
        element = point.element_bytes if transformers else STATE_ELEMENT_BYTES
        return point.batch * (element * self.state_elements)

    def prefill(self, point: Point) -> Operations:
        """Blocked linear attention and gated norm."""
        s, c = point.prompt_tokens, float(self.block_tokens)
        n_full = np.floor(s / c)
        inside = n_full * c * c + (s - n_full * c) ** 2  # the last block may be shorter
        executed = point.batch * (4.0 * inside * self.width + 4.0 * s * self.state_elements)
        return self._operations(point, prefill=True, executed=executed)

    def decode(self, point: Point) -> Operations:
        """One step and gated norm."""
        return self._operations(point, prefill=False)

    def _operations(
        self, point: Point, *, prefill: bool, executed: Array | None = None
    ) -> Operations:
        return (
            scan(
                point,
                name="lightning_attention" if prefill else "lightning_step",
                prefill=prefill,
                state_elements=self.state_elements,
                flops_per_token=4.0 * self.state_elements,
                vector_flops_per_token=self.state_elements * (0.0 if prefill else 1.0)
                + 4.0 * self.width,
                activation_elements=4 * self.width,
                executed_flops=executed,
                shape={
                    "n_heads": float(self.n_heads),
                    "head_dim": float(self.head_dim),
                    "d_state": float(self.head_dim),
                    "n_groups": float(self.n_heads),
                    "chunk": float(self.block_tokens) if prefill else 1.0,
                },
                formula="useful 4 N h^2 per token; blocks add 4 c N h",
            ),
            gated_norm(point, width=self.width, prefill=prefill),
        )

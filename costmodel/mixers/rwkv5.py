"""RWKV-5 (Eagle): matrix-valued state, time mixing and channel mixing with token shift.

State   B (4 d h + 2 d b) bytes per layer: an h x h matrix in fp32 for each head of size h (d / h
        heads), and two vectors of d, the shifted inputs of time and channel mixing
Work    linear in the prompt: 4 d h useful FLOPs per token (k v^T update and readout), decay
        elementwise

arXiv 2404.05892; BlinkDL/RWKV-LM ``RWKV-v5``. The channel mixing's matrices are the layer's MLP;
its token shift is counted here.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from costmodel.errors import NotApplicableError
from costmodel.mixers.base import AbstractMixer, Linear
from costmodel.mixers.recurrent import STATE_ELEMENT_BYTES, gated_norm, scan
from costmodel.operation import Array, Operations
from costmodel.workload import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class RWKV5(AbstractMixer):
    """Time mixing of one layer; ``n_heads`` heads of ``head_dim`` each.

    shift_dim  d_model: width of the token-shift vectors, on every GPU in full
    """

    KIND: ClassVar[str] = "rwkv5"
    HAS_KV: ClassVar[bool] = False

    n_heads: int
    head_dim: int
    shift_dim: int

    def linears(self, d_model: int) -> tuple[Linear, ...]:
        """Receptance, key, value and gate (each on its own mix of two tokens), output."""
        inner = self.n_heads * self.head_dim
        names = ("receptance", "key", "value", "gate")
        return (
            *(Linear(name=name, n_in=d_model, n_out=inner) for name in names),
            Linear(name="output", n_in=inner, n_out=d_model),
        )

    def other_parameters(self, d_model: int) -> int:
        """Four mixing vectors, decay, bonus, and the group norm of the output."""
        return 4 * d_model + 4 * self.n_heads * self.head_dim

    def sharded(self, tp: int) -> "RWKV5":
        """Heads divide."""
        if self.n_heads % tp:
            raise NotApplicableError(f"{self.n_heads} RWKV heads do not divide by tp={tp}")
        return replace(self, n_heads=self.n_heads // tp)

    @property
    def state_elements(self) -> int:
        """Matrix state of one sequence."""
        return self.n_heads * self.head_dim * self.head_dim

    def state_bytes(self, point: Point) -> Array:
        """``B (4 d h + 2 d b)``."""
        shifts = 2 * self.shift_dim * point.element_bytes
        return point.batch * (STATE_ELEMENT_BYTES * self.state_elements + shifts)

    def prefill(self, point: Point) -> Operations:
        """Recurrence over the prompt and output norm."""
        return self._operations(point, prefill=True)

    def decode(self, point: Point) -> Operations:
        """One step and output norm."""
        return self._operations(point, prefill=False)

    def _operations(self, point: Point, *, prefill: bool) -> Operations:
        inner = self.n_heads * self.head_dim
        return (
            scan(
                point,
                name="wkv5" if prefill else "wkv5_step",
                prefill=prefill,
                state_elements=self.state_elements,
                flops_per_token=4.0 * self.state_elements,
                vector_flops_per_token=4.0 * self.state_elements,
                activation_elements=5 * inner,
                shape={
                    "n_heads": float(self.n_heads),
                    "head_dim": float(self.head_dim),
                    "d_state": float(self.head_dim),
                    "n_groups": float(self.n_heads),
                    "chunk": 1.0,
                },
                source="BlinkDL/RWKV-LM RWKV-v5/cuda/wkv5_cuda.cu",
                formula="4 d h useful, 4 d h elementwise per token; a step moves the state twice",
            ),
            gated_norm(point, width=inner, prefill=prefill),
        )

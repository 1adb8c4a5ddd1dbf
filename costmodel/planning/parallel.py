"""Parallelism inside one replica beyond tensor parallelism.

Tensor parallelism is priced by the cost model itself (``Model`` with ``tp``). The others reshape the
step tables of one tensor-parallel group.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from costmodel.planning.steps import StepTable
    from costmodel.predict import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Degrees besides ``tp``: pipeline stages, expert groups, context-parallel ranks."""

    pp: int = 1
    ep: int = 1
    cp: int = 1

    @property
    def groups(self) -> int:
        """Tensor-parallel groups in one replica."""
        return self.pp * self.ep * self.cp

    def applied(self, table: "StepTable", model: "Model") -> "StepTable":
        """The tables of a whole replica."""
        return table

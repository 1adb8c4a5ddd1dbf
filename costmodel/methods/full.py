"""Full attention: the cache as the model has it, in the model's dtype. The baseline."""

from dataclasses import dataclass
from typing import ClassVar, final

from costmodel.architecture import MixerGroup
from costmodel.methods.base import AbstractMethod, Mask, Scope, Stage, State
from costmodel.operation import Array, Operations
from costmodel.workload import Point


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Full(AbstractMethod):
    """No compression."""

    NAME: ClassVar[str] = "full"
    TITLE: ClassVar[str] = "full attention, 16-bit cache"
    REFERENCE: ClassVar[str] = "Vaswani et al., arXiv 1706.03762"
    STAGES: ClassVar[frozenset[Stage]] = frozenset()
    ACTS: ClassVar[str] = "never"
    SCOPE: ClassVar[Scope] = "none"
    DOES_NOT_SAVE: ClassVar[str] = "anything: it is what the others are compared with."
    REALISED_BY: ClassVar[tuple[str, ...]] = ("every engine",)
    STATE_FORMULA: ClassVar[str] = "B * min(T, W) * K * (Hk + Hv) * b per layer"

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """Everywhere."""
        return True

    def state(self, group: MixerGroup, point: Point) -> State:
        """Never asked: it covers no mixer."""
        return State(group.n_layers * group.mixer.state_bytes(point))

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """The mixer's own."""
        return group.mixer.decode(point)

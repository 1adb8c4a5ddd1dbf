"""How a point is observed; importing this loads no torch."""

from dataclasses import dataclass

from measure.devices.energy import WINDOW_S
from measure.timing import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How a point is observed.

    needed_bytes     most device memory it is predicted to take; None: unknown, or start it anyway
    predicted_ttft_s what a prefill is predicted to take; None: unknown
    max_prefill_s    longer prompts are not run: the caches are filled with random tokens, and the
                     record has no TTFT
    energy_s         window of the energy reading; 0: none
    """

    budget: Budget | None = None
    needed_bytes: float | None = None
    predicted_ttft_s: float | None = None
    max_prefill_s: float | None = None
    energy_s: float = WINDOW_S

    @property
    def skips_prefill(self) -> bool:
        """Whether the prompt is predicted to take too long."""
        limit, ttft = self.max_prefill_s, self.predicted_ttft_s
        return limit is not None and ttft is not None and ttft > limit

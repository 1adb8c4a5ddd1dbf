"""The position of a step, kept on the device: what a captured step reads instead of a host's count.

    host    position T -> T + 1 -> ...          device   [T] -> add_(1) -> [T + 1] -> ...

A CUDA graph repeats what the host asked for with the numbers it asked with. A step whose place is a
Python number is therefore step T at every replay; one that reads its place here, and moves it on as
its last operation, is the next step.
"""

import torch
from torch import Tensor


class StepClock:
    """Tokens seen before the step that is due, the same for every sequence of the batch.

    position  [1] int64 on the device; host  the same as the host counts it
    """

    def __init__(self, device: torch.device, last: int) -> None:
        """``last`` is the largest position there are tables for: replays beyond it repeat it."""
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.host = 0
        self._last = last

    def at(self, position: int) -> None:
        """Have the device hold ``position``; nothing is written where it does already."""
        if position != self.host:
            self.reset(position)

    def reset(self, position: int) -> None:
        """The same, whatever replays made of the device's count."""
        self.position.fill_(position)
        self.host = position

    def advance(self) -> None:
        """One step is done."""
        self.position.add_(1).clamp_(max=self._last)
        self.host += 1

    def behind(self, lag: int) -> Tensor:
        """Position less ``lag``, [1]: the count of a cache that began so many tokens later."""
        return self.position - lag if lag else self.position

"""The requests of one simulation as plain lists, and what becomes of them."""

from math import inf

import numpy as np

from costmodel.planning.load import Load


class Work:
    """Shared by all replicas. Lists, because single items are read and written millions of times.

    generated      tokens each request had when it last (re)joined a batch
    kept           of its prompt, what is still there after a preemption (a prefix cache's part)
    first_s        time of its first token, finish_s of its last
    stalled_since  when a preempted request produced its last token
    stalls         (request, seconds): gaps across preemptions
    """

    __slots__ = (
        "arrival", "before", "cached", "finish_s", "first_s", "generated", "held", "held_slope",
        "kept", "moved", "moved_slope", "n_late", "output", "prompt", "stalled_since", "stalls",
        "ttft_limit",
    )  # fmt: skip

    def __init__(
        self,
        load: Load,
        ttft_limit_s: np.ndarray | None = None,
        started_s: np.ndarray | None = None,
    ) -> None:
        """``started_s``: the first tokens came from elsewhere at these times, with the state."""
        n = load.size
        self.arrival: list[float] = load.arrival_s.tolist()
        self.prompt: list[int] = load.prompt_tokens.astype(np.int64).tolist()
        self.cached: list[int] = load.cached_tokens.astype(np.int64).tolist()
        self.output: list[int] = load.output_tokens.astype(np.int64).tolist()
        self.before: list[float] = load.before_s.tolist()
        self.held: list[float] = load.held_bytes.tolist()
        self.held_slope: list[float] = load.held_slope.tolist()
        self.moved: list[float] = load.moved_bytes.tolist()
        self.moved_slope: list[float] = load.moved_slope.tolist()
        self.ttft_limit: list[float] = [inf] * n if ttft_limit_s is None else ttft_limit_s.tolist()
        self.generated = [0 if started_s is None else 1] * n
        self.kept = self.cached if started_s is None else [0] * n
        self.first_s = [inf] * n
        self.finish_s = [inf] * n
        self.stalled_since: dict[int, float] = (
            {} if started_s is None else dict(enumerate(started_s.tolist()))
        )
        self.stalls: list[tuple[int, float]] = []
        self.n_late = 0

    def stall(self, i: int, now: float) -> None:
        """A preempted request goes on: the gap since its last token."""
        self.stalls.append((i, now - self.stalled_since.pop(i)))

"""A stream of requests: when each arrives, how long its prompt is, how many tokens it generates.

Everything a planner is given (a trace, a rate with length distributions, a number of users) becomes
one of these before it is simulated. Arrays run over requests, sorted by arrival.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import ConfigError

Floats = NDArray[np.float64]

#: Percentiles that tables of a stream show.
PERCENTILES = (50, 90, 99)
#: Nobody has more requests than this in one file that fits the memory promised for a plan.
MAX_REQUESTS = 20_000_000


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Requests:
    """One request per element.

    arrival_s      seconds from the first request, never decreasing
    input_tokens   prompt tokens, at least 1
    output_tokens  generated tokens, at least 1
    prefix_tokens  leading prompt tokens that an earlier request had too (what an ideal prefix cache
                   would save), below ``input_tokens``
    """

    name: str
    arrival_s: Floats
    input_tokens: Floats
    output_tokens: Floats
    prefix_tokens: Floats
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = self.arrival_s.size
        arrays = (self.arrival_s, self.input_tokens, self.output_tokens, self.prefix_tokens)
        if n == 0:
            raise ConfigError(f"{self.name}: expected at least one request, got none")
        if any(a.shape != (n,) for a in arrays):
            sizes = [a.size for a in arrays]
            raise ConfigError(f"{self.name}: expected arrays of one length, got {sizes}")
        if not all(np.all(np.isfinite(a)) for a in arrays):
            raise ConfigError(f"{self.name}: expected finite numbers")
        if np.any(np.diff(self.arrival_s) < 0):
            raise ConfigError(f"{self.name}: expected arrival times that never decrease")
        if np.any(self.input_tokens < 1) or np.any(self.output_tokens < 1):
            raise ConfigError(f"{self.name}: expected at least 1 input and 1 output token each")
        if np.any(self.prefix_tokens < 0) or np.any(self.prefix_tokens >= self.input_tokens):
            raise ConfigError(f"{self.name}: expected 0 <= prefix_tokens < input_tokens")

    @property
    def size(self) -> int:
        """Number of requests."""
        return int(self.arrival_s.size)

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return float(self.arrival_s[-1] - self.arrival_s[0])

    @property
    def rate_per_s(self) -> float:
        """Mean arrival rate: n - 1 gaps over the span; infinite when all arrive at once."""
        if self.size == 1 or self.span_s == 0.0:
            return float("inf")
        return (self.size - 1) / self.span_s

    def faster(self, factor: float) -> "Requests":
        """The same requests at ``factor`` times the rate."""
        if factor == 1.0:
            return self
        return replace(self, arrival_s=self.arrival_s / factor)

    def with_outputs(self, factor: float) -> "Requests":
        """Answers ``factor`` times as long, rounded up to whole tokens."""
        if factor == 1.0:
            return self
        longer = np.maximum(1.0, np.ceil(self.output_tokens * factor - 1e-9))
        return replace(self, output_tokens=longer)

    def lengthened(self, factor: float) -> "Requests":
        """Prompts and answers ``factor`` times as long (a sensitivity)."""
        prompt = np.maximum(1.0, np.round(self.input_tokens * factor))
        prefix = np.minimum(np.floor(self.prefix_tokens * factor), prompt - 1.0)
        return replace(
            self,
            input_tokens=prompt,
            prefix_tokens=np.maximum(prefix, 0.0),
            output_tokens=np.maximum(1.0, np.round(self.output_tokens * factor)),
        )

    def stats(self) -> dict[str, Any]:
        """The table of a trace: sizes, rate, burstiness, reusable prefixes."""
        gaps = np.diff(self.arrival_s)
        mean_gap = float(gaps.mean()) if gaps.size else 0.0
        out: dict[str, Any] = {
            "name": self.name,
            "requests": self.size,
            "span_s": self.span_s,
            "rate_per_s": None if mean_gap == 0.0 else 1.0 / mean_gap,
            "arrival_cv": None if mean_gap == 0.0 else float(gaps.std() / mean_gap),
            "peak_to_mean_60s": _peak_to_mean(self.arrival_s, 60.0),
            "prefix_share": float(self.prefix_tokens.sum() / self.input_tokens.sum()),
        }
        for key, values in (
            ("input_tokens", self.input_tokens),
            ("output_tokens", self.output_tokens),
        ):
            out[f"{key}_mean"] = float(values.mean())
            for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
                out[f"{key}_p{p}"] = float(v)
            out[f"{key}_max"] = int(values.max())
        for limit in (8192, 32768, 131072):
            share = float(np.mean(self.input_tokens > limit))
            out[f"input_share_over_{limit // 1024}k"] = share
        out["notes"] = list(self.notes)
        return out


def _peak_to_mean(arrival_s: Floats, window_s: float) -> float | None:
    """Busiest whole window of the stream against the mean window; None when it is too short."""
    n_windows = int((arrival_s[-1] - arrival_s[0]) // window_s)
    if n_windows < 2:
        return None
    index = ((arrival_s - arrival_s[0]) // window_s).astype(np.int64)
    counts = np.bincount(index[index < n_windows], minlength=n_windows)
    return float(counts.max() / counts.mean())

"""When requests come: as in the trace, Poisson, or gamma with a coefficient of variation."""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from costmodel.errors import ConfigError
from costmodel.planning.requests import Floats
from costmodel.tables import short


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """``cv`` is the standard deviation of a gap over its mean: 1 is Poisson, more is burstier."""

    kind: Literal["trace", "poisson", "gamma"]
    cv: float = 1.0

    def times(self, n: int, rate_per_s: float, rng: np.random.Generator) -> Floats:
        """``n`` generated arrival times, the first at 0. Gamma gaps: shape 1/cv^2, mean 1/rate."""
        shape = 1.0 / (self.cv * self.cv)
        gaps = rng.gamma(shape, 1.0 / (rate_per_s * shape), n - 1)
        return np.concatenate(([0.0], np.cumsum(gaps)))


def read_arrivals(text: str) -> Arrivals:
    """``trace``, ``poisson`` or ``gamma:CV``."""
    clean = text.strip().lower()
    if clean == "trace":
        return Arrivals(kind="trace")
    if clean == "poisson":
        return Arrivals(kind="poisson")
    match = re.fullmatch(r"gamma:\s*(\d+(?:\.\d+)?)", clean)
    if match and 0.01 <= float(match[1]) <= 100:
        return Arrivals(kind="gamma", cv=float(match[1]))
    raise ConfigError(
        f"arrivals: expected trace, poisson or gamma:CV with a CV of 0.01 to 100, got {short(text)}"
    )


def read_prefix_cache(text: str) -> float | None:
    """Share of each prompt found in a prefix cache; None: as many tokens as the trace's own blocks.

    ``off`` is 0.0, ``ideal`` None, ``hit=0.37`` 0.37.
    """
    clean = text.strip().lower()
    if clean == "off":
        return 0.0
    if clean == "ideal":
        return None
    match = re.fullmatch(r"hit\s*=\s*(0?\.\d+|0|1|1\.0*|0\.)", clean)
    if match:
        return float(match[1])
    raise ConfigError(
        f"prefix_cache: expected off, ideal or hit=SHARE with a share of 0 to 1, got {short(text)}"
    )

"""Service-level objectives: limits on percentiles, and the share of requests that must meet all.

    TTFT  arrival to first token, queue included     TPOT  (E2E - TTFT) / (n - 1) of one request
    ITL   every gap between consecutive tokens       E2E   arrival to last token

Goodput counts a request when it meets *every* limit: its own TTFT, TPOT and E2E below each figure
named, and no more of its own gaps above an ITL limit than the percentile lets pass.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from costmodel.planning.requests import Floats
from costmodel.tables import Fields, short

METRICS = ("ttft", "tpot", "itl", "e2e")
_KEY = re.compile(r"(ttft|tpot|itl|e2e)_p(\d{1,2}(?:\.\d+)?)_(s|ms)")
#: Grace of a limit that grows with the prompt: no prompt, however short, gets a shorter one.
DEFAULT_TTFT_BASE_S = 0.5
#: Share of requests that must meet ``ttft_s_per_1k_tokens`` where no attainment is named.
DEFAULT_SHARE = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """``metric`` at ``percentile`` (0-100) must be at most ``limit_s`` seconds."""

    metric: str
    percentile: float
    limit_s: float

    @property
    def key(self) -> str:
        """As results name it: ``ttft_p99_s``."""
        return f"{self.metric}_p{self.percentile:g}_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """All objectives of a plan.

    ttft_s_per_1k_tokens  a request's TTFT must be within ``ttft_base_s`` plus this much for every
                          1,000 prompt tokens (a flat TTFT means nothing at 128k)
    attainment            share of requests that must meet every limit
    """

    limits: tuple[Limit, ...] = ()
    ttft_s_per_1k_tokens: float | None = None
    ttft_base_s: float = DEFAULT_TTFT_BASE_S
    attainment: float | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing is asked for."""
        return not self.limits and self.ttft_s_per_1k_tokens is None

    def tightest(self, metric: str) -> float:
        """Smallest limit on a metric; infinite without one."""
        return min((x.limit_s for x in self.limits if x.metric == metric), default=np.inf)

    def ttft_limit_s(self, input_tokens: Floats) -> Floats:
        """Largest TTFT at which a request still meets every TTFT limit, per request."""
        flat = np.full(input_tokens.shape, self.tightest("ttft"))
        if self.ttft_s_per_1k_tokens is None:
            return flat
        limit: Floats = np.minimum(flat, self.scaled_ttft_s(input_tokens))
        return limit

    def scaled_ttft_s(self, input_tokens: Floats) -> Floats:
        """The limit that grows with the prompt."""
        per_1k = self.ttft_s_per_1k_tokens or 0.0
        return self.ttft_base_s + per_1k * input_tokens / 1000.0

    def sentences(self) -> list[str]:
        """The objectives in words."""
        out = [
            f"{x.metric.upper()} P{x.percentile:g}{' with queue' if x.metric == 'ttft' else ''} <= "
            f"{_seconds(x.limit_s)}"
            for x in self.limits
        ]
        if self.ttft_s_per_1k_tokens is not None:
            out.append(
                f"TTFT with queue <= {_seconds(self.ttft_base_s)} + "
                f"{_seconds(self.ttft_s_per_1k_tokens)} per 1,000 prompt tokens for "
                f"{_percent(self.attainment or DEFAULT_SHARE)} of requests"
            )
        if self.attainment is not None:
            out.append(f"{_percent(self.attainment)} of requests meet every limit")
        return out


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def read_slo(table: Mapping[str, Any], where: str, problems: list[str]) -> Slo:
    """From the ``[slo]`` table; appends to ``problems``."""
    f = Fields(table, where, "slo.")
    limits = []
    matched = []
    for key, value in table.items():
        match = _KEY.fullmatch(key)
        if match is None or float(match[2]) <= 0:
            continue
        matched.append(key)
        unit = 1e-3 if match[3] == "ms" else 1.0
        number = f.check_number(key, value, "milliseconds" if unit < 1 else "seconds", 1e-6, 1e7)
        limits.append(Limit(metric=match[1], percentile=float(match[2]), limit_s=number * unit))
    per_1k = f.number("ttft_s_per_1k_tokens", unit="seconds", low=1e-6, high=1e6)
    base = f.number("ttft_base_s", unit="seconds", low=0.0, high=1e6)
    attainment = f.number("attainment", unit="a share such as 0.99", low=0.0, high=1.0)
    known = [f"{m}_p{p}_{u}" for m in METRICS for p in (50, 90, 95, 99) for u in ("s", "ms")]
    for key in sorted(set(table) - set(matched)):
        if key not in ("ttft_s_per_1k_tokens", "ttft_base_s", "attainment"):
            _unknown(f, key, known, table[key])
    problems += f.problems
    return Slo(
        limits=tuple(sorted(limits, key=lambda x: (METRICS.index(x.metric), x.percentile))),
        ttft_s_per_1k_tokens=per_1k,
        ttft_base_s=DEFAULT_TTFT_BASE_S if base is None else base,
        attainment=attainment,
    )


def _unknown(f: Fields, key: str, known: list[str], value: object) -> None:
    from difflib import get_close_matches

    near = get_close_matches(key, [*known, "ttft_s_per_1k_tokens", "attainment"], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; expected for example ttft_p99_s"
    f.problem(key, f"not a key of this form{hint} (got {short(value)})")

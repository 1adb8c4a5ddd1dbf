"""From a simulation to percentiles with confidence intervals, goodput and a verdict.

    TTFT  first token - arrival, queue included          E2E  last token - arrival
    TPOT  (E2E - TTFT) / (n - 1) of one request          ITL  every gap between consecutive tokens

Intervals are 95 % percentile intervals of a block bootstrap: consecutive requests are alike (they
share a queue), so whole blocks of them are drawn, not single ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from costmodel.planning.fleet import Outcome
from costmodel.planning.load import Load
from costmodel.planning.slo import DEFAULT_SHARE, Slo

Floats = np.ndarray
#: What results always name.
_ALWAYS = (
    ("ttft", 50.0), ("ttft", 99.0), ("tpot", 50.0), ("tpot", 95.0), ("itl", 95.0), ("itl", 99.0),
    ("e2e", 99.0),
)  # fmt: skip
_BLOCKS, _RESAMPLES = 32, 400
#: Width of a bin of the histograms that intervals are read from, in log space.
_BIN = 0.005
#: A run of iterations is split into this many pieces where its gaps grow by more than a bin.
_PIECES = 8


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Measured:
    """Latencies of the requests that count (after the warm-up).

    itl, itl_weight  gaps and how many tokens saw each
    over_itl         per request and ITL limit: share of its own gaps above the limit
    """

    ttft: Floats
    tpot: Floats
    e2e: Floats
    itl: Floats
    itl_weight: Floats
    itl_block: Floats
    input_tokens: Floats
    output_tokens: Floats
    over_itl: dict[tuple[float, float], Floats]
    span_s: float

    def percentile(self, metric: str, p: float) -> float | None:
        """None where nothing was measured (no request generated two tokens)."""
        if metric == "itl":
            return _weighted(self.itl, self.itl_weight, p)
        values = getattr(self, metric)
        if metric == "tpot":
            values = values[self.output_tokens > 1]
        return float(np.percentile(values, p)) if values.size else None


def measured(outcome: Outcome, load: Load, slo: Slo, warm_up: int = 0) -> Measured:
    """Latencies of one finished simulation; the first ``warm_up`` requests are left out."""
    if outcome.aborted:
        raise AssertionError("an aborted simulation has no percentiles")
    keep = slice(min(warm_up, load.size - 1), None)
    output = load.output_tokens[keep]
    # Behind a pipeline everything of a request comes out that much later.
    ttft = (outcome.first_s - outcome.arrival_s + load.drain_s)[keep]
    e2e = (outcome.finish_s - outcome.arrival_s + load.drain_s)[keep]
    start = float(outcome.arrival_s[keep][0])
    itl, weight, when = _gaps(outcome, start)
    edges = np.linspace(start, float(outcome.finish_s.max()), _BLOCKS + 1)[1:-1]
    return Measured(
        ttft=ttft,
        tpot=(e2e - ttft) / np.maximum(output - 1.0, 1.0),
        e2e=e2e,
        itl=itl,
        itl_weight=weight,
        itl_block=np.searchsorted(edges, when),
        input_tokens=load.input_tokens[keep],
        output_tokens=output,
        over_itl={
            (x.percentile, x.limit_s): _over(outcome, x.limit_s, load.output_tokens)[keep]
            for x in slo.limits
            if x.metric == "itl"
        },
        span_s=float(outcome.finish_s.max()) - start,
    )


def _gaps(outcome: Outcome, start: float) -> tuple[Floats, Floats, Floats]:
    """(gap, tokens that saw it, when), runs of growing gaps in pieces."""
    begin, first, growth, m, n = outcome.gaps
    late = begin >= start
    begin, first, growth, m, n = (x[late] for x in (begin, first, growth, m, n))
    split = (growth * m > _BIN * first) & (m >= _PIECES)
    whole = ~split
    middle = first + growth * (m - 1) / 2
    shares = (np.arange(_PIECES) + 0.5) / _PIECES
    pieces = (first[split, None] + growth[split, None] * (m[split, None] * shares - 0.5)).ravel()
    per_piece = np.repeat((m * n)[split] / _PIECES, _PIECES)
    stalled = outcome.stalls[1]
    when = np.concatenate(
        [begin[whole], np.repeat(begin[split], _PIECES), outcome.first_s[outcome.stalls[0]]]
    )
    return (
        np.concatenate([middle[whole], pieces, stalled]),
        np.concatenate([(m * n)[whole], per_piece, np.ones(stalled.size)]),
        when,
    )


def _over(outcome: Outcome, limit_s: float, output: Floats) -> Floats:
    """Share of each request's own gaps above a limit. Its first and last token fall on ends of
    events, so counting iterations between them is exact (preempted requests count those of
    others meanwhile, and the stall as one gap).
    """
    begin, first, growth, m, _ = outcome.gaps
    below = np.where(
        growth > 0,
        np.ceil((limit_s - first) / np.where(growth > 0, growth, 1.0)),
        np.where(first > limit_s, 0.0, m),
    )
    over = m - np.clip(below, 0, m)
    share = np.zeros(outcome.arrival_s.size)
    joined = outcome.first_s if outcome.decoding_s is None else outcome.decoding_s
    ends = np.append(outcome.gap_replica[1:], begin.size)
    for j, (a, b) in enumerate(zip(outcome.gap_replica, ends, strict=True)):
        mine = np.flatnonzero(outcome.replica == j)
        count = np.concatenate(([0.0], np.cumsum(over[a:b])))
        started = np.searchsorted(begin[a:b], joined[mine])
        ended = np.searchsorted(begin[a:b], outcome.finish_s[mine])
        share[mine] = count[ended] - count[started]
    np.add.at(share, outcome.stalls[0], (outcome.stalls[1] > limit_s).astype(float))
    return share / np.maximum(output - 1.0, 1.0)


def _weighted(values: Floats, weight: Floats, p: float) -> float | None:
    """Smallest value that at least p % of the weight does not exceed."""
    total = weight.sum()
    if total <= 0:
        return None
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weight[order])
    at = int(np.searchsorted(cumulative, p / 100.0 * total * (1 - 1e-12)))
    return float(values[order[min(at, values.size - 1)]])


# Verdict -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One objective: ``value`` must not exceed ``limit`` (shares: must not fall below it)."""

    key: str
    value: float
    limit: float
    holds: bool

    @property
    def use(self) -> float:
        """Share of the limit that is used; above 1 it is broken."""
        if self.key.endswith("_s"):
            return self.value / self.limit
        return (1.0 - self.value) / max(1.0 - self.limit, 1e-9)


def checks(found: Measured, slo: Slo) -> list[Check]:
    """Every objective with its value."""
    out = []
    for limit in slo.limits:
        value = found.percentile(limit.metric, limit.percentile)
        value = 0.0 if value is None else value
        out.append(
            Check(key=limit.key, value=value, limit=limit.limit_s, holds=value <= limit.limit_s)
        )
    if slo.ttft_s_per_1k_tokens is not None:
        share = float(np.mean(found.ttft <= slo.scaled_ttft_s(found.input_tokens)))
        least = slo.attainment or DEFAULT_SHARE
        out.append(Check(key="ttft_per_1k_share", value=share, limit=least, holds=share >= least))
    if slo.attainment is not None:
        share = float(np.mean(meets_all(found, slo)))
        out.append(
            Check(
                key="attainment", value=share, limit=slo.attainment, holds=share >= slo.attainment
            )
        )
    return out


def meets_all(found: Measured, slo: Slo) -> Floats:
    """Which requests meet every limit themselves."""
    ok = found.ttft <= slo.ttft_limit_s(found.input_tokens)
    ok &= found.e2e <= slo.tightest("e2e")
    ok &= (found.tpot <= slo.tightest("tpot")) | (found.output_tokens < 2)
    for (percentile, _), share in found.over_itl.items():
        ok &= share <= 1.0 - percentile / 100.0 + 1e-12
    return ok


def percentiles(found: Measured, slo: Slo) -> dict[str, float | None]:
    """``ttft_p99_s`` and so on: what results always name, and whatever the objectives name."""
    wanted = dict.fromkeys((*_ALWAYS, *((x.metric, x.percentile) for x in slo.limits)))
    return {f"{m}_p{p:g}_s": found.percentile(m, p) for m, p in wanted}


def goodput_rps(found: Measured, slo: Slo) -> float:
    """Requests per second that meet every limit."""
    return float(meets_all(found, slo).sum()) / max(found.span_s, 1e-9)


# Confidence ----------------------------------------------------------------------------------


def intervals(
    found: Measured, keys: Iterable[str], seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """95 % interval of each percentile key (``ttft_p99_s``); None where nothing was measured."""
    rng = np.random.default_rng(seed)
    out: dict[str, tuple[float, float] | None] = {}
    drawn = rng.integers(0, _BLOCKS, (_RESAMPLES, _BLOCKS))
    draws = np.stack([np.bincount(row, minlength=_BLOCKS) for row in drawn])
    cache: dict[str, tuple[Floats, Floats] | None] = {}
    for key in keys:
        metric, _, rest = key.partition("_p")
        if metric not in cache:
            cache[metric] = _histograms(found, metric)
        table = cache[metric]
        if table is None:
            out[key] = None
            continue
        counts, centres = table
        cumulative = np.cumsum(draws @ counts, axis=1)
        share = float(rest.removesuffix("_s")) / 100.0
        at = np.argmax(cumulative >= share * cumulative[:, -1:] - 1e-9, axis=1)
        low, high = np.percentile(centres[at], (2.5, 97.5))
        out[key] = (float(low), float(high))
    return out


def _histograms(found: Measured, metric: str) -> tuple[Floats, Floats] | None:
    """(weight by block and bin, bin centres) of a metric on a log grid."""
    if metric == "itl":
        values, weight, block = found.itl, found.itl_weight, found.itl_block
    else:
        values = getattr(found, metric)
        block = np.arange(values.size) * _BLOCKS // max(values.size, 1)
        if metric == "tpot":
            several = found.output_tokens > 1
            values, block = values[several], block[several]
        weight = np.ones(values.size)
    if values.size == 0:
        return None
    logs = np.log(np.maximum(values, 1e-9))
    low = logs.min()
    index = ((logs - low) / _BIN).astype(np.int64)
    width = int(index.max()) + 1
    counts = np.bincount(block * width + index, weights=weight, minlength=_BLOCKS * width)
    return counts.reshape(_BLOCKS, width), np.exp(low + (np.arange(width) + 0.5) * _BIN)

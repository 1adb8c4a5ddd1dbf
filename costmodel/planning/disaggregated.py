"""Separate pools for prompts and for answers, with the state sent from one to the other.

A prompt is computed on a prefill replica, which gives the first token; its state then travels to a
decode replica at the rate of the network. A method that compresses the cache sends less. TTFT
depends on the prefill pool alone; the second token waits for the transfer and for room in the
decode pool. Left out: sending layers while later ones are computed; prompts that wait with their
state.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from costmodel.kernels.prior import COLLECTIVE_FRACTION
from costmodel.planning.bound import Bound, bound_of
from costmodel.planning.candidate import Attained, Candidate, Parts, Screened, screen
from costmodel.planning.fleet import Outcome, simulate
from costmodel.planning.load import Load
from costmodel.planning.pricing import Estimate
from costmodel.planning.requests import Requests
from costmodel.planning.search import Search
from costmodel.planning.spec import PlanSpec

#: Set-up of one transfer.
_TRANSFER_LATENCY_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prefill and a decode candidate of the same model and method."""

    prefill: Candidate
    decode: Candidate


def pairs(everyone: list[Candidate]) -> list[Pair]:
    """Every prefill GPU and split with every decode one, same model, method, level and engine."""

    def kind(c: Candidate) -> tuple[Any, ...]:
        return (c.model, c.method, c.level, c.engine)

    plain = [c for c in everyone if c.parallel.groups == 1]
    return [Pair(prefill=a, decode=b) for a in plain for b in plain if kind(a) == kind(b)]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PairParts:
    """What a simulation of both pools needs."""

    prefill: Parts
    decode: Parts
    prompts: Load
    answers: Load
    prompt_bound: Bound
    answer_bound: Bound
    transfer_s: np.ndarray

    @property
    def prompt_rate_per_s(self) -> float:
        """Of one prefill replica: its own closed form, or what its network takes away."""
        return min(self.prompt_bound.rate_per_s, 1.0 / float(self.transfer_s.mean()))


def sent_s(finish_s: np.ndarray, replica: np.ndarray, transfer_s: np.ndarray) -> np.ndarray:
    """When each prompt's state is whole on the other side: the adapters of a replica send one
    after another, in the order in which prompts are done.
    """
    out = np.empty_like(finish_s)
    for j in np.unique(replica).tolist():
        mine = np.flatnonzero(replica == j)
        mine = mine[np.argsort(finish_s[mine], kind="stable")]
        busy = np.cumsum(transfer_s[mine])
        begun = np.maximum.accumulate(finish_s[mine] - (busy - transfer_s[mine]))
        out[mine] = begun + busy
    return out


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ScreenedPair:
    """Both screenings; ``reason`` says why the pair is out, ``miss`` by how many times."""

    pair: Pair
    prefill: Screened
    decode: Screened
    reason: str | None
    parts: PairParts | None = None
    miss: float | None = None

    def bounds(self, rate: float) -> tuple[int, int]:
        """Fewest prefill and decode replicas in closed form."""
        assert self.parts is not None
        if not np.isfinite(rate):
            return 1, 1
        prefill = max(1, int(np.ceil(rate / self.parts.prompt_rate_per_s - 1e-9)))
        return prefill, self.parts.answer_bound.replicas(rate)


def screen_pair(
    pair: Pair,
    spec: PlanSpec,
    requests: Requests,
    estimate: Estimate = "mid",
    device: Attained | None = None,
) -> ScreenedPair:
    """Everything that can be said without simulating."""
    first = screen(pair.prefill, spec, requests, estimate, device)
    second = first
    if pair.decode != pair.prefill:
        second = screen(pair.decode, spec, requests, estimate, device)
    reason = next(
        (
            f"{role} pool: {x.reason}"
            for role, x in (("prefill", first), ("decode", second))
            if x.reason is not None and (x.parts is None or "GPUs" not in x.reason)
        ),
        None,
    )
    if first.parts is None or second.parts is None or reason is not None:
        return ScreenedPair(pair=pair, prefill=first, decode=second, reason=reason)
    parts = _parts(first.parts, second.parts, spec.grid.transfer_bytes_per_s)
    out = ScreenedPair(pair=pair, prefill=first, decode=second, reason=None, parts=parts)
    n, m = out.bounds(requests.rate_per_s)
    gpus = n * pair.prefill.gpus_per_replica + m * pair.decode.gpus_per_replica
    if gpus > spec.grid.max_gpus:
        return replace(
            out,
            reason=f"needs at least {gpus} GPUs, more than the {spec.grid.max_gpus} allowed",
            miss=gpus / spec.grid.max_gpus,
        )
    return out


def _parts(first: Parts, second: Parts, bytes_per_s: float) -> PairParts:
    zero = np.zeros(first.load.size)
    prompts = replace(first.load, output_tokens=zero + 1.0, held_slope=zero, moved_slope=zero)
    answers = replace(second.load, cached_tokens=second.load.prompt_tokens, before_s=zero)
    rate = bytes_per_s * COLLECTIVE_FRACTION[1]
    return PairParts(
        prefill=first,
        decode=second,
        prompts=prompts,
        answers=answers,
        prompt_bound=bound_of(prompts, first.steps, first.pool),
        answer_bound=bound_of(answers, second.steps, second.pool),
        # Each GPU sends its part; where one side has fewer GPUs, theirs are the larger parts.
        transfer_s=_TRANSFER_LATENCY_S
        + np.maximum(first.load.held_bytes, second.load.held_bytes) / rate,
    )


def _take(load: Load, index: np.ndarray, arrival_s: np.ndarray) -> Load:
    return Load(
        arrival_s=arrival_s,
        **{
            name: getattr(load, name)[index]
            for name in (
                "input_tokens", "prompt_tokens", "cached_tokens", "output_tokens", "before_s",
                "held_bytes", "held_slope", "moved_bytes", "moved_slope",
            )
        },
    )  # fmt: skip


class PairSearch(Search):
    """As ``Search``, over both pools: ``replicas`` of a trial are those of the decode pool."""

    def __init__(self, screened: ScreenedPair, spec: PlanSpec) -> None:
        assert screened.parts is not None
        super().__init__(screened.parts.decode, spec)
        self.screened, self.both = screened, screened.parts
        self.n_prefill = 1
        self.outcomes: dict[int, tuple[Outcome, Outcome | None]] = {}

    @cached_property
    def rate_per_s(self) -> float:
        """Planned rate; infinite when all requests arrive at once."""
        span = float(self.parts.load.arrival_s[-1])
        return (self.parts.load.size - 1) / span if span > 0 else float("inf")

    def _simulated(self, replicas: int, factor: float, whole: bool) -> Outcome:
        """Prefill pool, transfer, decode pool."""
        limit, allowed = self._limit
        prompts = replace(self.both.prompts, arrival_s=self.both.prompts.arrival_s / factor)
        first = simulate(
            prompts, self.both.prefill.steps, self.both.prefill.pool, self.n_prefill,
            router=self.spec.grid.router, seed=self.spec.demand.seed,
            ttft_limit_s=None if whole else limit, allowed_late=np.inf if whole else allowed,
        )  # fmt: skip
        if first.aborted:
            return first
        several = np.flatnonzero(self.both.answers.output_tokens > 1)
        if several.size == 0:
            self.outcomes[replicas] = (first, None)
            return first
        sent = np.full(first.finish_s.size, np.inf)
        sent[several] = sent_s(
            first.finish_s[several], first.replica[several], self.both.transfer_s[several]
        )
        order = several[np.argsort(sent[several], kind="stable")]
        started, arrive = first.first_s[order], sent[order]
        second = simulate(
            _take(self.both.answers, order, arrive), self.both.decode.steps,
            self.both.decode.pool, replicas, router=self.spec.grid.router,
            seed=self.spec.demand.seed, started_s=started,
        )  # fmt: skip
        self.outcomes[replicas] = (first, second)
        return _merged(first, second, order)

    def fewest_pair(self, start: tuple[int, int], most_gpus: int) -> tuple[int, int] | None:
        """(prefill, decode) replicas that hold, also with one more of either; None if none do."""
        per_p = self.screened.pair.prefill.gpus_per_replica
        per_d = self.screened.pair.decode.gpus_per_replica
        n, last = start[0], None
        while n * per_p + per_d <= most_gpus:
            self.set_prefill(n)
            most = (most_gpus - n * per_p) // per_d
            if self._ttft_holds(most):
                m = self.fewest(start[1], most)
                if m is not None:
                    self.set_prefill(n + 1)
                    if self.holds(m):
                        self.set_prefill(n)
                        return n, m
                if last is not None and m is None and last == "decode":
                    return None  # one more prefill replica did not help the decode side
                last = "decode"
            n += 1
        return None

    def set_prefill(self, n: int) -> None:
        """Change the prefill pool; what was simulated with another one is forgotten."""
        if n != self.n_prefill:
            self.n_prefill = n
            self.trials.clear()

    def _ttft_holds(self, replicas: int) -> bool:
        trial = self.trial(max(1, replicas))
        if trial.found is None:
            return False
        return all(c.holds for c in trial.checks if c.key.startswith("ttft"))


def _merged(first: Outcome, second: Outcome, order: np.ndarray) -> Outcome:
    """One outcome: first tokens of one pool, gaps and last tokens of the other."""
    finish = first.finish_s.copy()
    finish[order] = second.finish_s
    replica = np.full(finish.size, -1)
    replica[order] = second.replica
    decoding = finish.copy()
    joined = second.arrival_s.copy()
    waited = dict(zip(second.stalls[0].tolist(), second.stalls[1].tolist(), strict=True))
    started = first.first_s[order]
    for i in range(order.size):
        joined[i] = started[i] + waited.get(i, 0.0)
    decoding[order] = joined
    return replace(
        second,
        arrival_s=first.arrival_s,
        first_s=first.first_s,
        finish_s=finish,
        replica=replica,
        stalls=(order[second.stalls[0]], second.stalls[1]),
        n_preempted=first.n_preempted + second.n_preempted,
        prefill_s=first.prefill_s + second.prefill_s,
        decode_s=first.decode_s + second.decode_s,
        span_s=float(finish.max() - first.arrival_s.min()),
        decoding_s=decoding,
    )

"""The cheapest mix of servers for a distribution of lengths, as an integer program.

Requests are cut into classes by prompt length. A server type g (GPU, split, method) that serves
only class b sustains x(g, b) requests per second in closed form; where it cannot hold or meet that
class, 0. With y(g, b) the share of class b sent to g and n(g) servers,

    minimise  sum of price(g) n(g)
    subject to  sum over b of y(g, b) rate(b) / x(g, b) <= u n(g),  sum over g of y(g, b) = 1,

u the load a server may carry. Small GPUs serve the many short prompts, large ones the few long
ones. The mix is then simulated, each class through its own router, and grown where an objective
breaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from costmodel.errors import MissingExtraError
from costmodel.hardware import load_hardware
from costmodel.planning.candidate import Candidate, screen
from costmodel.planning.requests import Requests
from costmodel.planning.spec import PlanSpec

#: Class borders as quantiles of the prompt length: the tail gets classes of its own.
QUANTILES = (0.0, 0.5, 0.75, 0.9, 0.97, 1.0)
#: Shares of its closed-form rate that a server is loaded with; each gives a mix to simulate.
LOADS = (1.0, 0.9, 0.8, 0.7, 0.6)
#: Server types that one program chooses from.
MOST_TYPES = 32

Floats = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """``counts`` servers of each type; ``shares[g, b]`` of class b go to type g."""

    counts: tuple[int, ...]
    shares: Floats
    usd_per_hour: float


def classes_of(requests: Requests) -> Floats:
    """Class of every request."""
    borders = np.unique(np.quantile(requests.input_tokens, QUANTILES[1:-1]))
    return np.searchsorted(borders, requests.input_tokens, side="left")


def cheapest_mix(
    rates: Floats, capacity: Floats, usd: Floats, gpus: Floats, max_gpus: int, load: float = 1.0
) -> Mix | None:
    """Solve the program; None where no mix serves every class.

    ``rates[b]`` requests per second, ``capacity[g, b]`` per server, ``usd[g]`` and ``gpus[g]``
    per server.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "mixed fleets need scipy, which is not installed: pip install 'lccost[plan]'"
        ) from error
    n_types, n_classes = capacity.shape
    usable = capacity > 0
    if not np.all(usable.any(axis=0)):
        return None
    n_shares = n_types * n_classes
    work = np.where(usable, rates / np.where(usable, capacity, 1.0), 0.0)
    carry = np.zeros((n_types, n_types + n_shares))
    whole = np.zeros((n_classes, n_types + n_shares))
    for g in range(n_types):
        carry[g, g] = -load
        at = n_types + g * n_classes
        carry[g, at : at + n_classes] = work[g]
        whole[:, at : at + n_classes] = np.eye(n_classes)
    total = np.concatenate([gpus, np.zeros(n_shares)])
    found = milp(
        np.concatenate([usd, np.zeros(n_shares)]),
        integrality=np.concatenate([np.ones(n_types), np.zeros(n_shares)]),
        bounds=Bounds(0, np.concatenate([np.full(n_types, max_gpus), usable.ravel() * 1.0])),
        constraints=[
            LinearConstraint(carry, -np.inf, 0.0),
            LinearConstraint(whole, 1.0, 1.0),
            LinearConstraint(total[None, :], 0, max_gpus),
        ],
    )
    if found.x is None:
        return None
    counts = np.round(found.x[:n_types]).astype(int)
    shares = np.clip(found.x[n_types:].reshape(n_types, n_classes), 0.0, 1.0)
    return Mix(counts=tuple(counts.tolist()), shares=shares, usd_per_hour=float(counts @ usd))


def class_rate(candidate: Candidate, spec: PlanSpec, requests: Requests, chosen: Floats) -> float:
    """x(g, b): closed-form rate of one replica for some of the requests; 0 where it cannot."""
    screened = screen(candidate, spec, subset_of(requests, chosen))
    if screened.parts is None or screened.given_up is None or screened.given_up.refusal:
        return 0.0
    parts = screened.parts
    ttft = spec.slo.ttft_limit_s(parts.load.input_tokens)
    late = np.mean(parts.alone.ttft_s > ttft)
    slow = np.mean(parts.alone.tpot_s > min(spec.slo.tightest("tpot"), spec.slo.tightest("itl")))
    if late > 0.5 or slow > 0.05:
        return 0.0
    return parts.bound.rate_per_s * candidate.engines_per_replica


def class_rates(candidate: Candidate, spec: PlanSpec, requests: Requests) -> list[float]:
    """x(g, b) for every class."""
    classes = classes_of(requests)
    return [
        class_rate(candidate, spec, requests, classes == b) for b in range(int(classes.max()) + 1)
    ]


def mixes(
    types: Sequence[Candidate], capacity: Floats, spec: PlanSpec, requests: Requests
) -> list[Mix]:
    """Different mixes of at least two types, cheapest first: one per load that gives another."""
    classes = classes_of(requests)
    rates = np.bincount(classes) / classes.size * requests.rate_per_s
    gpus = np.array([c.gpus_per_replica for c in types])
    price = [load_hardware(c.gpu, prices=spec.money.file).price_usd_per_hour for c in types]
    priced = np.array([p is not None for p in price])
    usd = np.array([1.0 if p is None else p[1] for p in price]) * gpus
    capacity = np.where(priced[:, None], capacity, 0.0)
    found: dict[tuple[object, ...], Mix] = {}
    for load in LOADS:
        mix = cheapest_mix(rates, capacity, usd, gpus, spec.grid.max_gpus, load)
        if mix is not None and sum(n > 0 for n in mix.counts) > 1:
            key = (mix.counts, tuple(np.round(mix.shares.ravel(), 2).tolist()))
            found.setdefault(key, mix)
    return sorted(found.values(), key=lambda m: m.usd_per_hour)


def subset_of(requests: Requests, chosen: Floats) -> Requests:
    """Some of the requests, in order."""
    index = np.flatnonzero(chosen)
    return replace(
        requests,
        arrival_s=requests.arrival_s[index],
        input_tokens=requests.input_tokens[index],
        output_tokens=requests.output_tokens[index],
        prefix_tokens=requests.prefix_tokens[index],
    )

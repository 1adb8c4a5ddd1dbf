"""What would change the answer: load, lengths, kernel efficiency, prices.

Every simulated candidate is asked again in closed form under each scenario, and scaled by its own
ratio of simulated to closed-form replicas. That is an estimate; it says which changes deserve a
plan of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite
from typing import TYPE_CHECKING, Any

from costmodel.planning.candidate import Attained, Candidate, screen
from costmodel.planning.disaggregated import Pair, screen_pair
from costmodel.planning.pricing import Estimate
from costmodel.planning.requests import Requests

if TYPE_CHECKING:
    from costmodel.planning.spec import PlanSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One change. Factors multiply (``method_outputs``: answers of every method but the plain
    one; ``mfu`` and ``mbu``: the shares of peak FLOP/s and bandwidth that kernels attain);
    ``estimate`` is the end of the kernel-time interval.
    """

    name: str
    rate: float = 1.0
    lengths: float = 1.0
    outputs: float = 1.0
    method_outputs: float = 1.0
    mfu: float = 1.0
    mbu: float = 1.0
    estimate: Estimate = "mid"


SCENARIOS = (
    Scenario(name="as planned"),
    Scenario(name="half the rate", rate=0.5),
    Scenario(name="twice the rate", rate=2.0),
    Scenario(name="four times the rate", rate=4.0),
    Scenario(name="lengths x 0.5", lengths=0.5),
    Scenario(name="lengths x 2", lengths=2.0),
    Scenario(name="answers x 1.5", outputs=1.5),
    Scenario(name="answers x 1.2 with a method", method_outputs=1.2),
    Scenario(name="MFU x 0.8", mfu=0.8),
    Scenario(name="MFU x 1.25", mfu=1.25),
    Scenario(name="MBU x 0.8", mbu=0.8),
    Scenario(name="MBU x 1.25", mbu=1.25),
    Scenario(name="kernels at the fast end", estimate="low"),
    Scenario(name="kernels at the slow end", estimate="high"),
)


def needed_replicas(
    candidate: Candidate | Pair, spec: "PlanSpec", requests: Requests, scenario: Scenario
) -> float:
    """Replicas in closed form, as a fraction; infinite where the candidate no longer fits."""
    changed = requests
    if scenario.lengths != 1.0:
        changed = changed.lengthened(scenario.lengths)
    plain = (candidate.decode if isinstance(candidate, Pair) else candidate).method == "full"
    longer = scenario.outputs * (1.0 if plain else scenario.method_outputs)
    if longer != 1.0:
        changed = changed.with_outputs(longer)
    device = Attained(mfu=scenario.mfu, mbu=scenario.mbu)
    if isinstance(candidate, Pair):
        both = screen_pair(candidate, spec, changed, scenario.estimate, device).parts
        if both is None or not isfinite(changed.rate_per_s):
            return inf
        each = 1 / both.prompt_rate_per_s + 1 / both.answer_bound.rate_per_s
        return changed.rate_per_s * scenario.rate * each
    screened = screen(candidate, spec, changed, scenario.estimate, device)
    if screened.parts is None or not isfinite(changed.rate_per_s):
        return inf
    if screened.parts.alone.broken(spec.slo, changed.input_tokens, changed.output_tokens):
        return inf
    return changed.rate_per_s * scenario.rate / screened.parts.bound.rate_per_s


def sensitivities(
    rows: Sequence[Mapping[str, Any]], needs: Sequence[Mapping[str, float]], max_gpus: int
) -> list[dict[str, Any]]:
    """The cheapest plan under each scenario and with each price at its low and high end.

    ``rows`` are feasible simulated rows and ``needs`` their replicas by scenario.
    """
    out = []

    def costs(name: str) -> list[float]:
        return [_usd(r, n, name, max_gpus) for r, n in zip(rows, needs, strict=True)]

    first = _best(rows, costs("as planned"))
    for scenario in SCENARIOS[1:]:
        out.append(_entry(scenario.name, rows, costs(scenario.name), first))
    for gpu in dict.fromkeys(p["gpu"] for r in rows for p in r["pools"]):
        for end, place in (("low", 0), ("high", 2)):
            usd = [_at_price(r, gpu, place) for r in rows]
            out.append(_entry(f"{gpu} at its {end} price", rows, usd, first))
    return out


def _at_price(row: Mapping[str, Any], gpu: str, place: int) -> float:
    """Cost of a plan when one GPU's rent is at an end of its range."""
    if row["usd_per_hour"] is None:
        return inf
    rents = [p["rent_usd_per_hour"] for p in row["pools"] if p["gpu"] == gpu]
    changed: float = row["usd_per_hour"] + sum(r[place] - r[1] for r in rents)
    return changed


def _usd(row: Mapping[str, Any], need: Mapping[str, float], name: str, max_gpus: int) -> float:
    if name == "as planned":
        return row["usd_per_hour"] if row["usd_per_hour"] is not None else inf
    if row["usd_per_hour"] is None or not isfinite(need[name]):
        return inf
    gap = row["replicas"] / max(need["as planned"], 1e-12)
    replicas = max(1, ceil(need[name] * gap - 1e-9))
    gpus = replicas * row["gpus"] // row["replicas"]
    return row["usd_per_hour"] / row["gpus"] * gpus if gpus <= max_gpus else inf


def _best(rows: Sequence[Mapping[str, Any]], usd: Sequence[float]) -> int | None:
    order = sorted(range(len(rows)), key=lambda i: (usd[i], rows[i]["rank"] or 0))
    return order[0] if order and isfinite(usd[order[0]]) else None


def _entry(
    name: str, rows: Sequence[Mapping[str, Any]], usd: Sequence[float], first: int | None
) -> dict[str, Any]:
    best = _best(rows, usd)
    return {
        "scenario": name,
        "flips": best != first,
        "cheapest": None if best is None else _label(rows[best]),
        "usd_per_hour": None if best is None else usd[best],
        "first_usd_per_hour": None if first is None or not isfinite(usd[first]) else usd[first],
        "basis": "closed form scaled by the simulated gap" if "price" not in name else "simulated",
    }


def _label(row: Mapping[str, Any]) -> str:
    tp = f" tp={row['tp']}" if row["tp"] > 1 else ""
    return f"{row['model']} {row['method_spec']} on {row['gpu']}{tp}"

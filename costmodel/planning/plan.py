"""From a checked plan file to ranked answers.

1. Every candidate is screened: does it fit, is it accurate enough, what is its closed-form best?
2. In order of their best cost, candidates are simulated in waves. One whose *best* case costs
   more than a plan already found that gives up no more accuracy is not simulated; it is listed.
3. What holds is ranked by cost, then by accuracy given up, then by GPUs.

Waves have a fixed size, so answers do not depend on the number of processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

import numpy as np

from costmodel.planning.candidate import Candidate, candidates
from costmodel.planning.disaggregated import Pair, pairs
from costmodel.planning.executors import Executor, Progress, Task
from costmodel.planning.mixed import MOST_TYPES, mixes
from costmodel.planning.requests import Requests
from costmodel.planning.sensitivity import SCENARIOS, sensitivities
from costmodel.planning.spec import PlanSpec
from costmodel.planning.worker import (
    answer_task,
    class_task,
    curve_task,
    headroom_task,
    mix_task,
    screen_task,
    sensitivity_task,
)

#: Candidates between two looks at what is beaten already.
WAVE = 8
#: Ranks whose headroom is searched.
TOP = 3
#: Fractions of the planned load in the picture of the best plan.
CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)

Row = dict[str, Any]
Report = Callable[[str, int], Progress]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer. ``rows`` are ranked: what holds first, then what was beaten, then what is out.
    ``detailed``: the first rank that is no mix of servers, which the curve and the sensitivities
    are about.
    """

    spec: PlanSpec
    workload: dict[str, Any]
    rows: list[Row]
    sensitivities: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    detailed: int = 1

    @property
    def feasible(self) -> list[Row]:
        """Rows that hold, best first."""
        return [r for r in self.rows if r["feasible"]]

    @property
    def nearest(self) -> Row | None:
        """Where nothing holds: the row that misses by least, simulated or not; then one that is
        out for what no number says (accuracy), the cheapest; None where none can run at all.
        """

        def order(row: Row) -> tuple[float, float, float]:
            usd = row["usd_per_hour"] or row["bound_usd_per_hour"] or inf
            # Equal misses: what was simulated says more.
            return (row["miss"] or inf, float(row["answered_by"] != "simulated"), usd)

        out = [r for r in self.rows if r["miss"] is not None or r["bound_replicas"] is not None]
        return min(out, key=order, default=None)


def make_plan(
    spec: PlanSpec,
    requests: Requests,
    executor: Executor,
    report: Report,
    *,
    prune: bool = True,
    details: bool = True,
) -> Plan:
    """Screen, simulate, rank. ``details``: headroom, sensitivities and the latency curve too."""
    everyone: list[Candidate | Pair] = [*candidates(spec.grid)]
    if spec.grid.disaggregated:
        everyone += pairs(candidates(spec.grid))
    screened = executor.run(
        [(screen_task, (c,)) for c in everyone], report("screening", len(everyone))
    )
    rows: dict[Candidate | Pair, Row] = dict(zip(everyone, screened, strict=True))
    todo = [c for c in everyone if rows[c]["reason"] is None]
    todo.sort(key=lambda c: (rows[c].get("bound_usd_per_hour") or inf, rows[c]["bound_replicas"]))
    progress = report("simulating", len(todo))
    while todo:
        kept: list[Candidate | Pair] = []
        for c in todo:
            winner = _beaten_by(rows[c], list(rows.values())) if prune else None
            if winner is None:
                kept.append(c)
                continue
            rows[c]["reason"] = (
                f"not simulated: even its closed form of {rows[c]['bound_replicas']} replicas at "
                f"{rows[c]['bound_usd_per_hour']:.2f} USD/h costs more than {_name(winner)} at "
                f"{winner['usd_per_hour']:.2f} USD/h"
            )
            progress(1)
        wave, todo = kept[:WAVE], kept[WAVE:]
        answers = executor.run([(answer_task, (c,)) for c in wave], progress)
        rows |= dict(zip(wave, answers, strict=True))
    made = list(rows.values())
    if spec.grid.mixed_fleets and isfinite(requests.rate_per_s):
        made += _mixed(spec, requests, executor, report)
    ranked = _ranked(made)
    by_row = {id(row): c for c, row in rows.items()}
    plan = Plan(spec=spec, workload=requests.stats(), rows=ranked)
    return _with_details(plan, by_row, executor, report) if details and plan.feasible else plan


def _with_details(
    plan: Plan, by_row: dict[int, Candidate | Pair], executor: Executor, report: Report
) -> Plan:
    best = [r for r in plan.feasible if id(r) in by_row]
    top = best[:TOP]
    if not best:
        return plan
    tasks: list[Task] = [(headroom_task, (by_row[id(r)], r["pools"])) for r in top]
    tasks += [(sensitivity_task, (by_row[id(r)], SCENARIOS)) for r in best]
    tasks.append((curve_task, (by_row[id(best[0])], best[0]["pools"], CURVE)))
    results = executor.run(tasks, report("headroom and sensitivities", len(tasks)))
    for row, extra in zip(top, results, strict=False):
        row |= extra
    needs = results[len(top) : len(top) + len(best)]
    changed = (
        [] if plan.spec.demand.is_closed else sensitivities(best, needs, plan.spec.grid.max_gpus)
    )
    return Plan(
        spec=plan.spec,
        workload=plan.workload,
        rows=plan.rows,
        sensitivities=changed,
        curve=results[-1],
        detailed=best[0]["rank"],
    )


def _mixed(spec: PlanSpec, requests: Requests, executor: Executor, report: Report) -> list[Row]:
    """Per model, the cheapest mix of server types that holds."""
    out: list[Row] = []
    for model in spec.grid.models:
        types = [c for c in candidates(spec.grid) if c.model == model][:MOST_TYPES]
        rates = executor.run(
            [(class_task, (c,)) for c in types], report("classes of lengths", len(types))
        )
        found = mixes(types, np.array(rates), spec, requests)
        if not found:
            continue
        tasks: list[Task] = [(mix_task, (tuple(types), mix)) for mix in found]
        rows = [r for r in executor.run(tasks, report("mixed fleets", len(tasks))) if r]
        # A mix that grew into servers of one type is that type's own row.
        rows = [r for r in rows if len(r["pools"]) > 1]
        rows.sort(key=lambda r: r["usd_per_hour"] if r["usd_per_hour"] is not None else inf)
        out += rows[:1]
    return out


def _beaten_by(row: Row, others: Sequence[Row]) -> Row | None:
    """A simulated plan of the same model that costs less than the row's best case and gives up no
    more accuracy.
    """
    best_case = row.get("bound_usd_per_hour")
    if best_case is None:
        return None
    lost = _lost(row)
    for other in others:
        if (
            other["feasible"]
            and other["model"] == row["model"]
            and other["usd_per_hour"] is not None
            and other["usd_per_hour"] < best_case
            and _lost(other) <= lost
        ):
            return other
    return None


def _lost(row: Row) -> float:
    drop = row["accuracy_drop_points"]
    return inf if drop is None else float(drop)


def _name(row: Row) -> str:
    return f"{row['gpus']} x {row['gpu']} with {row['method_spec']}"


def _ranked(rows: list[Row]) -> list[Row]:
    def order(row: Row) -> tuple[Any, ...]:
        usd = row["usd_per_hour"]
        if usd is None:
            usd = row.get("bound_usd_per_hour")
        kind = 0 if row["feasible"] else 1 if row["answered_by"] == "simulated" else 2
        return (kind, inf if usd is None else usd, _lost(row), row["gpus"] or inf)

    out = sorted(rows, key=order)
    for i, row in enumerate(out, start=1):
        row["rank"] = i if row["feasible"] else None
    return out

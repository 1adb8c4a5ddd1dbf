"""A plan as text and as a document."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from costmodel.planning import sentences
from costmodel.planning.plan import Plan
from costmodel.planning.requests import Requests
from costmodel.planning.spec import PlanSpec
from costmodel.results import document as envelope
from lccost.plan_tables import left_out, ranked
from lccost.show import console

Row = dict[str, Any]


def document(plan: Plan, version: str) -> dict[str, Any]:
    """The JSON of a plan: ``lccost plan`` runs it again."""
    spec = plan.spec
    where = Path(spec.where)
    folder = where.parent if where.suffix == ".toml" else Path()
    out = envelope(
        "plan",
        {"plan": _plain(spec.table), "folder": str(folder.resolve()), "file": spec.where},
        sentences.assumptions(plan),
        plan.rows,
        version,
    )
    out["definitions"] = list(sentences.DEFINITIONS)
    out["verdict"] = sentences.verdict(plan)
    out["workload"] = plan.workload
    out["slo"] = spec.slo.sentences()
    out["limits"] = [
        {"key": x.key, "metric": x.metric, "percentile": x.percentile, "limit_s": x.limit_s}
        for x in spec.slo.limits
    ]
    out["explanations"] = explanations(plan)
    out["sensitivities"] = plan.sensitivities
    out["curve"] = _rates(plan)
    out["curve_axis"] = "sessions" if plan.spec.demand.is_closed else "requests per second"
    out["detailed_rank"] = plan.detailed
    out["nearest"] = None if plan.feasible else plan.nearest
    if plan.feasible:
        out["deploy"] = sentences.deploy(plan.feasible[0], spec, plan.workload)
    return out


def _rates(plan: Plan) -> list[Row]:
    """The curve with rates; of a closed loop with sessions."""
    base = plan.spec.demand.sessions or plan.workload["rate_per_s"] or 1.0
    return [{"rate_per_s": base * c["factor"], **c} for c in plan.curve]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def explanations(plan: Plan) -> list[str]:
    """Why the answer is what it is."""
    out = sentences.binding_sentences(plan.rows)
    out += filter(
        None,
        (
            sentences.edge_sentence(plan.rows),
            sentences.gap_sentence(plan.rows),
            sentences.tail_sentence(plan.workload),
        ),
    )
    if plan.feasible:
        promise = sentences.realised_sentence(plan.feasible[0])
        out += [promise] if promise else []
    shown: dict[str, str] = {}
    for row in plan.feasible:
        text = sentences.pool_sentence(row, plan.workload)
        if text:
            shown.setdefault(row["gpu"], text)
    return [*out, *shown.values()]


def text(plan: Plan, *, markdown: bool = False) -> str:
    """The report of ``lccost plan``."""
    file = io.StringIO()
    out = console(file)
    w = plan.workload
    rate = "all at once" if w["rate_per_s"] is None else f"{w['rate_per_s']:.2f} req/s"
    if plan.spec.demand.is_closed:
        rate = "each answer brings the next request"
    out.print(
        f"Workload  {w['name']}: {rate}, {w['requests']:,} requests, input P50 "
        f"{w['input_tokens_p50']:,.0f} P99 {w['input_tokens_p99']:,.0f}, output mean "
        f"{w['output_tokens_mean']:,.0f}"
    )
    out.print(f"SLO       {', '.join(plan.spec.slo.sentences())}")
    out.print(f"Accuracy  {_floor(plan.spec)}")
    out.print()
    out.print(sentences.verdict(plan))
    out.print()
    if plan.feasible:
        out.print(ranked(plan.feasible, plan, None if markdown else out.width))
    rest = [r for r in plan.rows if not r["feasible"]]
    if rest:
        out.print(left_out(rest, markdown=markdown))
    for line in explanations(plan):
        out.print(line)
    _print_sensitivities(plan, out)
    if plan.feasible:
        commands = sentences.deploy(plan.feasible[0], plan.spec, plan.workload)
        if commands:
            out.print()
            out.print("Check rank 1:")
            for command in commands:
                out.print(f"  {command}", soft_wrap=True)
    out.print()
    for line in (*sentences.DEFINITIONS, *sentences.assumptions(plan)):
        out.print(f"- {line}")
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _floor(spec: PlanSpec) -> str:
    a = spec.accuracy
    text = "any drop" if a.max_drop_points is None else f"at most {a.max_drop_points:g} points lost"
    text += f" on {a.task_family or 'average'}"
    text += ", unknown allowed" if a.allow_unknown else ", unknown refused"
    return text + (", analogy allowed" if a.allow_analogy else "")


def _print_sensitivities(plan: Plan, out: Any) -> None:
    if not plan.sensitivities:
        return
    flips = [s for s in plan.sensitivities if s["flips"]]
    steady = [s["scenario"] for s in plan.sensitivities if not s["flips"]]
    out.print()
    rank = f"Rank {plan.detailed}"
    if plan.detailed > 1:
        rank += ", the first of one kind of server,"
    stays = "stays first under every scenario tried."
    out.print(f"{rank} changes with:" if flips else f"{rank} {stays}")
    for s in flips:
        if s["cheapest"] is None:
            out.print(f"  {s['scenario']}: nothing here holds")
        else:
            out.print(f"  {s['scenario']}: {s['cheapest']} at {s['usd_per_hour']:.2f} USD/h")
    if flips and steady:
        out.print(f"  not with: {', '.join(steady)}")


def nothing(plan: Plan) -> str:
    """Why there is no plan, for the error line."""
    text = sentences.verdict(plan)
    if plan.nearest is None and plan.rows:
        text += f" The first: {plan.rows[0]['reason']}."
    return text


def validated(spec: PlanSpec, requests: Requests) -> str:
    """What ``--validate-only`` prints."""
    # About 0.35 s per 12,000 requests and simulation, and five simulations per candidate.
    seconds = spec.size * (0.1 + 5 * 0.35 * requests.size / 12_000)
    return (
        f"{spec.where}: valid. {spec.size} candidates, {requests.size:,} requests over "
        f"{requests.span_s:,.0f} s; at most about {seconds:,.0f} s on one core.\n"
        f"SLO: {', '.join(spec.slo.sentences())}\n"
    )


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A bar per stage on a terminal's stderr; one line per stage elsewhere."""
    if quiet:
        yield lambda label, total: lambda done: None
        return
    if not sys.stderr.isatty():

        def plain(label: str, total: int) -> Callable[[int], None]:
            print(f"{label}: {total}", file=sys.stderr, flush=True)
            return lambda done: None

        yield plain
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:

        def bar(label: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(label, total=total)
            return lambda done: bars.advance(task, done)

        yield bar

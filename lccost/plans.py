"""A plan as text and as a document."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from costmodel.planning import sentences
from costmodel.planning.plan import Plan
from costmodel.planning.requests import Requests
from costmodel.planning.spec import PlanSpec
from costmodel.results import document as envelope
from costmodel.units import format_seconds
from lccost.show import console

Row = dict[str, Any]
#: Rows of candidates that are out that the table shows; the JSON has all.
_SHOWN_OUT = 12


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
    near = None if plan.feasible else plan.nearest
    out["nearest"] = near
    if plan.feasible:
        out["deploy"] = sentences.deploy(plan.feasible[0], spec)
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
    out += filter(None, (sentences.gap_sentence(plan.rows), sentences.tail_sentence(plan.workload)))
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
        out.print(_ranked(plan.feasible, plan, markdown))
    rest = [r for r in plan.rows if not r["feasible"]]
    if rest:
        out.print(_out(rest, markdown))
    for line in explanations(plan):
        out.print(line)
    _print_sensitivities(plan, out)
    if plan.feasible:
        commands = sentences.deploy(plan.feasible[0], plan.spec)
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


def _table(titles: Sequence[tuple[str, bool]], markdown: bool) -> Table:
    table = Table(
        box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, pad_edge=False, show_edge=markdown
    )
    for title, is_number in titles:
        if is_number:
            table.add_column(title, justify="right", no_wrap=True)
        else:
            table.add_column(title, overflow="fold", no_wrap=title != "why")
    return table


def _degrees(row: Row) -> str:
    return " ".join(
        [f"tp{row['tp']}", *(f"{k}{row[k]}" for k in ("pp", "ep", "cp") if (row.get(k) or 1) > 1)]
    )


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _accuracy(row: Row) -> str:
    drop = row["accuracy_drop_points"]
    if drop is None:
        return "unknown"
    if drop == 0:
        return "0"
    return f"{drop:+.1f} points" + (" (analogy)" if row["accuracy_analogy"] else "")


def _ranked(rows: Sequence[Row], plan: Plan, markdown: bool) -> Table:
    extra = [x.key for x in plan.spec.slo.limits]
    keys = list(dict.fromkeys(["ttft_p99_s", "itl_p95_s", "e2e_p99_s", *extra]))
    # What is the same in all rows needs no column.
    shown = [k for k in ("model", "level", "engine") if len({r[k] for r in plan.rows}) > 1]
    titles = [("rank", True), *((k, False) for k in shown)]
    titles += [("method", False), ("gpu", False), ("split", False), ("replicas", True),
               ("GPUs", True), ("USD/h", True), ("USD/Mtok", True), ("J/token", True)]  # fmt: skip
    titles += [(_title(k), True) for k in keys]
    titles += [("goodput", True), ("KV use", True), ("headroom", True), ("binds", False),
               ("accuracy given up", False)]  # fmt: skip
    table = _table(titles, markdown)
    for r in rows:
        headroom = "" if r["headroom"] is None else f"+{r['headroom']:.0%}"
        if r["breaks_first"]:
            headroom += f" ({_title(r['breaks_first'])})"
        cells = [str(r["rank"]), *(str(r[k]) for k in shown), r["method_spec"], r["gpu"],
                 _degrees(r), f"{r['replicas']}{'*' if r['fragile'] else ''}", str(r["gpus"]),
                 _number(r["usd_per_hour"]), _number(r["usd_per_million_tokens"], ".3g"),
                 _number(r["energy_j_per_token"], ".3g")]  # fmt: skip
        cells += [format_seconds(r[k]) for k in keys]
        cells += [_number(r["goodput_rps"]), f"{r['kv_occupancy']:.0%}", headroom, r["binds"],
                  _accuracy(r)]  # fmt: skip
        table.add_row(*cells)
    if any(r["fragile"] for r in rows):
        table.caption = "* fragile: the interval of a percentile reaches beyond its limit"
        table.caption_justify = "left"
    return table


def _title(key: str) -> str:
    metric, _, rest = key.removesuffix("_s").partition("_p")
    return f"{metric.upper()} P{rest}" if rest and rest[0].isdigit() else key.replace("_", " ")


def _out(rows: Sequence[Row], markdown: bool) -> Table:
    table = _table(
        [("out", False), ("gpu", False), ("split", False), ("closed form", True), ("why", False)],
        markdown,
    )
    for r in rows[:_SHOWN_OUT]:
        bound = "-" if r["bound_replicas"] is None else str(r["bound_replicas"])
        table.add_row(
            f"{r['model']} {r['method_spec']}", r["gpu"], _degrees(r), bound, str(r["reason"])
        )
    if len(rows) > _SHOWN_OUT:
        table.add_row(f"and {len(rows) - _SHOWN_OUT} more", "", "", "", "see --format json")
    return table


def _print_sensitivities(plan: Plan, out: Any) -> None:
    if not plan.sensitivities:
        return
    flips = [s for s in plan.sensitivities if s["flips"]]
    steady = [s["scenario"] for s in plan.sensitivities if not s["flips"]]
    out.print()
    out.print("Rank 1 changes with:" if flips else "Rank 1 holds under every scenario tried.")
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

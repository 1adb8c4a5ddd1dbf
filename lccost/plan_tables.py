"""The tables of a plan: what holds, ranked, and what is out, with the reason."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from costmodel.planning.plan import Plan
from costmodel.planning.sentences import limit_title, split_of
from costmodel.units import format_seconds

Row = dict[str, Any]
#: Rows of candidates that are out that the table shows; the JSON has all.
SHOWN_OUT = 12
#: Blanks between two columns.
_GAP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column; where the terminal is narrow those with the largest ``optional`` go first."""

    title: str
    text: Callable[[Row], str]
    is_number: bool = True
    optional: int = 0


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "-" if row[key] is None else f"{row[key]:{form}}"


def _seconds(key: str) -> Callable[[Row], str]:
    return lambda row: format_seconds(row[key])


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key])


def _accuracy(row: Row) -> str:
    drop = row["accuracy_drop_points"]
    if drop is None:
        return "unknown"
    return f"{drop:+.1f}" + (" by analogy" if row["accuracy_analogy"] else "") if drop else "0"


def _headroom(row: Row) -> str:
    if row["headroom"] is None:
        return ""
    first = f" ({limit_title(row['breaks_first'])})" if row["breaks_first"] else ""
    return f"+{row['headroom']:.0%}{first}"


def _columns(plan: Plan) -> list[Column]:
    keys = dict.fromkeys([*(x.key for x in plan.spec.slo.limits), "ttft_p99_s", "itl_p95_s"])
    asked = {x.key for x in plan.spec.slo.limits}
    # What is the same in all rows needs no column.
    vary = [k for k in ("model", "level", "engine") if len({r[k] for r in plan.rows}) > 1]
    return [
        Column(title="rank", text=_text("rank")),
        *(Column(title=k, text=_text(k), is_number=False) for k in vary),
        Column(title="method", text=_text("method_spec"), is_number=False),
        Column(title="gpu", text=_text("gpu"), is_number=False),
        Column(title="split", text=split_of, is_number=False),
        Column(title="replicas", text=lambda r: f"{r['replicas']}{'*' if r['fragile'] else ''}"),
        Column(title="GPUs", text=_text("gpus")),
        Column(title="USD/h", text=_number("usd_per_hour", ".2f")),
        Column(title="USD/Mtok", text=_number("usd_per_million_tokens", ".3g"), optional=2),
        Column(title="J/token", text=_number("energy_j_per_token", ".3g"), optional=4),
        Column(title="fleet J/token", text=_number("fleet_energy_j_per_token", ".3g"), optional=7),
        *(
            Column(title=limit_title(k), text=_seconds(k), optional=0 if k in asked else 6)
            for k in keys
        ),
        Column(title="goodput", text=_number("goodput_rps", ".2f"), optional=5),
        Column(title="KV use", text=_number("kv_occupancy", ".0%"), optional=3),
        Column(title="headroom", text=_headroom, optional=1),
        Column(title="binds", text=_text("binds"), is_number=False),
        Column(title="points given up", text=_accuracy, is_number=False),
    ]


def _fitting(columns: list[Column], rows: Sequence[Row], width: int | None) -> list[Column]:
    """Drop optional columns until the table is as wide as the terminal."""

    def needed(kept: Sequence[Column]) -> int:
        return sum(_GAP + max(len(c.title), *(len(c.text(r)) for r in rows)) for c in kept)

    kept = columns
    while width is not None and needed(kept) > width and any(c.optional for c in kept):
        first = max(kept, key=lambda c: c.optional)
        kept = [c for c in kept if c is not first]
    return kept


def ranked(rows: Sequence[Row], plan: Plan, width: int | None) -> Table:
    """Plans that hold, best first. ``width`` None: as Markdown, whole."""
    columns = _fitting(_columns(plan), rows, width)
    table = _empty([(c.title, c.is_number) for c in columns], markdown=width is None)
    for row in rows:
        table.add_row(*(c.text(row) for c in columns))
    return table


def left_out(rows: Sequence[Row], *, markdown: bool) -> Table:
    """What does not hold, was beaten, or is out."""
    titles = (("out", False), ("gpu", False), ("split", False), ("closed form", True))
    table = _empty([*titles, ("why", False)], markdown=markdown)
    for r in rows[:SHOWN_OUT]:
        bound = "-" if r["bound_replicas"] is None else str(r["bound_replicas"])
        name = f"{r['model']} {r['method_spec']}"
        table.add_row(name, r["gpu"], split_of(r), bound, str(r["reason"]))
    if len(rows) > SHOWN_OUT:
        table.add_row(f"and {len(rows) - SHOWN_OUT} more", "", "", "", "see --format json")
    return table


def _empty(titles: Sequence[tuple[str, bool]], *, markdown: bool) -> Table:
    table = Table(
        box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, pad_edge=False, show_edge=markdown
    )
    for title, is_number in titles:
        if is_number:
            table.add_column(title, justify="right", no_wrap=True)
        else:
            table.add_column(title, overflow="fold", no_wrap=title != "why")
    return table

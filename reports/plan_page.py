"""A capacity plan as one offline page and as a workbook: pure functions of its document."""

import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from costmodel.errors import MissingExtraError
from costmodel.planning.sentences import limit_title, split_of
from costmodel.units import format_seconds
from reports.charts import MOST_SERIES, Colours, chart_series
from reports.figures import planning
from reports.figures.pareto import frontier
from reports.html import Heading, Section, page, picture_of
from reports.illustrations import Illustration
from reports.labels import safe_text
from reports.tables import Column, Table

Document = Mapping[str, Any]
Row = Mapping[str, Any]
Spec = dict[str, Any]

#: Columns of the ranked table: name, title, whether it is a number, and how it reads.
_MONEY, _SECONDS = "money", "seconds"
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("rank", "rank", "whole"),
    ("model", "model", "text"),
    ("method_spec", "method", "text"),
    ("gpu", "GPU", "text"),
    ("tp", "split", "split"),
    ("replicas", "replicas", "replicas"),
    ("gpus", "GPUs", "whole"),
    ("usd_per_hour", "US$/h", _MONEY),
    ("accuracy_drop_points", "points given up", "points"),
    ("binds", "binds", "text"),
    ("ttft_p50_s", "TTFT P50 with queue", _SECONDS),
    ("ttft_p99_s", "TTFT P99 with queue", _SECONDS),
    ("tpot_p95_s", "TPOT P95", _SECONDS),
    ("itl_p95_s", "ITL P95", _SECONDS),
    ("e2e_p99_s", "E2E P99", _SECONDS),
    ("goodput_rps", "goodput (req/s)", "number"),
    ("kv_occupancy", "KV use", "share"),
    ("headroom", "headroom", "share"),
    ("max_rate_per_s", "most req/s", "number"),
    ("breaks_first", "breaks first", "limit"),
    ("fewer_breaks", "one fewer breaks", "limit"),
    ("usd_per_million_tokens", "US$/Mtok", "number"),
    ("usd_per_million_input_tokens", "in", "number"),
    ("usd_per_million_output_tokens", "out", "number"),
    ("energy_j_per_token", "J/token decode", "number"),
    ("fleet_energy_j_per_token", "J/token fleet", "number"),
    ("bound_replicas", "closed form", "whole"),
    ("level", "level", "text"),
    ("engine", "engine", "text"),
)
#: Left out where all plans have the same.
_SHARED = ("model", "level", "engine")


def html(document: Document) -> str:
    """The page: verdict, ranked table, figures, why, what would change it, evidence, provenance."""
    held = [r for r in document["results"] if r["feasible"]]
    specs = _charts(document, held)
    pictures = [(i.section, picture_of(i, specs)) for i in _illustrations(document, held)]

    def of(section: str) -> tuple[Any, ...]:
        return tuple(picture for name, picture in pictures if name == section)

    ranking = ranked_table(held, document["limits"])
    found = (
        Section(id="verdict", title="Verdict"),
        Section(id="methods", title="Plans that hold", tables=(ranking,)),
        Section(id="cost", title="Cost against accuracy", figures=of("cost")),
        Section(id="load", title="Latency against rate", figures=of("load")),
        Section(id="memory", title="Memory", figures=of("memory")),
        Section(id="why", title="What binds", items=tuple(_texts(document["explanations"]))),
        Section(id="sensitivity", title="What would change it", tables=(_changes(document),)),
        Section(id="accuracy", title="Accuracy evidence", tables=(_evidence(held),)),
        Section(id="out", title="What is out, and why", tables=(_out(document["results"]),)),
        Section(
            id="assumptions",
            title="Definitions and assumptions",
            items=tuple(_texts((*document["definitions"], *document["assumptions"]))),
        ),
        Section(id="reproduce", title="How to check and to repeat it", items=_commands(document)),
    )
    heading = Heading(
        title=safe_text(f"Capacity plan: {document['workload']['name']}", 120),
        verdict=safe_text(document["verdict"], 600),
        remarks=tuple(_texts(document["slo"])),
    )
    sections = [s for s in found if s.id == "verdict" or not s.is_empty]
    return page(heading, sections, specs, ranking, version=str(document["lccost_version"]))


def _texts(texts: Sequence[str]) -> list[str]:
    return [safe_text(str(t), 800) for t in texts]


# Tables --------------------------------------------------------------------------------------


def ranked_table(rows: Sequence[Row], limits: Sequence[Row] = ()) -> Table:
    """One row a plan that holds, best first; with every percentile that has a limit."""
    columns = [c for c in _COLUMNS if c[0] not in _SHARED or len({r.get(c[0]) for r in rows}) > 1]
    known = {name for name, _, _ in columns}
    place = next(n for n, c in enumerate(columns) if c[0] == "goodput_rps")
    asked = [(x["key"], _percentile(x), _SECONDS) for x in limits if x["key"] not in known]
    columns[place:place] = asked
    return Table(
        title="Plans that hold",
        columns=tuple(Column(name=n, title=t, is_number=k not in _WORDS) for n, t, k in columns),
        values=tuple(tuple(_value(r, n, k) for n, _, k in columns) for r in rows),
        texts=tuple(tuple(_text(r, n, k) for n, _, k in columns) for r in rows),
    )


#: Kinds of columns that are words.
_WORDS = ("text", "split", "limit")


def _percentile(limit: Row) -> str:
    queue = " with queue" if limit["metric"] == "ttft" else ""
    return f"{limit['metric'].upper()} P{limit['percentile']:g}{queue}"


def _value(row: Row, name: str, kind: str) -> Any:
    value = row.get(name)
    if kind == "limit":
        return None if value is None else limit_title(str(value))
    return split_of(row) if kind == "split" else value


def _text(row: Row, name: str, kind: str) -> str:
    text = _shown(_value(row, name, kind), "text" if kind in _WORDS else kind)
    if kind == "replicas" and row.get("fragile"):
        text += "*"
    if kind == "points" and row.get("accuracy_analogy") and row.get(name) is not None:
        text += " by analogy"
    return text


def _shown(value: Any, kind: str) -> str:
    if kind == "text":
        return "" if value is None else safe_text(str(value), 60)
    if value is None:
        return "unknown" if kind == "points" else "-"
    if kind == _SECONDS:
        return format_seconds(float(value))
    form = {
        "whole": ",.0f",
        "replicas": ",.0f",
        "share": ".0%",
        "points": ".1f",
        _MONEY: ",.2f",
    }.get(kind, ".3g")
    return f"{float(value):{form}}"


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    texts = tuple(tuple("" if v is None else safe_text(str(v), 400) for v in r) for r in rows)
    return Table(
        title=title,
        columns=tuple(Column(name=h.replace(" ", "_"), title=h) for h in heads),
        values=tuple(tuple(r) for r in rows),
        texts=texts,
    )


def _changes(document: Document) -> Table:
    rows = [
        (
            s["scenario"],
            "yes" if s["flips"] else "no",
            s["cheapest"] or "nothing holds",
            None if s["usd_per_hour"] is None else f"{s['usd_per_hour']:.2f}",
            s["basis"],
        )
        for s in document["sensitivities"]
    ]
    heads = ("with", "rank 1 changes", "cheapest then", "US$/h", "basis")
    return _table("Sensitivities", heads, rows)


def _evidence(rows: Sequence[Row]) -> Table:
    seen: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for r in rows:
        key = (r["model"], r["method_spec"])
        drop = r["accuracy_drop_points"]
        text = "unknown" if drop is None else f"{drop:.1f}"
        seen.setdefault(key, (*key, text, r["accuracy_source"]))
    heads = ("model", "method", "points given up", "evidence")
    return _table("Accuracy evidence", heads, list(seen.values()))


def _out(rows: Sequence[Row]) -> Table:
    out = [
        (r["model"], r["method_spec"], r["gpu"], split_of(r), r["bound_replicas"], r["reason"])
        for r in rows
        if not r["feasible"]
    ]
    heads = ("model", "method", "GPU", "split", "closed form", "why")
    return _table("Out", heads, out)


def _commands(document: Document) -> tuple[str, ...]:
    made = [f"lccost plan {document['inputs'].get('file', 'plan.toml')}"]
    return tuple(_texts([*document.get("deploy", ()), *made]))


# Figures -------------------------------------------------------------------------------------


def _illustrations(document: Document, held: Sequence[Row]) -> list[Illustration]:
    if not held:
        return []
    best = _detailed(document, held)
    load = partial(
        planning.plan_load, document["curve"], document["limits"], planning.row_name(best),
        _bound_rate(document, best), axis=_axis(document),
    )  # fmt: skip
    rank = best["rank"]
    return [
        Illustration(section="cost", chart="cost", title="Cost against accuracy",
                     make=partial(planning.plan_cost, held)),
        Illustration(section="cost", chart="speed", title="Speed of a user against use of a GPU",
                     make=partial(planning.plan_speed, held)),
        Illustration(section="load", chart="load", title=f"Latency of rank {rank} against rate",
                     make=load),
        Illustration(section="memory", chart="", title="Where the memory goes",
                     make=partial(planning.plan_memory, held)),
    ]  # fmt: skip


def _detailed(document: Document, held: Sequence[Row]) -> Row:
    """The plan that the curve is about."""
    return next((r for r in held if r["rank"] == document.get("detailed_rank")), held[0])


def _axis(document: Document) -> str:
    return str(document.get("curve_axis", "requests per second"))


def _bound_rate(document: Document, row: Row) -> float | None:
    """Rate at which the plan is no longer stable; a closed loop is always."""
    b = None if _axis(document) == "sessions" else row.get("binding")
    return None if not b else float(b["max_rate_per_replica_per_s"] * row["replicas"])


def _charts(document: Document, held: Sequence[Row]) -> dict[str, Spec]:
    colours = Colours()
    specs = {
        "cost": _cost(held, colours),
        "speed": _scatter(
            "Speed of a user against use of a GPU", planning.speed_points(held), held, colours,
            ("tokens/s of one user (1 / TPOT P50)", ""), ("output tokens/s of one GPU", ""),
        ),
        "load": _load(document, held),
    }  # fmt: skip
    if specs["speed"] is not None:
        best = frontier([(-x, -y) for x, y, _ in planning.speed_points(held)])
        if len(best) > 1:
            specs["speed"]["series"].append(_edge([(-x, -y) for x, y in best]))
    return {name: spec for name, spec in specs.items() if spec is not None}


def _cost(held: Sequence[Row], colours: Colours) -> Spec | None:
    """Plans without evidence stand above a line: their accuracy is unknown, not zero."""
    known = planning.cost_points(held)
    top, unknown = planning.unknown_points(held)
    spec = _scatter(
        "Cost against accuracy", [*known, *unknown], held, colours,
        ("US$ per hour", "US$"), ("accuracy given up (points)", "points"),
    )  # fmt: skip
    if spec is None:
        return None
    edge = frontier([(x, y) for x, y, _ in known])
    if len(edge) > 1:
        spec["series"].append(_edge(edge))
    if unknown:
        ends = (0.0, max(x for x, _, _ in (*known, *unknown)))
        line = [(x, top, -1, "") for x in ends]
        spec["series"].append(chart_series("above this line: accuracy unknown", "guide", line))
    return spec


def _edge(points: Sequence[tuple[float, float]]) -> Spec:
    line = [(x, y, -1, "") for x, y in points]
    return chart_series("not beaten in both (Pareto)", "roof", line)


def _scatter(
    title: str,
    points: Sequence[tuple[float, float, Row]],
    held: Sequence[Row],
    colours: Colours,
    x: tuple[str, str],
    y: tuple[str, str],
) -> Spec | None:
    """One series a method: what else differs is said where a point is touched."""
    if not points:
        return None
    number = {id(r): n for n, r in enumerate(held)}
    grouped: dict[str, list[tuple[float, float | None, int, str]]] = {}
    for a, b, row in points:
        lost = row["accuracy_drop_points"]
        accuracy = "accuracy unknown" if lost is None else f"{lost:.1f} points given up"
        tip = f"{row['gpus']} x {row['gpu']} {split_of(row)}, rank {row['rank']}, {accuracy}"
        name = str(row["method_spec"])
        grouped.setdefault(name, []).append((a, b, number[id(row)], tip))
    return {
        "title": title,
        "x": {"label": x[0], "unit": x[1], "log": 0},
        "y": {"label": y[0], "unit": y[1], "log": 0},
        "series": [
            chart_series(safe_text(name, 60), "ring", found, colour=colours(name))
            for name, found in list(grouped.items())[:MOST_SERIES]
        ],
        "omitted": max(0, len(grouped) - MOST_SERIES),
    }


def _load(document: Document, held: Sequence[Row]) -> Spec | None:
    curve = document["curve"]
    if not curve or not held:
        return None
    limits = {x["key"]: x["limit_s"] for x in document["limits"]}
    ends = (curve[0]["rate_per_s"], curve[-1]["rate_per_s"])
    series: list[Spec] = []
    for n, (key, title) in enumerate(planning.curve_titles(document["limits"]).items()):
        points = [(c["rate_per_s"], c.get(key), 0, "") for c in curve if c.get(key)]
        if points:
            series.append(chart_series(title, "line", points, colour=n))
        if key in limits:
            line = [(x, limits[key], -1, "") for x in ends]
            series.append(chart_series(f"limit of {title}", "guide", line, colour=n))
    row = _detailed(document, held)
    bound = _bound_rate(document, row)
    if bound is not None and bound <= 2 * ends[1]:
        values = [y for s in series for y in s["y"] if y]
        line = [(bound, min(values), -1, ""), (bound, max(values), -1, "")]
        series.append(chart_series("closed form: unstable beyond", "guide", line))
    return {
        "title": f"Latency of rank {row['rank']} against rate",
        "x": {"label": _axis(document), "unit": "", "log": 0},
        "y": {"label": "latency (s)", "unit": "s", "log": 10},
        "series": series,
    }


# Workbook ------------------------------------------------------------------------------------


def xlsx(document: Document) -> bytes:
    """Sheets: summary, plans with a live cost sheet, what is out, sensitivities."""
    try:
        import xlsxwriter
    except ImportError:
        raise MissingExtraError(
            "workbooks need xlsxwriter, which is not installed: pip install 'lccost[excel]'"
        ) from None
    from reports.plan_book import write_book

    out = io.BytesIO()
    options = {
        "in_memory": True, "strings_to_formulas": False, "strings_to_urls": False,
        "strings_to_numbers": False, "nan_inf_to_errors": False,
    }  # fmt: skip
    held = [r for r in document["results"] if r["feasible"]]
    tables = {
        "Plans": ranked_table(held, document["limits"]), "Out": _out(document["results"]),
        "Sensitivities": _changes(document), "Accuracy": _evidence(held),
    }  # fmt: skip
    with xlsxwriter.Workbook(out, options) as book:
        write_book(book, document, held, tables)
    return out.getvalue()

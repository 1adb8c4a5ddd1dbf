"""The smaller tables of a report: break-even, sensitivity, evidence, provenance, repetition."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from costmodel.hardware import HardwareProfile
from costmodel.units import format_si
from reports.axes import AXES
from reports.comparison import Comparison, Pair
from reports.curves import crossings, curve_series
from reports.labels import percent, safe_text, tokens
from reports.ranking import Margin
from reports.records import Records, Row
from reports.tables import Column, Table, unjoined_table

#: Curves in which break-even contexts are looked for.
BREAK_EVEN_METRICS = ("ttft_s", "tpot_s", "usd_per_million_output_tokens", "max_batch")
_VALIDATION_FIGURES = (
    *("n", "mape_percent", "median_percent", "p90_percent"),
    *("bias_percent", "coverage_percent"),
)
_MOST_ENVIRONMENTS = 3
_MOST_CROSSINGS = 200


def break_even_table(pairs: Sequence[Pair]) -> Table:
    """Contexts from which one method beats another, for every curve that is drawn."""
    values, texts = [], []
    for metric in BREAK_EVEN_METRICS:
        for c in crossings(curve_series(pairs, metric, None), metric):
            about = float(f"{c.context_tokens:.3g}")
            text = AXES[metric]
            values.append((metric, about, c.better, c.worse, c.value))
            texts.append((text.title, f"{about:,.0f}", c.better, c.worse, text.format(c.value)))
    notes = ["Interpolated between the predicted contexts; straight lines in log-log."]
    if len(values) > _MOST_CROSSINGS:
        notes.insert(0, f"The first {_MOST_CROSSINGS} of {len(values)}.")
    return Table(
        title="Break-even",
        columns=(
            Column(name="metric", title="metric"),
            Column(name="context_tokens", title="from context of", is_number=True),
            Column(name="better", title="better from there"),
            Column(name="worse", title="than"),
            Column(name="value", title="both at", is_number=True),
        ),
        values=tuple(values[:_MOST_CROSSINGS]),
        texts=tuple(texts[:_MOST_CROSSINGS]),
        notes=tuple(notes),
    )


def sensitivity_table(found: Sequence[Margin]) -> Table:
    """How far the best is from the next, and whether the intervals keep them apart."""
    words: dict[bool | None, str] = {
        True: "holds over the whole interval",
        False: "may flip: intervals overlap",
    }
    rows = [
        (m.place, m.best, m.second, m.metric, 100 * m.apart_fraction, words.get(m.is_settled, ""))
        for m in found
    ]
    return Table(
        title="What could turn the ranking round",
        columns=(
            Column(name="point", title="point"),
            Column(name="best", title="best"),
            Column(name="second", title="next"),
            Column(name="metric", title="by"),
            Column(name="apart_percent", title="apart by", is_number=True),
            Column(name="settled", title="low to high"),
        ),
        values=tuple(rows),
        texts=tuple(
            (place, best, second, AXES[metric].title, percent(apart), words_)
            for place, best, second, metric, apart, words_ in rows
        ),
        notes=(
            "The ranking flips if the two predictions err against each other by more than the "
            "distance. Errors of one device usually point the same way, so overlapping intervals "
            "are a warning, not a finding.",
        ),
    )


def accuracy_table(pairs: Sequence[Pair]) -> Table:
    """What each method gives up and the evidence for it, with the contexts it stands for."""
    seen: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for p in pairs:
        if p.predicted is None:
            continue
        drop, source = p.value("accuracy_drop_points"), p.predicted.text("accuracy_source")
        context = p.key.number("context_tokens")
        name = safe_text(p.key.method_spec, 48)
        row = (name, safe_text(p.key.text("model"), 40), drop, source)
        key = tuple(map(str, row))
        low, high = seen[key][4:6] if key in seen else (context, context)
        seen[key] = (*row, *_range(low, high, context))
    rows = tuple(seen.values())
    return Table(
        title="Accuracy evidence",
        columns=(
            Column(name="method_spec", title="method"),
            Column(name="model", title="model"),
            Column(name="accuracy_drop_points", title="points given up", is_number=True),
            Column(name="accuracy_source", title="evidence"),
            Column(name="from_context_tokens", title="shown from", is_number=True),
            Column(name="to_context_tokens", title="to context", is_number=True),
        ),
        values=rows,
        texts=tuple(
            (
                *(r[0], r[1], "unknown" if r[2] is None else f"{r[2]:.3g}"),
                *(safe_text(r[3]) or "none", tokens(r[4]), tokens(r[5])),
            )
            for r in rows
        ),
        notes=("Points of the benchmark's score against the same model with the full cache.",),
    )


def _range(
    low: float | None, high: float | None, context: float | None
) -> tuple[float | None, float | None]:
    known = [v for v in (low, high, context) if v is not None]
    return (min(known), max(known)) if known else (None, None)


def provenance_table(profiles: Sequence[HardwareProfile]) -> Table:
    """The numbers of the devices with their sources."""
    rows: list[tuple[Any, ...]] = []
    for h in profiles:
        for dtype, peak in h.peak_flops_per_s.items():
            field = f"peak_flops_per_s.{dtype}"
            rows.append((h.name, f"peak {dtype}", peak, "FLOP/s", *_source(h, field)))
        rows.append(
            (h.name, "memory bandwidth", h.hbm_bytes_per_s, "B/s", *_source(h, "hbm_bytes_per_s"))
        )
        rows.append((h.name, "memory", h.memory_bytes, "B", *_source(h, "memory_bytes")))
        if h.price_usd_per_hour:
            price = h.price_usd_per_hour[1]
            source = h.price_source or h.price_date
            rows.append((h.name, "price", price, "US$ per hour", source, h.price_date))
    return Table(
        title="Hardware",
        columns=(
            Column(name="device", title="device"),
            Column(name="quantity", title="quantity"),
            Column(name="value", title="value", is_number=True),
            Column(name="unit", title="unit"),
            Column(name="source", title="source"),
            Column(name="confidence", title="confidence"),
        ),
        values=tuple(rows),
        texts=tuple(
            (
                *(safe_text(r[0], 40), r[1], _amount(r[2], r[3]), r[3]),
                # A sheet's figures share a source: said once, then as above.
                "as above" if n and r[4] and rows[n - 1][4] == r[4] else safe_text(r[4], 300),
                safe_text(r[5], 40),
            )
            for n, r in enumerate(rows)
        ),
    )


def _amount(value: float, unit: str) -> str:
    return f"{value:.2f}" if unit.startswith("US$") else format_si(value, unit)


def _source(h: HardwareProfile, field: str) -> tuple[str, str]:
    parent = field.split(".")[0]
    return (
        h.sources.get(field) or h.sources.get(parent, ""),
        h.confidence.get(field) or h.confidence.get(parent, ""),
    )


def validation_table(records: Records) -> Table:
    """Figures of ``validate`` documents: the kind's primary metric, then its groups."""
    rows: list[tuple[Any, ...]] = []
    for row in records.validations:
        kind, overall, groups = (row.values.get(k) for k in ("kind", "overall", "groups"))
        listed: list[tuple[str, Any]] = [("overall", overall)]
        for group in groups if isinstance(groups, list) else []:
            if isinstance(group, dict):
                named = group.get("group")
                parts = named.values() if isinstance(named, dict) else [named]
                listed.append((", ".join(str(p) for p in parts if p is not None), group))
        for name, figures in listed:
            found = Row(figures if isinstance(figures, dict) else {})
            numbers = tuple(found.number(f) for f in _VALIDATION_FIGURES)
            rows.append(
                (safe_text(str(kind), 40), safe_text(name, 80), *numbers, found.text("basis"))
            )
    return Table(
        title="Validation against published measurements",
        columns=(
            Column(name="kind", title="kind"),
            Column(name="group", title="group"),
            Column(name="n", title="n", is_number=True),
            *(
                Column(
                    name=f, title=f.removesuffix("_percent").replace("mape", "MAPE"), is_number=True
                )
                for f in _VALIDATION_FIGURES[1:]
            ),
            Column(name="basis", title="basis"),
        ),
        values=tuple(rows),
        texts=tuple(
            (
                *(r[0], r[1], "-" if r[2] is None else f"{r[2]:.0f}"),
                *(
                    percent(v, signed=f == "bias_percent")
                    for f, v in zip(_VALIDATION_FIGURES[1:], r[3:8], strict=True)
                ),
                safe_text(r[-1], 24),
            )
            for r in rows
        ),
    )


def left_out_table(comparison: Comparison, records: Records) -> Table:
    """Records that were not compared and predictions that do not apply, with the reason."""
    table = unjoined_table(comparison)
    refused = [r for r in records.predictions if r.values.get("applicable") is False]
    rows = tuple(
        (r.origin, safe_text(r.method_spec, 48), r.text("reason", "not applicable"))
        for r in refused
    )
    return Table(
        title="Left out",
        columns=table.columns,
        values=table.values + rows,
        texts=table.texts + tuple(tuple(safe_text(c, 200) for c in row) for row in rows),
    )


def reproduce_table(records: Records, command: str, version: str) -> Table:
    """The command, versions, inputs and environments behind the report."""
    rows: list[tuple[str, str]] = []
    if command:
        rows.append(("command", command))
    if version:
        rows.append(("lccost", version))
    for header in records.headers:
        name = header.text("command")
        if name:
            inputs = json.dumps(header.values.get("inputs"), sort_keys=True, ensure_ascii=False)
            rows.append((f"inputs of lccost {name}", inputs))
            rows.append(("made with lccost", header.text("lccost_version", "?")))
    environments = dict.fromkeys(
        json.dumps(r.values["environment"], sort_keys=True, ensure_ascii=False)
        for r in records.measurements
        if isinstance(r.values.get("environment"), dict)
    )
    for n, text in enumerate(list(environments)[:_MOST_ENVIRONMENTS], start=1):
        rows += [(f"environment {n}: {name}", value) for name, value in _flat(json.loads(text))]
    if len(environments) > _MOST_ENVIRONMENTS:
        rows.append(("environments", f"{len(environments)} in all; the first ones are shown"))
    rows = list(dict.fromkeys(rows))
    return Table(
        title="How to reproduce",
        columns=(Column(name="what", title="what"), Column(name="value", title="value")),
        values=tuple(rows),
        texts=tuple((safe_text(a, 80), safe_text(b, 2000)) for a, b in rows),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found.append((f"{prefix}{name}", text))
    return found[:60]

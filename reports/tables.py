"""The tables of a comparison: error by group, every point, what was left out.

Renderings (``render``, ``rich_table``) are those of :mod:`reports.tabular`.
"""

from collections.abc import Sequence
from typing import Any

from reports.comparison import Comparison, ErrorGroup, error_groups, parse_fields
from reports.labels import METRIC_TITLES, metric_value, percent, safe_text, tokens
from reports.tabular import Column as Column
from reports.tabular import Table as Table
from reports.tabular import markdown_text as markdown_text
from reports.tabular import render as render
from reports.tabular import rich_table as rich_table
from reports.tabular import to_csv as to_csv
from reports.tabular import to_markdown as to_markdown

SIGN_NOTE = (
    "Error = (predicted - observed) / observed; MAPE, median and p90 are of its size, "
    "bias is the median signed error."
)


def error_table(
    comparison: Comparison, by: str | Sequence[str] = ("method",), *, exact_rows: bool = True
) -> Table:
    """Error by group, metric and basis (see :class:`~reports.comparison.ErrorGroup`).

    Without ``exact_rows`` a metric that is exact in every group is a note instead of rows.
    """
    fields = parse_fields(by)
    groups = error_groups(comparison, fields)
    notes = [SIGN_NOTE, *_basis_notes(groups)]
    if not exact_rows:
        inexact = {g.metric for g in groups if g.worst_percent != 0}
        exact = dict.fromkeys(METRIC_TITLES[g.metric] for g in groups if g.metric not in inexact)
        groups = tuple(g for g in groups if g.metric in inexact)
        if exact:
            notes.insert(0, f"Exact in every record: {', '.join(exact)}.")
    columns = (
        *(Column(name=f, title=_FIELD_TITLES.get(f, f.replace("_", " "))) for f in fields),
        Column(name="metric", title="metric"),
        Column(name="basis", title="basis"),
        Column(name="n", title="n", is_number=True),
        Column(name="n_noisy", title="noisy", is_number=True),
        Column(name="mape_percent", title="MAPE", is_number=True),
        Column(name="median_percent", title="median", is_number=True),
        Column(name="p90_percent", title="p90", is_number=True),
        Column(name="bias_percent", title="bias", is_number=True),
        Column(name="worst_percent", title="worst", is_number=True),
        Column(name="worst_point", title="worst at"),
        Column(name="worst_origin", title="record"),
    )
    return Table(
        title="Prediction error",
        columns=columns,
        values=tuple(_group_values(g, fields) for g in groups),
        texts=tuple(_group_texts(g, fields) for g in groups),
        notes=tuple(notes),
    )


def point_table(comparison: Comparison) -> Table:
    """Every joined metric of every pair: predicted, observed, error."""
    values, texts = [], []
    for e in comparison.errors:
        key = e.pair.key
        fields = (key.method_spec, key.text("level"), key.text("model"), key.device)
        context, batch = key.number("context_tokens"), key.number("batch")
        error = e.error * 100.0
        values.append(
            (
                *(*fields, context, batch, e.metric, e.predicted, e.observed, error),
                *(e.pair.basis, key.status, key.origin),
            )
        )
        texts.append(
            (
                *(*(safe_text(f, 48) for f in fields), tokens(context), tokens(batch)),
                *(METRIC_TITLES[e.metric], metric_value(e.metric, e.predicted)),
                *(metric_value(e.metric, e.observed), percent(error, signed=True)),
                *(e.pair.basis, "noisy" if e.pair.is_noisy else key.status),
                _short_origin(key.origin),
            )
        )
    return Table(
        title="Predicted beside observed",
        columns=_POINT_COLUMNS,
        values=tuple(values),
        texts=tuple(texts),
        notes=(SIGN_NOTE.split(";")[0] + ".",),
    )


def unjoined_table(comparison: Comparison) -> Table:
    """Records that take no part, with the reason."""
    rows = tuple((u.origin, u.label, u.reason) for u in comparison.unjoined)
    return Table(
        title="Not compared",
        columns=(
            Column(name="record", title="record"),
            Column(name="point", title="point"),
            Column(name="reason", title="why"),
        ),
        values=rows,
        texts=tuple(tuple(safe_text(cell, 160) for cell in row) for row in rows),
    )


_FIELD_TITLES = {"context_tokens": "context", "method_spec": "method", "output_tokens": "output"}
_POINT_COLUMNS = (
    Column(name="method_spec", title="method"),
    Column(name="level", title="level"),
    Column(name="model", title="model"),
    Column(name="gpu", title="device"),
    Column(name="context_tokens", title="context", is_number=True),
    Column(name="batch", title="batch", is_number=True),
    Column(name="metric", title="metric"),
    Column(name="predicted", title="predicted", is_number=True),
    Column(name="observed", title="observed", is_number=True),
    Column(name="error_percent", title="error", is_number=True),
    Column(name="basis", title="basis"),
    Column(name="status", title="status"),
    Column(name="record", title="record"),
)


def _group_values(group: ErrorGroup, fields: Sequence[str]) -> tuple[Any, ...]:
    return (
        *(group.group.get(f) for f in fields),
        *(group.metric, group.basis, group.n, group.n_noisy),
        *(group.mape_percent, group.median_percent, group.p90_percent, group.bias_percent),
        *(group.worst_percent, group.worst_point, group.worst_origin),
    )


def _group_texts(group: ErrorGroup, fields: Sequence[str]) -> tuple[str, ...]:
    noisy = str(group.n_noisy) if group.n_noisy else ""
    head = (
        *(_field_text(f, group.group.get(f)) for f in fields),
        *(METRIC_TITLES[group.metric], safe_text(group.basis, 24), str(group.n), noisy),
    )
    if group.worst_percent == 0:
        # The worst of nothing but exact hits is no news.
        return (*head, "exact", *[""] * 6)
    return (
        *head,
        percent(group.mape_percent),
        *(percent(group.median_percent), percent(group.p90_percent)),
        *(percent(group.bias_percent, signed=True), percent(group.worst_percent, signed=True)),
        *("" if group.n == 1 else group.worst_point, _short_origin(group.worst_origin)),
    )


def _short_origin(origin: str) -> str:
    """The file's name and line without its folders."""
    return safe_text(origin.replace("\\", "/").rsplit("/", 1)[-1], 60)


def _field_text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_tokens") and isinstance(value, (int, float)):
        return tokens(float(value))
    return safe_text(str(value), 48)


def _basis_notes(groups: Sequence[ErrorGroup]) -> tuple[str, ...]:
    bases = sorted({g.basis for g in groups})
    if len(bases) < 2:
        return ()
    return (f"Predictions of different basis are kept apart: {', '.join(bases)}.",)

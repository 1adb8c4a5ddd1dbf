"""``lccost compare``."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lccost.commands.common import (
    EXIT_TOLERANCE,
    EXIT_USAGE,
    CommandError,
    emit,
    handle_errors,
    refuse_inputs,
    to_json,
)

EXAMPLES = """
\b
Examples:
  lccost compare runs.jsonl
  lccost compare runs.jsonl --by method,context --format md
  lccost compare runs.jsonl --gpu my-machine.toml --max-error 15%
"""


class Percent(click.ParamType):  # type: ignore[type-arg]
    """A tolerance: 15% or 0.15."""

    name = "percent"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As a fraction."""
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
        except ValueError:
            self.fail(f"expected a tolerance such as 15% or 0.15, got {value!r}", param, ctx)
        if not 0.0 < number < 1e6:
            self.fail(f"expected a positive tolerance, got {value!r}", param, ctx)
        return number


@click.command(epilog=EXAMPLES)
@click.argument("records", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--by", default="method", show_default=True, help="Fields to group by.")
@click.option("--gpu", default=None, help="Profile for records without a prediction of their own.")
@click.option(
    "--max-error",
    type=Percent(),
    default=None,
    help="Exit with 5 when the mean absolute error (MAPE) of a group, over its records "
    "of one metric and basis, is larger (15% or 0.15); or when nothing joins.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(("table", "json", "csv", "md")),
    default="table",
    show_default=True,
)
@click.option("--output", type=click.Path(path_type=Path), default=None, help="File to write.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    default=None,
    help="Roofline picture with predicted rings and observed dots.",
)
@handle_errors
def compare(
    records: tuple[Path, ...],
    by: str,
    gpu: str | None,
    max_error: float | None,
    form: str,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Join measurements with predictions of the same point and print the error.

    A record's own prediction is used, or one in the files given, or one computed for its key.
    Tables leave out metrics that are exact in every group; json, csv and md have them.
    """
    from costmodel.hardware import load_hardware
    from lccost import __version__
    from lccost.joins import predict_record
    from reports.comparison import compare as join
    from reports.comparison import error_groups, parse_fields
    from reports.records import read_records
    from reports.tables import error_table, render, unjoined_table

    refuse_inputs(output, *records)
    refuse_inputs(plot, *records)
    hardware = load_hardware(gpu) if gpu else None

    def predicted(fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return predict_record(fields, hardware)

    fields = parse_fields(by)  # before anything is read
    comparison = join(read_records(records), predicted)
    if not comparison.pairs and not comparison.unjoined:
        found = "; ".join(comparison.notes) or "no measurement and no prediction"
        raise CommandError(f"there is nothing to compare: {found}", EXIT_USAGE)
    # People want news; scripts want every group.
    table = error_table(comparison, by, exact_rows=form != "table")
    # What reading tolerated (an empty file, a torn last line) must not pass unsaid.
    table = replace(table, notes=(*table.notes, *comparison.notes))
    if form == "json":
        text = to_json(
            {
                "schema_version": "1",
                "lccost_version": __version__,
                "command": "compare",
                "inputs": {"records": [str(r) for r in records], "by": by, "gpu": gpu},
                "assumptions": list(table.notes),
                "results": table.dicts(),
                "unjoined": unjoined_table(comparison).dicts(),
            }
        )
    else:
        text = render(table, form)
        if form in ("table", "md") and comparison.unjoined:
            text += "\n" + render(unjoined_table(comparison), form)
    if plot is not None:
        from reports.figures import roofline, save_figure

        names = {str(p.key.values.get("gpu")) for p in comparison.pairs}
        if not names:
            raise CommandError("--plot: no record has a prediction to be drawn beside", EXIT_USAGE)
        if hardware is None and len(names) > 1:
            raise CommandError(
                f"--plot: one roofline is of one device, and the records are of {len(names)} "
                f"({', '.join(sorted(names))}): give files of one, or --gpu",
                EXIT_USAGE,
            )
        profile = hardware or load_hardware(names.pop())
        save_figure(roofline(comparison.pairs, profile), plot)
    emit(text, output)
    if max_error is not None:
        lost = [(p, name) for p in comparison.pairs for name in sorted(p.not_numbers)]
        if lost:
            first, name = lost[0]
            raise CommandError(
                f"{len(lost)} metrics are no numbers, so no error is inside the tolerance; the "
                f"first: {name} of {first.key.origin}",
                EXIT_TOLERANCE,
            )
        late = [g for g in error_groups(comparison, fields) if g.mape_percent > 100 * max_error]
        if late:
            worst = max(late, key=lambda g: g.mape_percent)
            of = ", ".join(f"{name} {value}" for name, value in worst.group.items()) or "all"
            size = (
                f"{worst.mape_percent:.1f} %"
                if math.isfinite(worst.mape_percent)
                else f"no bound (zero was observed in {worst.worst_origin})"
            )
            raise CommandError(
                f"{len(late)} of the groups are outside {max_error:.0%}; the largest: "
                f"{worst.metric} of {of} with {size}",
                EXIT_TOLERANCE,
            )
        if not comparison.errors:
            raise CommandError(
                "nothing was joined, so no error is inside the tolerance", EXIT_TOLERANCE
            )

"""``lccost report``."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lccost.commands.common import handle_errors, refuse_inputs

EXAMPLES = """
\b
Examples:
  lccost report runs.jsonl --output report.html
  lccost predict --model llama-3.1-8b --gpu l40s --context 8k,32k --method full,kivi --output p.json
  lccost report p.json --output report.html
"""


@click.command(epilog=EXAMPLES)
@click.argument("records", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The ending decides the form, as listed above.",
)
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    help="Profile of the records' device when its name is not bundled; repeats.",
)
@click.option("--title", default="", help="Heading of the report.")
@handle_errors
def report(records: tuple[Path, ...], output: Path, gpus: tuple[str, ...], title: str) -> None:
    """Turn records into one report: verdict, ranking, rooflines, errors, memory, curves.

    Pure function of the files: the same records give the same bytes. Endings: .html (one offline
    page), .md, .pdf (the figures), .csv, .xlsx, .json.
    """
    from lccost import __version__
    from lccost.joins import predict_record, profiles_of
    from reports.documents import write_report
    from reports.records import read_records
    from reports.report import build_report

    refuse_inputs(output, *records)
    read = read_records(records)
    profiles = profiles_of(read.measurements + read.predictions, gpus)
    by_name = {p.name: p for p in profiles}

    def predicted(fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return predict_record(fields, by_name.get(str(fields.get("gpu"))))

    made = build_report(
        read,
        hardware=profiles,
        predict=predicted,
        title=title,
        command=f"lccost {shlex.join(sys.argv[1:])}",
        version=__version__,
    )
    write_report(made, output, version=__version__)
    click.echo(f"wrote {output}", err=True)

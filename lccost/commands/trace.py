"""``lccost trace``."""

from pathlib import Path
from typing import Any

import click

from lccost import __version__
from lccost.commands.common import emit, handle_errors, refuse_inputs, to_csv, to_json

EXAMPLES = """
\b
Examples:
  lccost trace stats mooncake_conversation.jsonl
  lccost trace stats azure.csv requests.csv --format json
  lccost trace convert BurstGPT_1.csv --output requests.csv
  lccost trace convert plan.toml --output requests.jsonl
"""


@click.group(epilog=EXAMPLES)
def trace() -> None:
    """Workload traces: what is in them, and as plain csv.

    Read as they are: Mooncake jsonl, Azure csv, BurstGPT csv, and
    arrival_s,input_tokens,output_tokens[,prefix_tokens].
    """


@trace.command(epilog=EXAMPLES)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(("table", "json", "csv")),
    default="table",
    show_default=True,
)
@click.option("--output", type=click.Path(path_type=Path), default=None, help="File to write.")
@handle_errors
def stats(files: tuple[Path, ...], form: str, output: Path | None) -> None:
    """Rate, burstiness, lengths and reusable prefixes of each trace."""
    from costmodel.planning.traces import read_trace

    refuse_inputs(output, *files)
    rows = [read_trace(file).stats() for file in files]
    if form == "json":
        inputs = {"files": [str(f) for f in files]}
        emit(to_json(_document(inputs, rows)), output)
    elif form == "csv":
        emit(to_csv(rows), output)
    else:
        emit(_text(rows), output)


@trace.command(epilog=EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), default=None, help="File to write: .csv or .jsonl."
)
@click.option("--rows", type=click.IntRange(1), default=None, help="Only the first so many.")
@handle_errors
def convert(file: Path, output: Path | None, rows: int | None) -> None:
    """A trace, or the requests of a plan, as a trace.

    As arrival_s,input_tokens,output_tokens,prefix_tokens; a file that ends in .jsonl is written in
    Mooncake's form, which load generators replay. FILE may be a plan.toml or the JSON of a plan:
    its requests are those that the plan draws.
    """
    from costmodel.planning.traces import as_csv, as_mooncake, read_trace

    refuse_inputs(output, file)
    if file.suffix.lower() in (".toml", ".json"):
        from lccost.commands.plan import read_plan_file

        stream = read_plan_file(file).demand.requests()
    else:
        stream = read_trace(file)
    as_lines = as_mooncake if output is not None and output.suffix == ".jsonl" else as_csv
    emit("\n".join(as_lines(stream, rows)), output)


def _document(inputs: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    from costmodel.results import document

    return document("trace", inputs, [], rows, __version__)


def _text(rows: list[dict[str, Any]]) -> str:
    keys = [k for k in rows[0] if k not in ("name", "notes")]
    width = max(len(k) for k in keys)
    columns = [max(len(r["name"]), 14) for r in rows]
    out = [" " * width + "".join(f"  {r['name']:>{c}}" for r, c in zip(rows, columns, strict=True))]
    for key in keys:
        cells = "".join(f"  {_cell(key, r[key]):>{c}}" for r, c in zip(rows, columns, strict=True))
        out.append(f"{key:<{width}}{cells}")
    return "\n".join(out)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if "share" in key:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"

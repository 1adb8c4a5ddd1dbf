"""``lccost trace``."""

from pathlib import Path
from typing import Any

import click

from lccost import __version__
from lccost.commands.common import emit, handle_errors, to_csv, to_json

EXAMPLES = """
\b
Examples:
  lccost trace stats mooncake_conversation.jsonl
  lccost trace stats azure.csv requests.csv --format json
  lccost trace convert BurstGPT_1.csv --output requests.csv
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
@click.option("--output", type=click.Path(path_type=Path), default=None, help="File to write.")
@click.option("--rows", type=click.IntRange(1), default=None, help="Only the first so many.")
@handle_errors
def convert(file: Path, output: Path | None, rows: int | None) -> None:
    """A trace as arrival_s,input_tokens,output_tokens,prefix_tokens."""
    from costmodel.planning.traces import read_trace

    stream = read_trace(file)
    lines = ["arrival_s,input_tokens,output_tokens,prefix_tokens"]
    columns = (stream.arrival_s, stream.input_tokens, stream.output_tokens, stream.prefix_tokens)
    for a, i, o, p in list(zip(*(c.tolist() for c in columns), strict=True))[:rows]:
        lines.append(f"{a:.9g},{i:.0f},{o:.0f},{p:.0f}")
    emit("\n".join(lines), output)


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

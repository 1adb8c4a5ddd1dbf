"""``lccost validate``."""

from pathlib import Path

import click

from lccost.commands.common import emit, handle_errors, refuse_inputs, to_json

EXAMPLES = """
\b
Examples:
  lccost validate decode_attention.csv
  lccost validate gemm.csv --baseline datasheet --format json
  lccost validate my-kernels.csv --gpu my-gpu.toml
"""


@click.command(epilog=EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--kind", default=None, help="Kind of table [default: inferred from its columns].")
@click.option(
    "--baseline",
    type=click.Choice(("datasheet",)),
    default=None,
    help="Judge the datasheet roofline instead of the model.",
)
@click.option(
    "--gpu",
    default=None,
    help="Profile that replaces the GPU of every row, such as a calibrated one.",
)
@click.option(
    "--worst",
    "n_worst",
    type=click.IntRange(0, 10_000),
    default=10,
    show_default=True,
    help="How many of the worst rows to list.",
)
@click.option(
    "--format", "form", type=click.Choice(("table", "json")), default="table", show_default=True
)
@click.option("--output", type=click.Path(path_type=Path), default=None, help="File to write.")
@handle_errors
def validate(
    file: Path,
    kind: str | None,
    baseline: str | None,
    gpu: str | None,
    n_worst: int,
    form: str,
    output: Path | None,
) -> None:
    """Predict every row of a table of measurements and report the error.

    Nothing is fitted: predictions come from the columns that describe the call, never from what was
    observed. Rows that cannot be modelled are counted with the reason.
    """
    from costmodel.hardware import load_hardware
    from costmodel.validation import validate as run
    from lccost import __version__
    from lccost.sweep import SCHEMA_VERSION
    from lccost.validation import as_text

    refuse_inputs(output, file, gpu)
    hardware = load_hardware(gpu) if gpu else None
    result = run(file, kind=kind, baseline=baseline, hardware=hardware, n_worst=n_worst)
    if form == "json":
        text = to_json(
            {
                "schema_version": SCHEMA_VERSION,
                "lccost_version": __version__,
                "command": "validate",
                "inputs": {
                    "file": str(file),
                    "kind": result.kind,
                    "baseline": baseline,
                    "gpu": gpu,
                },
                "assumptions": list(result.assumptions),
                "results": result.as_dict(),
            }
        )
    else:
        text = as_text(result)
    emit(text, output)

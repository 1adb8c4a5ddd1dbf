"""``lccost calibrate``."""

from pathlib import Path

import click

from lccost.commands.common import handle_errors

EXAMPLES = """
\b
Examples:
  lccost calibrate --device cpu --quick --output this-cpu.toml
  lccost predict --model ./config.json --gpu this-cpu.toml --context 2k
"""


@click.command(epilog=EXAMPLES)
@click.option("--device", default="cpu", show_default=True, help="What to measure.")
@click.option("--quick", is_flag=True, help="About 20 s instead of up to 2 minutes.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="CPU threads that later measurements will use.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Profile to write; --gpu accepts it everywhere.",
)
@handle_errors
def calibrate(device: str, quick: bool, threads: int, output: Path) -> None:
    """Measure this device once and write a hardware profile of it.

    Matmuls, attention, streaming and dispatch with cold buffers, as curves of efficiency over size:
    predictions with the profile are about this very device, and say so (basis calibrated).
    """
    from lccost.measuring import require_torch
    from measure.calibrate import calibrate as run

    require_torch()

    path = run(device=device, quick=quick, threads=threads, output=output)
    click.echo(f"wrote {path}; use it with --gpu {path}", err=True)

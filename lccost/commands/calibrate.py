"""``lccost calibrate``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lccost.commands.common import (
    EXIT_USAGE,
    CommandError,
    handle_errors,
    refuse_inputs,
    write_atomic,
)

if TYPE_CHECKING:
    from costmodel.calibration.profile import Calibration

EXAMPLES = """
\b
Examples:
  lccost calibrate --device cpu --quick --output this-cpu.toml
  lccost predict --model ./config.json --gpu this-cpu.toml --context 2k
  lccost calibrate --table gemm.csv --gpu h100-sxm --output my-h100.toml
  lccost calibrate --table my-kernels.csv --gpu my-gpu.toml --output my-gpu-calibrated.toml
"""


@click.command(epilog=EXAMPLES)
@click.option("--device", default=None, help="What to measure [default: cpu, without --table].")
@click.option(
    "--table",
    type=click.Path(path_type=Path),
    default=None,
    help="CSV of measured kernels to fit instead (columns: docs/model.md).",
)
@click.option(
    "--gpu",
    default=None,
    help="The GPU's profile or a .toml of your own: of a table's kernels, or of --device cuda:N "
    "[default: the one the table, or the device, names].",
)
@click.option(
    "--anchor",
    type=click.Path(path_type=Path),
    default=None,
    help="Records of runs here: scale the profile --gpu by one factor per phase (basis anchored).",
)
@click.option("--kind", default=None, help="With --table: kind, where its columns fit several.")
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
def calibrate(
    device: str | None,
    table: Path | None,
    gpu: str | None,
    anchor: Path | None,
    kind: str | None,
    quick: bool,
    threads: int,
    output: Path,
) -> None:
    """Measure this device, or read a table of its kernels, and write a profile of it.

    --device: matmuls, attention, streaming and dispatch with cold buffers, as curves of efficiency
    over size: predictions with the profile are about this very device.

    --table: the physical parameters of every kernel family in a table of measured times, fitted
    robustly and judged on rows left out. Rows that cannot be right are named and left out.

    Predictions with either say so (basis calibrated).

    --anchor: the profile of --gpu with one factor per phase, taken from runs: for the models and
    sizes near them (basis anchored). Do not judge it by the same runs.
    """
    refuse_inputs(output, table, anchor)
    if anchor is not None:
        others = (table, device, kind)
        if gpu is None or quick or threads != 1 or any(x is not None for x in others):
            raise CommandError(
                "--anchor takes --gpu PROFILE and --output, and nothing else", EXIT_USAGE
            )
        _anchor(anchor, gpu, output)
        return
    if table is None:
        if kind is not None:
            raise CommandError("--kind goes with --table", EXIT_USAGE)
        if gpu is not None and (device or "cpu") == "cpu":
            raise CommandError("--gpu goes with --table, or with --device cuda:N", EXIT_USAGE)
        _measure(device or "cpu", quick, threads, gpu, output)
        return
    if device is not None or quick or threads != 1:
        raise CommandError(
            "--table goes without --device, --quick and --threads: nothing runs", EXIT_USAGE
        )
    from costmodel.calibration.profile import calibrate_table
    from costmodel.calibration.tables import only_device
    from costmodel.hardware import load_hardware

    base = load_hardware(gpu if gpu is not None else only_device(table, kind))
    found = calibrate_table(table, base, kind=kind)
    wrote = "replaced" if output.is_file() else "wrote"
    write_atomic(output, found.text)
    _report(table, found)
    click.echo(f"{wrote} {output}; use it with --gpu {output}", err=True)


def _anchor(records: Path, profile: str, output: Path) -> None:
    from lccost.anchoring import anchored_profile
    from measure.store import RecordStore

    if not records.is_file():
        raise CommandError(f"{records}: no such file", EXIT_USAGE)
    write_atomic(output, anchored_profile(profile, RecordStore(records).records()))
    click.echo(f"wrote {output}; use it with --gpu {output}", err=True)


def _measure(device: str, quick: bool, threads: int, gpu: str | None, output: Path) -> None:
    from costmodel.files import require_writable
    from lccost.preflight import require_threads, require_torch
    from measure.calibrate import calibrate as run

    require_torch()
    require_threads(threads)
    require_writable(output)
    path = run(device=device, quick=quick, threads=threads, gpu=gpu, output=output)
    click.echo(f"wrote {path}; use it with --gpu {path}", err=True)


def _report(table: Path, found: "Calibration") -> None:
    """What was fitted, and every row that was not, on standard error."""
    from costmodel.calibration.profile import left_out

    for line in left_out(table, found.rejected):
        click.echo(line, err=True)
    for rows in found.too_few:
        click.echo(
            f"left out: {rows.key.kernel or rows.key.kind} of {rows.key.engine or 'any engine'} "
            f"{rows.key.variant}: only {len(rows)} good rows of {rows.n_shapes()} shapes",
            err=True,
        )
    if found.n_unread:
        click.echo(
            f"{found.n_unread:,} good rows not read: a seeded choice of a family's is enough",
            err=True,
        )
    for c in found.families:
        name = " ".join(filter(None, (c.key.kind, c.key.variant, c.key.engine, c.key.kernel)))
        h = c.held_out
        click.echo(
            f"{name}: {c.n_rows} rows; unseen rows off by {h['mape']:.1f} % (median "
            f"{h['median']:.1f}, p90 {h['p90']:.1f}, bias {h['bias']:+.1f}; low-high x {c.low:.2f} "
            f"to {c.high:.2f})",
            err=True,
        )

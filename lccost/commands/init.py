"""``lccost init``."""

from pathlib import Path

import click

from lccost.commands.common import EXIT_USAGE, CommandError, handle_errors, write_atomic

EXAMPLES = """
\b
Examples:
  lccost init
  lccost init my-plan.toml
  lccost init --force
"""


@click.command(epilog=EXAMPLES)
@click.argument("file", default="plan.toml", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@handle_errors
def init(file: Path, force: bool) -> None:
    """Write a commented plan file that works as it stands: lccost plan FILE."""
    from importlib import resources

    if file.exists() and not force:
        raise CommandError(f"{file} is there already; --force replaces it", EXIT_USAGE)
    text = resources.files("lccost").joinpath("data/plan.toml").read_text("utf-8")
    write_atomic(file, text)
    click.echo(f"Wrote {file}. Next: lccost plan {file}", err=True)

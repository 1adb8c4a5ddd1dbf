"""Progress on stderr: a bar with the time left on a terminal, one plain line a step elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

#: Called after each step with a line about it.
Report = Callable[[str], None]


@contextmanager
def progress(title: str, total: int) -> Iterator[Report]:
    """Show ``total`` steps; the yielded function is called with a line when one is done."""
    if sys.stderr.isatty():
        yield from _bar(title, total)
    else:
        yield from _lines(title, total)


def _bar(title: str, total: int) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)

        def report(line: str) -> None:
            bar.console.print(line, markup=False, highlight=False)
            bar.advance(task)

        yield report


def _lines(title: str, total: int) -> Iterator[Report]:
    start = time.monotonic()
    done = 0

    def report(line: str) -> None:
        nonlocal done
        done += 1
        elapsed = time.monotonic() - start
        left = elapsed / done * (total - done)
        times = f"{elapsed:.0f} s, about {left:.0f} s left" if left else f"{elapsed:.0f} s"
        sys.stderr.write(f"{title} {done}/{total} ({times}) {line}\n")
        sys.stderr.flush()

    yield report

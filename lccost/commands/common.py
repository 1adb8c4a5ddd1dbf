"""What commands share: parameter types, error handling, writing results."""

import contextlib
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from costmodel.errors import ConfigError, LccostError, MeasurementError, MissingExtraError
from costmodel.files import write_atomic as write_file
from costmodel.units import parse_count

F = TypeVar("F", bound=Callable[..., Any])

EXIT_RUN_FAILED, EXIT_USAGE, EXIT_INFEASIBLE, EXIT_MISSING, EXIT_TOLERANCE = 1, 2, 3, 4, 5


class CommandError(click.ClickException):
    """An expected error: one line of cause and remedy, no traceback."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


def handle_errors(function: F) -> F:
    """Turn every ``LccostError`` into a message and an exit code."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MissingExtraError as error:
            raise CommandError(str(error), EXIT_MISSING) from error
        except MeasurementError as error:
            raise CommandError(str(error), EXIT_RUN_FAILED) from error
        except LccostError as error:
            raise CommandError(str(error), EXIT_USAGE) from error
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            raise CommandError(
                f"this needs {error.name}: pip install 'lccost[{extra}]'", EXIT_MISSING
            ) from error

    return wrapper  # type: ignore[return-value]


_EXTRAS = {
    "torch": "measure",
    "psutil": "measure",
    "pynvml": "measure",
    "matplotlib": "report",
    "jinja2": "report",
    "xlsxwriter": "excel",
    "scipy": "plan",
    "transformers": "transformers",
    "safetensors": "transformers",
    "huggingface_hub": "hub",
    "ray": "ray",
}


class CommaList(click.ParamType):  # type: ignore[type-arg]
    """A comma list of names, kept as text."""

    name = "list"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Split at commas; empty pieces are an error."""
        if isinstance(value, tuple):
            return value
        pieces = tuple(p.strip() for p in str(value).split(","))
        if not all(pieces):
            self.fail(f"expected names separated by commas, got {value!r}", param, ctx)
        return pieces


class CountList(click.ParamType):  # type: ignore[type-arg]
    """A comma list of token or batch counts: 4096, 8k, 1m."""

    name = "counts"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Read every count."""
        if isinstance(value, tuple):
            return value
        if isinstance(value, int):
            return (value,)
        try:
            return tuple(parse_count(p) for p in str(value).split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class FiniteRange(click.FloatRange):
    """A number in a range; a range alone lets ``nan`` through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; fail for what is none, is outside the range or is not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {value!r}", param, ctx)
        return number


class Count(click.ParamType):  # type: ignore[type-arg]
    """One token count: 256, 8k."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        if isinstance(value, int):
            return value
        try:
            return parse_count(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def flatten(values: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Repeated comma lists as one list, in order, without doubles."""
    return list(dict.fromkeys(x for value in values for x in value))


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all."""
    try:
        write_file(path, data)
    except ConfigError as error:
        raise CommandError(str(error), EXIT_USAGE) from error


def refuse_inputs(output: Path | None, *inputs: Path | str | None) -> None:
    """Raise where the file to write is one of those to read: nobody measures that again."""
    for path in inputs:
        with contextlib.suppress(OSError, ValueError):
            if output is not None and path is not None and os.path.samefile(output, path):
                raise CommandError(f"--output {output}: would replace the input {path}", EXIT_USAGE)


def emit(text: str, output: Path | None) -> None:
    """To the file, or to standard output."""
    if not text.endswith("\n"):
        text += "\n"
    if output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_atomic(output, text)


def to_json(document: dict[str, Any]) -> str:
    """Strict JSON: NaN and Infinity are refused, not written."""
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)


def to_jsonl(rows: Iterable[dict[str, Any]]) -> str:
    """One row a line."""
    return "".join(json.dumps(r, allow_nan=False, ensure_ascii=False) + "\n" for r in rows)


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """CSV with a header; nested values as JSON, unknown as empty."""
    import csv
    import io

    file = io.StringIO()
    if rows:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _cell(v) for k, v in row.items()})
    return file.getvalue()


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return value

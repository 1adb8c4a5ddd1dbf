"""Cells of a row as numbers; what cannot be read names the column."""

from costmodel.errors import ConfigError
from costmodel.validation.table import Record

#: What is measured, and what describes it, lies between these in any unit of the tables.
LEAST, MOST = 1e-15, 1e15


def number(record: Record, column: str, default: float | None = None) -> float:
    """A number from ``LEAST`` to ``MOST``; ``default`` where the cell is empty, else an error."""
    cell = record.get(column, "")
    if not cell and default is not None:
        return default
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not LEAST <= value <= MOST:
        raise ConfigError(f"{column}: expected a number above 0, got {cell[:40]!r}")
    return value


def whole(record: Record, column: str, default: int | None = None) -> int:
    """A whole number of at least 0; ``default`` where the cell is empty, else ``ConfigError``."""
    cell = record.get(column, "")
    if not cell and default is not None:
        return default
    try:
        value = float(cell)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < MOST or value != int(value):
        raise ConfigError(f"{column}: expected a whole number, got {cell[:40]!r}")
    return int(value)


def observed_value(record: Record, column: str) -> float:
    """What was measured; ``ConfigError`` where it is missing or no positive number."""
    try:
        return number(record, column)
    except ConfigError:
        raise ConfigError(
            f"{column}: the observed value is missing or no positive number"
        ) from None

"""Read a table of measurements: CSV with a header; a file may be broken, enormous or hostile.

Cells are separated by commas, semicolons or tabs, whichever the header has most of.
"""

import csv
import itertools
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from costmodel.errors import ConfigError

#: No table of measurements is near this; reading stops here, whatever the file is.
MAX_FILE_BYTES = 200_000_000
#: A cell longer than this is not a shape, a name or a note.
MAX_CELL_CHARACTERS = 20_000

Record = Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Records by column name, and the line of the file each stands in.

    ragged   lines with more cells than the header has columns
    """

    path: str
    columns: frozenset[str]
    records: tuple[Record, ...]
    lines: tuple[int, ...]
    ragged: tuple[int, ...]


def read_table(path: str | Path) -> Table:
    """Read one CSV file; raises ``ConfigError`` when it cannot be read as a table."""
    file = Path(path)
    try:
        mode = file.stat()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{str(path)[:80]!r}: not a file name") from None
    if not stat.S_ISREG(mode.st_mode):
        what = "a folder" if stat.S_ISDIR(mode.st_mode) else "no regular file"
        raise ConfigError(f"{path}: expected a CSV table, found {what}")
    if mode.st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: expected at most {MAX_FILE_BYTES:,} bytes of CSV, got more")
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            return _parse(handle, str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, byte {error.start} is not; is it a CSV file?"
        ) from None
    except csv.Error as error:
        raise ConfigError(f"{path}: cannot be read as CSV: {error}") from None


#: What may separate cells, and where none of them does: a comma.
SEPARATORS = (",", ";", "\t")


def _parse(lines_of: Iterable[str], where: str) -> Table:
    lines_left = iter(lines_of)
    first = next(lines_left, "")
    separator = max(SEPARATORS, key=first.count)
    reader = csv.reader(itertools.chain([first], lines_left), delimiter=separator)
    header = [cell.strip() for cell in next(reader, [])]
    if not any(header):
        raise ConfigError(f"{where}: expected a line of column names, found none")
    doubled = sorted({c for c in header if c and header.count(c) > 1})
    if doubled:
        raise ConfigError(f"{where}: columns named twice: {', '.join(doubled)[:200]}")
    records: list[Record] = []
    lines: list[int] = []
    ragged: list[int] = []
    for cells in reader:
        if not any(cells):
            continue
        if len(cells) > len(header) or max(map(len, cells)) > MAX_CELL_CHARACTERS:
            ragged.append(reader.line_num)
            continue
        record = dict(zip(header, map(str.strip, cells), strict=False))
        records.append(record)
        lines.append(reader.line_num)
    if not records:
        reason = f": all {len(ragged)} have more cells than the header" if ragged else ""
        raise ConfigError(f"{where}: the table has no rows{reason}")
    return Table(
        where, frozenset(c for c in header if c), tuple(records), tuple(lines), tuple(ragged)
    )

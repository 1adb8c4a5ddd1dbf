"""Read tables of measured kernels: columns into shapes, bad rows reported and left out.

A table is a CSV file with one measured call per row, or JSON lines of our own kernels
(``kernel_records``). Column names are those of the published
tables (see ``SCHEMAS``); a few other spellings are understood. Rows are never repaired: a row that
cannot be read, or is faster than the device can be, is reported with its line and left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from costmodel.calibration import kernel_records
from costmodel.calibration.schemas import SCHEMAS, Record, Schema
from costmodel.errors import ConfigError
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.kernels.kinds import kernel_kind
from costmodel.kernels.physics import cache_bytes, cache_bytes_per_s
from costmodel.validation.table import MAX_FILE_BYTES
from costmodel.validation.table import read_table as read_csv

_SCHEMAS = (*SCHEMAS, kernel_records.SCHEMA)
#: A call can be this much faster than the physical limit before its row is called impossible
#: (clock boost above the datasheet clock, rounding).
LIMIT_TOLERANCE = 0.95
#: A call this many times slower than its roofline and a start of ``USUAL_START_S`` is doubtful: a
#: wrong unit makes it a thousand times, the slowest of 6,000 published calls took 90 times.
DOUBTFUL_FACTOR = 100.0
USUAL_START_S = 2e-5
#: No kernel starts and ends sooner.
SHORTEST_S = 5e-7
#: A family of which more rows than this share are impossible or doubtful is left out as a whole.
MOST_IMPOSSIBLE = 0.2


@dataclass(frozen=True, slots=True)
class FamilyKey:
    """Which kernel family a row belongs to."""

    kind: str
    variant: str
    hardware: str
    engine: str
    kernel: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was left out: its line in the file and why."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Measured calls of one family: shapes, seconds, and where they stand."""

    key: FamilyKey
    shape: Mapping[str, NDArray[np.float64]]
    observed_s: NDArray[np.float64]
    lines: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.observed_s)

    def where(self, mask: NDArray[np.bool_]) -> "Rows":
        """Return the rows a mask selects."""
        shape = {name: column[mask] for name, column in self.shape.items()}
        return Rows(self.key, shape, self.observed_s[mask], self.lines[mask])

    def shape_index(self) -> NDArray[np.int64]:
        """Number of each row's shape, in the order they first occur."""
        columns = np.column_stack(list(self.shape.values()))
        _, first, inverse = np.unique(columns, axis=0, return_index=True, return_inverse=True)
        order: NDArray[np.int64] = np.argsort(np.argsort(first))[inverse.ravel()]
        return order

    def n_shapes(self) -> int:
        """How many different calls there are."""
        return int(self.shape_index().max(initial=-1)) + 1


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A whole table: its families and what was left out."""

    path: str
    families: tuple[Rows, ...]
    rejected: tuple[Rejected, ...]
    source: str

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.families)


def read_table(
    path: str | Path, *, kind: str | None = None, profile: HardwareProfile | None = None
) -> Table:
    """Read one file, CSV or (``.jsonl``) JSON lines.

    ``kind`` says which schema to use where the columns fit several; ``profile`` is the device of
    every row that names it or names none (else the table's own column decides, among the bundled
    profiles). Raises ``ConfigError`` when the file cannot be read at all or no schema fits its
    columns; bad rows are in ``rejected``.
    """
    columns, records, ragged = _records(Path(path))
    schema = find_schema(columns, kind, str(path))
    grouped: dict[FamilyKey, list[tuple[int, dict[str, float], float]]] = {}
    rejected = [Rejected(line, f"expected {len(columns)} cells, got more") for line in ragged]
    for line, record in records:
        try:
            key, shape, seconds = schema.read(record, profile)
        except ConfigError as error:
            rejected.append(Rejected(line, str(error)))
            continue
        grouped.setdefault(FamilyKey(*key), []).append((line, shape, seconds))
    families = []
    for family, items in sorted(grouped.items(), key=lambda kv: str(kv[0])):
        rows, bad = checked(_rows(family, items), profile)
        rejected += bad
        if len(rows):
            families.append(rows)
    sources = sorted({(r.get("source") or "").split(":")[0] for _, r in records} - {""})
    return Table(
        str(path), tuple(families), tuple(sorted(rejected, key=_by_line)), "; ".join(sources)
    )


def only_device(path: str | Path, kind: str | None = None) -> str:
    """The GPU that all rows of a table name; ``ConfigError`` where there is not exactly one."""
    table = read_table(path, kind=kind)
    names = sorted({rows.key.hardware for rows in table.families})
    if len(names) != 1:
        found = f"rows of {', '.join(names)}" if names else "no row of a known GPU"
        first = f" (line {table.rejected[0].line}: {table.rejected[0].reason})"
        raise ConfigError(
            f"{path}: expected measurements of one GPU, found {found}"
            f"{first if table.rejected and not names else ''}; name it with --gpu"
        )
    return names[0]


def _records(path: Path) -> tuple[Sequence[str], list[tuple[int, Record]], Sequence[int]]:
    """(columns, rows with the line they end on, lines with more cells than columns)."""
    if path.suffix != ".jsonl":
        table = read_csv(path)
        rows = list(zip(table.lines, table.records, strict=True))
        return sorted(table.columns), rows, table.ragged
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: expected a table of at most {MAX_FILE_BYTES:,} bytes")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    columns, records = kernel_records.json_lines(path)
    return columns, records, ()


def find_schema(columns: Iterable[str], kind: str | None, where: str) -> Schema:
    """Find the schema whose columns a table has; ``ConfigError`` names what is missing."""
    have = {c for c in columns if c}
    candidates = [s for s in _SCHEMAS if kind in (None, s.name, *s.kinds)]
    if not candidates:
        names = ", ".join(s.name for s in _SCHEMAS)
        raise ConfigError(f"{where}: unknown kind {kind!r}; known: {names}")
    fitting = [s for s in candidates if s.required <= have]
    if fitting:
        return max(fitting, key=lambda s: len(s.required))
    nearest = min(candidates, key=lambda s: len(s.required - have))
    missing = ", ".join(sorted(nearest.required - have))
    raise ConfigError(
        f"{where}: expected the columns of a kernel table; nearest is {nearest.name!r}, "
        f"which lacks: {missing}"
    )


def _by_line(rejected: Rejected) -> int:
    return rejected.line


def _rows(key: FamilyKey, items: Sequence[tuple[int, dict[str, float], float]]) -> Rows:
    names = items[0][1]
    shape = {name: np.array([item[1][name] for item in items]) for name in names}
    return Rows(
        key,
        shape,
        np.array([item[2] for item in items]),
        np.array([item[0] for item in items], dtype=np.int64),
    )


def checked(rows: Rows, device: HardwareProfile | None = None) -> tuple[Rows, list[Rejected]]:
    """Split off the rows no device could have run, and those whose unit must be wrong.

    A replayed row may beat DRAM with what the cache holds, but not the peak FLOP rate nor the
    cache's rate. A time a hundred times what the work needs is taken for a unit error.
    """
    hardware = device or load_hardware(rows.key.hardware)
    kind = kernel_kind(rows.key.kind)
    work = kind.work(hardware, rows.shape, rows.key.variant)
    n_bytes = np.asarray(work.n_bytes)
    # What the cache cannot hold has to come from DRAM in every run.
    from_dram = np.maximum(n_bytes - cache_bytes(hardware), 0.0) / hardware.hbm_bytes_per_s
    fastest = np.maximum(
        np.asarray(work.flops) / work.peak_flops_per_s,
        np.maximum(from_dram, n_bytes / cache_bytes_per_s(hardware)),
    )
    roofline = kind.roofline_s(hardware, rows.shape, rows.key.variant)
    fastest = np.maximum(fastest, SHORTEST_S)
    too_fast = rows.observed_s < LIMIT_TOLERANCE * fastest
    too_slow = rows.observed_s > DOUBTFUL_FACTOR * (roofline + USUAL_START_S)
    bad = [
        Rejected(
            int(line),
            f"impossible: {seconds * 1e6:.4g} us, but {hardware.name} needs at least "
            f"{limit * 1e6:.4g} us (is the unit microseconds?)",
        )
        for line, seconds, limit in zip(
            rows.lines[too_fast], rows.observed_s[too_fast], fastest[too_fast], strict=True
        )
    ]
    bad += [
        Rejected(
            int(line),
            f"doubtful: {seconds:.4g} s is over a hundred times what the work needs "
            "(is the unit microseconds?)",
        )
        for line, seconds in zip(rows.lines[too_slow], rows.observed_s[too_slow], strict=True)
    ]
    wrong = too_fast | too_slow
    if wrong.mean() > MOST_IMPOSSIBLE:
        # So many cannot be slips of single rows: the columns do not describe these calls.
        reason = (
            f"{int(wrong.sum())} of {len(rows)} rows of {rows.key.kernel!r} on {hardware.name} "
            "are impossible or doubtful: their columns do not describe what ran"
        )
        bad += [Rejected(int(line), reason) for line in rows.lines[~wrong]]
        return rows.where(np.zeros(len(rows), dtype=np.bool_)), bad
    return rows.where(~wrong), bad

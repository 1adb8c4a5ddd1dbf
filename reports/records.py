"""Reads result files: measurements, predictions and validations, as the commands write them.

A file is JSON lines (one record a line), one document ``{"results": [...]}``, or a list. Rows keep
where they came from ("runs.jsonl:3"), so that every later message can name the line. Reading is
tolerant of what a real sweep leaves behind (failed rows, a torn last line, NaN) and strict about
everything else: a wrong type is a :class:`~costmodel.errors.ConfigError` with file and line.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from costmodel.basis import BASES
from costmodel.errors import ConfigError

#: Fields that say which point a row is about; predictions and measurements share them.
KEY_FIELDS = (
    "model",
    "method",
    "method_parameters",
    "method_spec",
    "level",
    "engine",
    "gpu",
    "tp",
    "dtype",
    "weight_dtype",
    "kv_dtype",
    "batch",
    "context_tokens",
    "output_tokens",
)
_TEXT = (
    *("model", "method", "method_spec", "level", "engine", "gpu", "dtype", "weight_dtype"),
    *("kv_dtype", "reason", "basis", "prefill_bound", "decode_bound", "accuracy_source"),
    *("status", "message", "device", "realisation", "record_key"),
)
_POSITIVE = ("batch", "context_tokens", "output_tokens", "tp", "layers", "gpus")
#: Measured and drawn on logarithmic axes: below zero, errors and pictures turn upside down.
_NOT_NEGATIVE = frozenset(
    (
        *("ttft_s", "ttft_low_s", "ttft_high_s", "tpot_s", "tpot_low_s", "tpot_high_s"),
        *("weights_bytes", "state_bytes", "state_host_bytes", "peak_prefill_bytes"),
        *("peak_decode_bytes", "executed_prefill_flops", "executed_decode_flops"),
        *("prefill_flops", "decode_flops", "prefill_hbm_bytes", "decode_hbm_bytes"),
        *("energy_j_per_token", "tokens_per_s"),
    )
)
_NUMBER_SUFFIXES = ("_bytes", "_s", "_flops", "_j_per_token", "_tokens", "_per_s", "_points")
_MAPPINGS = ("method_parameters", "predicted", "environment", "statistics")
#: A realisation names the level it is compared with (a record may carry only one of the two).
_LEVEL_OF_REALISATION = {"reference": "reference", "best": "ideal"}
#: Above this a file is not a result file; 5,000 full records take about 30 MB.
MAX_FILE_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One record or result with the place it was read from ("file:line"). ``not_numbers`` names
    what stood there as NaN or Infinity, which is unknown here.
    """

    values: Mapping[str, Any]
    origin: str = ""
    not_numbers: frozenset[str] = frozenset()

    def number(self, name: str) -> float | None:
        """A finite number, or None where it is unknown."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return float(value) if math.isfinite(value) else None

    def text(self, name: str, default: str = "") -> str:
        """A text as it was written; ``default`` where there is none."""
        value = self.values.get(name)
        return default if value is None else str(value)

    @property
    def status(self) -> str:
        """How a measurement ended (``ok`` where nothing is said)."""
        return self.text("status", "ok")

    @property
    def device(self) -> str:
        """The device as people call it: a profile of one's own by its file's name, not its path."""
        name = self.text("gpu")
        return PurePath(name.replace("\\", "/")).stem if name.endswith(".toml") else name

    @property
    def method_spec(self) -> str:
        """The method as it can be typed again."""
        return self.text("method_spec") or self.text("method", "?")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Records:
    """Everything the files held.

    measurements  rows with a status; they may carry their own prediction under ``predicted``
    predictions   result rows of ``predict``
    validations   whole ``validate`` documents
    headers       documents without their results: command, inputs, assumptions, versions
    notes         what was tolerated, in words, with file and line
    """

    measurements: tuple[Row, ...] = ()
    predictions: tuple[Row, ...] = ()
    validations: tuple[Row, ...] = ()
    headers: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()

    def merged(self, other: "Records") -> "Records":
        """Both, in order."""
        return Records(
            measurements=self.measurements + other.measurements,
            predictions=self.predictions + other.predictions,
            validations=self.validations + other.validations,
            headers=self.headers + other.headers,
            notes=self.notes + other.notes,
        )


def read_records(paths: Iterable[str | Path]) -> Records:
    """Read result files in order; raises ``ConfigError`` naming file and line."""
    records = Records()
    seen: set[Path] = set()
    for path in map(Path, paths):
        if path.resolve() in seen:
            records = records.merged(Records(notes=(f"{path}: given twice; read once",)))
            continue
        seen.add(path.resolve())
        records = records.merged(parse_records(_read_text(path), str(path)))
    return records


def parse_records(text: str, name: str = "<text>") -> Records:
    """Read the text of one result file; ``name`` is what messages call it."""
    builder = _Builder(name)
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if line.strip()), None)
    if first is None:
        builder.notes.append(f"{name}: the file is empty")
        return builder.build()
    try:
        _decode(lines[first], name, first + 1)
    except ConfigError:
        # Not JSON lines: one document over several lines, or a single torn line.
        builder.add(_decode(text, name, None), name)
        return builder.build()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = _decode(line, name, number)
        except ConfigError:
            if number == len(lines) and not text.endswith("\n"):
                builder.notes.append(f"{name}:{number}: the last line is incomplete; left out")
                continue
            raise
        builder.add(value, f"{name}:{number}")
    return builder.build()


def rows_of(results: Iterable[Mapping[str, Any]], origin: str = "results") -> tuple[Row, ...]:
    """Result dicts already in memory (``predict`` before it writes them) as checked rows."""
    return tuple(
        Row(_checked(values, f"{origin}:{n}"), f"{origin}:{n}")
        for n, values in enumerate(results, start=1)
    )


@dataclass(slots=True)
class _Builder:
    """Sorts values into kinds of rows while a file is read."""

    name: str
    measurements: list[Row] = field(default_factory=list)
    predictions: list[Row] = field(default_factory=list)
    validations: list[Row] = field(default_factory=list)
    headers: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, value: object, origin: str) -> None:
        """File one decoded value under its kind."""
        if isinstance(value, list):
            if not value:
                self.notes.append(f"{origin}: the list is empty")
            for n, item in enumerate(value, start=1):
                self.add(item, f"{origin}[{n}]")
            return
        if not isinstance(value, dict):
            raise ConfigError(
                f"{origin}: expected a record (a JSON object), got {type(value).__name__}"
            )
        if "results" in value:
            self._add_document(value, origin)
        elif "overall" in value and "groups" in value:
            self.validations.append(Row(value, origin))
        elif value.keys() & {"status", "realisation", "record_key", "samples"}:
            self.measurements.append(self._row(value, origin))
        elif value.keys() & {"model", "method"}:
            self.predictions.append(self._row(value, origin))
        else:
            found = ", ".join(sorted(map(str, value))[:6]) or "no keys"
            raise ConfigError(
                f"{origin}: neither a measurement, a prediction nor a validation (found {found}); "
                "expected what `lccost predict --format json`, `measure` or `validate` writes"
            )

    def _row(self, value: dict[str, Any], origin: str) -> Row:
        row = Row(_checked(_finite(value), origin), origin, _not_numbers(value))
        if row.not_numbers:
            names = ", ".join(sorted(row.not_numbers))
            self.notes.append(f"{origin}: {names}: no number, taken as unknown")
        return row

    def _add_document(self, value: dict[str, Any], origin: str) -> None:
        results = value["results"]
        header = {k: v for k, v in value.items() if k != "results"}
        self.headers.append(Row(header, origin))
        if isinstance(results, dict):
            results = [results]
        if not isinstance(results, list):
            raise ConfigError(
                f"{origin}: results: expected a list of objects, got {type(results).__name__}"
            )
        for n, item in enumerate(results, start=1):
            self.add(item, f"{origin} results[{n}]")

    def build(self) -> Records:
        """Freeze what was collected."""
        return Records(
            measurements=tuple(self.measurements),
            predictions=tuple(self.predictions),
            validations=tuple(self.validations),
            headers=tuple(self.headers),
            notes=tuple(self.notes),
        )


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: expected at most {MAX_FILE_BYTES} bytes; split the file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, got other bytes ({error.reason})"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _decode(text: str, name: str, line: int | None) -> Any:
    """JSON to Python; NaN and Infinity, which JSON does not have, stay what they are here."""
    try:
        return json.loads(text, parse_constant=float)
    except json.JSONDecodeError as error:
        at = line if line is not None else error.lineno
        raise ConfigError(
            f"{name}:{at}: expected JSON, got text that is not ({error.msg}, column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{name}:{line or 1}: expected JSON, got {reason}") from None


def _finite(value: Any) -> Any:
    """The same with NaN and Infinity as None (unknown)."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _not_numbers(values: Mapping[str, Any]) -> frozenset[str]:
    """Names of a row's NaN and Infinity; of its prediction as ``predicted.name``."""
    names = {k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    predicted = values.get("predicted")
    if isinstance(predicted, dict):
        names |= {f"predicted.{k}" for k in _not_numbers(predicted)}
    return frozenset(names)


def _checked(values: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    """The row with its types verified and the level filled in from the realisation."""
    for problem in _problems(values):
        raise ConfigError(f"{origin}: {problem}")
    checked = dict(values)
    predicted = checked.get("predicted")
    if predicted is not None:
        for problem in _problems(predicted):
            raise ConfigError(f"{origin}: predicted.{problem}")
    if not checked.get("level") and checked.get("realisation") in _LEVEL_OF_REALISATION:
        checked["level"] = _LEVEL_OF_REALISATION[checked["realisation"]]
    return checked


def _problems(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if value is None:
            continue
        if name in _TEXT and not isinstance(value, str):
            yield f"{name}: expected text, got {_shown(value)}"
        elif name == "basis" and value not in BASES:
            yield f"{name}: expected one of {', '.join(BASES)}, got {_shown(value)}"
        elif name in _MAPPINGS and not isinstance(value, dict):
            yield f"{name}: expected an object, got {_shown(value)}"
        elif name in _POSITIVE or (
            isinstance(name, str)
            and name.endswith(_NUMBER_SUFFIXES)
            and not isinstance(value, (dict, list))
        ):
            yield from _number_problems(name, value)


def _number_problems(name: str, value: object) -> Iterator[str]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        yield f"{name}: expected a number or null, got {_shown(value)}"
    elif isinstance(value, int) and abs(value) > 10**300:
        yield f"{name}: expected a number below 1e300, got one of {len(str(value))} digits"
    elif name in _POSITIVE and not value > 0:
        yield f"{name}: expected a number above 0, got {value}"
    elif name in _NOT_NEGATIVE and value < 0:
        yield f"{name}: expected a number of 0 or more, got {value}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""Traces that users have, read as they are; a bad line is an error with file, line and reason.

    Mooncake jsonl   {"timestamp": ms, "input_length", "output_length", "hash_ids": [...]}; the ids
                     name chained blocks of 512 prompt tokens (kvcache-ai/Mooncake, FAST25-release)
    Azure csv        TIMESTAMP,ContextTokens,GeneratedTokens (Azure/AzurePublicDataset)
    BurstGPT csv     Timestamp (s),Model,Request tokens,Response tokens,... (HPMLL/BurstGPT)
    own csv          arrival_s,input_tokens,output_tokens[,prefix_tokens]

The format is told from the first line, never from the file's name.
"""

import csv
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from costmodel.errors import ConfigError
from costmodel.planning.requests import MAX_REQUESTS, Requests
from costmodel.tables import short

#: Prompt tokens that one hash id of a Mooncake trace stands for.
BLOCK_TOKENS = 512
#: Longest line read; a million tokens of hash ids are some 20 kB.
MAX_LINE_BYTES = 4_000_000
#: Largest token count believed; more is a slip or an attack.
MAX_TOKENS = 1 << 30

#: Seconds, prompt, output and prefix tokens, and the line.
Row = tuple[float, int, int, int, int]


def read_trace(path: str | Path) -> Requests:
    """Read any known trace; raises ``ConfigError`` naming the file, the line and the reason."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such trace file")
    try:
        with path.open("rb") as file:
            first = file.readline(MAX_LINE_BYTES + 1)
        kind, reader = _reader(first, path)
        rows, notes = _collect(reader(path), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not rows:
        raise ConfigError(f"{path}: expected at least one request, found none")
    table = np.array(rows, dtype=np.float64)
    return Requests(
        name=path.stem,
        arrival_s=table[:, 0] - table[0, 0],
        input_tokens=table[:, 1].copy(),
        output_tokens=table[:, 2].copy(),
        prefix_tokens=np.minimum(table[:, 3], table[:, 1] - 1),
        notes=(f"read as {kind}", *notes),
    )


def _reader(first: bytes, path: Path) -> tuple[str, Callable[[Path], Iterator[Row | None]]]:
    text = first.decode("utf-8", errors="replace").lstrip("\ufeff").strip()
    if text.startswith("{"):
        return "Mooncake jsonl", _mooncake
    if text.startswith("["):
        raise ConfigError(
            f"{path}: this is a length distribution, not a trace; use it as input_tokens or "
            "output_tokens, with rate_per_s"
        )
    header = [h.strip().lower() for h in text.split(",")]
    if header[:3] == ["timestamp", "contexttokens", "generatedtokens"]:
        return "Azure csv", _azure
    if {"timestamp", "request tokens", "response tokens"} <= set(header):
        return "BurstGPT csv", _burstgpt
    if header[:3] == ["arrival_s", "input_tokens", "output_tokens"]:
        return "csv", _own
    raise ConfigError(
        f"{path}:1: expected a Mooncake jsonl line or one of the csv headers "
        "'TIMESTAMP,ContextTokens,GeneratedTokens', "
        "'Timestamp,...,Request tokens,Response tokens', "
        f"'arrival_s,input_tokens,output_tokens[,prefix_tokens]', got {short(text)}"
    )


def _collect(rows: Iterator[Row | None], path: Path) -> tuple[list[Row], list[str]]:
    """Check the order; count what a format itself marks as failed (None)."""
    out: list[Row] = []
    failed = 0
    last = -math.inf
    for row in rows:
        if row is None:
            failed += 1
            continue
        if row[0] < last:
            raise _bad(
                path,
                row[4],
                f"arrives at {row[0]:g} s, before the request above it ({last:g} s); sort the file "
                "by time",
            )
        last = row[0]
        out.append(row)
        if len(out) > MAX_REQUESTS:
            raise ConfigError(f"{path}: expected at most {MAX_REQUESTS:,} requests")
    notes = [f"{failed} requests without an answer left out"] if failed else []
    return out, notes


# jsonl ---------------------------------------------------------------------------------------


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def _mooncake(path: Path) -> Iterator[Row]:
    """Prefix tokens: the leading blocks that some earlier line has named."""
    decoder = msgspec.json.Decoder(_Line)
    seen: set[int] = set()
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise _bad(path, number, f"longer than {MAX_LINE_BYTES:,} bytes")
            if not raw.strip():
                continue
            try:
                line = decoder.decode(raw)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise _bad(path, number, str(error)) from None
            hits = 0
            for block in line.hash_ids:
                if block not in seen:
                    break
                hits += 1
            seen.update(line.hash_ids[hits:])
            yield _checked(
                path,
                number,
                line.timestamp / 1000.0,
                line.input_length,
                line.output_length,
                min(hits * BLOCK_TOKENS, max(line.input_length - 1, 0)),
            )


# csv -----------------------------------------------------------------------------------------


def _csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row by lower-case header) of a csv file."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(_short_lines(file, path), strict=True)
        try:
            header = [h.strip().lower() for h in next(reader)]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise _bad(
                        path, reader.line_num, f"expected {len(header)} fields, got {len(row)}"
                    )
                yield reader.line_num, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise _bad(path, reader.line_num, str(error)) from None


def _short_lines(file: Any, path: Path) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise _bad(path, number, f"longer than {MAX_LINE_BYTES:,} characters")
        if "\0" in line:
            raise _bad(path, number, "not text")
        yield line


def _azure(path: Path) -> Iterator[Row]:
    start: datetime | None = None
    for number, row in _csv(path):
        time = _date(path, number, row["timestamp"])
        start = time if start is None else start
        seconds = (time - start).total_seconds()
        tokens = [_whole(path, number, k, row[k]) for k in ("contexttokens", "generatedtokens")]
        yield _checked(path, number, seconds, *tokens, signed=True)


def _date(path: Path, number: int, text: str) -> datetime:
    # Seven digits of fraction: datetime reads at most six.
    head, _, fraction = text.strip().partition(".")
    digits = fraction.removesuffix("Z").partition("+")[0]
    try:
        return datetime.fromisoformat(f"{head}.{digits[:6]:0<6}")
    except ValueError:
        raise _bad(path, number, f"expected a date and time, got {short(text)}") from None


def _burstgpt(path: Path) -> Iterator[Row | None]:
    """Failed requests have 0 response tokens and are left out."""
    for number, row in _csv(path):
        prompt = _whole(path, number, "Request tokens", row["request tokens"])
        output = _whole(path, number, "Response tokens", row["response tokens"])
        seconds = _number(path, number, "Timestamp", row["timestamp"])
        if prompt == 0 or output == 0:
            yield None
        else:
            yield _checked(path, number, seconds, prompt, output)


def _own(path: Path) -> Iterator[Row]:
    for number, row in _csv(path):
        unknown = set(row) - {"arrival_s", "input_tokens", "output_tokens", "prefix_tokens"}
        if unknown:
            raise _bad(path, 1, f"unknown columns: {', '.join(sorted(unknown))[:80]}")
        tokens = [
            _whole(path, number, k, row.get(k, "0"))
            for k in ("input_tokens", "output_tokens", "prefix_tokens")
        ]
        if not 0 <= tokens[2] <= tokens[0]:
            raise _bad(path, number, f"expected 0 <= prefix_tokens <= {tokens[0]}, got {tokens[2]}")
        yield _checked(path, number, _number(path, number, "arrival_s", row["arrival_s"]), *tokens)


def _whole(path: Path, number: int, name: str, text: str) -> int:
    value = _number(path, number, name, text)
    if value != int(value):
        raise _bad(path, number, f"{name}: expected a whole number, got {short(text)}")
    return int(value)


def _number(path: Path, number: int, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _bad(path, number, f"{name}: expected a number, got {short(text)}") from None
    if not math.isfinite(value):
        raise _bad(path, number, f"{name}: expected a finite number, got {short(text)}")
    return value


def _checked(
    path: Path,
    number: int,
    seconds: float,
    prompt: int,
    output: int,
    prefix: int = 0,
    *,
    signed: bool = False,
) -> Row:
    """A plausible request. ``signed``: times count from the first line, so a negative one is
    reported as reversed order.
    """
    if not math.isfinite(seconds) or (seconds < 0 and not signed):
        raise _bad(path, number, f"expected a time of at least 0, got {seconds:g} s")
    for name, value in (("input", prompt), ("output", output)):
        if not 1 <= value <= MAX_TOKENS:
            raise _bad(path, number, f"expected 1 to {MAX_TOKENS:,} {name} tokens, got {value}")
    return seconds, prompt, output, prefix, number


def _bad(path: Path, number: int, reason: str) -> ConfigError:
    return ConfigError(f"{path}:{number}: {reason}")


# Writing -------------------------------------------------------------------------------------


def as_csv(stream: Requests, rows: int | None = None) -> Iterator[str]:
    """The lines of our own csv, of the first ``rows`` requests."""
    yield "arrival_s,input_tokens,output_tokens,prefix_tokens"
    for a, i, o, p in _columns(stream, rows):
        yield f"{a:.9g},{i:.0f},{o:.0f},{p:.0f}"


def as_mooncake(stream: Requests, rows: int | None = None) -> Iterator[str]:
    """Lines of Mooncake's jsonl: whole milliseconds. Found prefixes become shared blocks, rounded
    down to whole ones; every other block is new.
    """
    fresh = int(max(stream.prefix_tokens, default=0.0)) // BLOCK_TOKENS
    for a, i, o, p in _columns(stream, rows):
        line = {"timestamp": round(a * 1000), "input_length": int(i), "output_length": int(o)}
        if fresh:
            blocks, found = -(-int(i) // BLOCK_TOKENS), int(p) // BLOCK_TOKENS
            new = range(fresh, fresh + blocks - found)
            fresh += blocks - found
            yield msgspec.json.encode({**line, "hash_ids": [*range(found), *new]}).decode()
        else:
            yield msgspec.json.encode(line).decode()


def _columns(stream: Requests, rows: int | None) -> Iterator[tuple[float, ...]]:
    columns = (stream.arrival_s, stream.input_tokens, stream.output_tokens, stream.prefix_tokens)
    return zip(*(c[:rows].tolist() for c in columns), strict=True)

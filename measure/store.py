"""Records on disk: JSON lines, appended and synced one by one, safe to kill at any moment.

A record is written with one ``write`` to a file opened for appending, under a lock, then synced:
two writers cannot mix lines, and a kill loses at most the line being written. A torn last line (no
newline) is cut off before the next append; readers skip it.
"""

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from costmodel.errors import ConfigError
from costmodel.files import write_atomic

#: Statuses that a resumed sweep does not repeat: they are results.
FINISHED = frozenset({"ok", "noisy", "oom", "skipped_oom_predicted", "not_applicable"})


class RecordStore:
    """One records file; nothing is written until the first record.

    ``fresh`` starts over: what the file held is kept beside it, with ``.bak`` behind its name.
    ``repeats`` are statuses that are no results this time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fresh: bool = False,
        repeats: Collection[str] = (),
    ) -> None:
        self.path = Path(path)
        self._results = FINISHED - frozenset(repeats)
        #: how far the file was read for ``finished_keys``, and what was finished there
        self._read_bytes = 0
        self._finished: set[tuple[str, str | None]] = set()
        if os.path.isdir(self.path):  # ``is_dir`` raises where a name is too long
            raise ConfigError(f"{self.path} is a folder; give a file name")
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise ConfigError(
                f"{self.path} is a device or a pipe: records are read again, give a file"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror})") from error
        if fresh:
            with self._locked() as fd:
                if size := os.fstat(fd).st_size:
                    write_atomic(self.backup, os.pread(fd, size, 0))
                os.ftruncate(fd, 0)

    @property
    def backup(self) -> Path:
        """Where the records of an earlier sweep are kept when a new one starts over."""
        return self.path.with_name(self.path.name + ".bak")

    def append(self, record: Mapping[str, Any], *, unless_finished: bool = False) -> bool:
        """Add one record and wait until it is on disk. NaN and Infinity are refused.

        With ``unless_finished`` nothing is written where another writer has finished the same
        point in the same environment meanwhile; returns whether the record was written.
        """
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._locked() as fd:
            _cut_torn_line(fd)
            if unless_finished:
                environment = (record.get("environment") or {}).get("id")
                if record.get("record_key") in self.finished_keys(environment):
                    return False
            try:
                written = os.write(fd, line)
                os.fsync(fd)
            except OSError as error:
                raise ConfigError(f"{self.path}: cannot be written ({error.strerror})") from error
            if written != len(line):
                raise ConfigError(
                    f"{self.path}: the record was not written whole: is the disk full?"
                )
        return True

    def records(self) -> list[dict[str, Any]]:
        """Return all whole records, in order; raises ``ConfigError`` for a broken line."""
        return [record for record, _ in self._from(0)]

    def finished_keys(self, environment_id: str | None = None) -> set[str]:
        """Keys of points that need not be run again.

        With ``environment_id`` only what was measured in that very environment counts. Only what
        was added since the last call is read.
        """
        if self.path.exists() and self.path.stat().st_size < self._read_bytes:  # started over
            self._read_bytes = 0
            self._finished.clear()
        for record, end in self._from(self._read_bytes):
            self._read_bytes = end
            if record.get("status") in self._results and "record_key" in record:
                environment = (record.get("environment") or {}).get("id")
                self._finished.add((record["record_key"], environment))
        return {
            key
            for key, environment in self._finished
            # what does not exist anywhere has no environment
            if environment_id is None or environment in (None, environment_id)
        }

    def _from(self, start: int) -> Iterator[tuple[dict[str, Any], int]]:
        """Whole records from a line's first byte on, each with the byte behind it."""
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            return
        whole, _, _torn = data.rpartition(b"\n")
        end = start
        for line in whole.split(b"\n"):
            end += len(line) + 1
            if not line.strip():
                continue
            try:
                record = _record(line)
            except (ValueError, RecursionError) as error:
                number = self.path.read_bytes()[:end].count(b"\n")
                raise ConfigError(f"{self.path}:{number}: not a JSON record: {error}") from None
            yield record, end

    @contextmanager
    def _locked(self) -> Iterator[int]:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)  # closing releases the lock


def _record(line: bytes) -> dict[str, Any]:
    """One line; raises ``ValueError`` where it is no object, or keys a resume needs are odd."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("expected an object in braces")
    if not isinstance(record.get("record_key", ""), str):
        raise ValueError("record_key: expected text")
    environment = record.get("environment") or {}
    if not isinstance(environment, dict) or not isinstance(environment.get("id", ""), str | None):
        raise ValueError("environment: expected an object with a text id")
    if not isinstance(record.get("status", ""), str):
        raise ValueError("status: expected text")
    return record


def _cut_torn_line(fd: int) -> None:
    """Remove what follows the last newline: half a line left by a kill."""
    size = end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - 65536)
        chunk = os.pread(fd, end - start, start)
        newline = chunk.rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)

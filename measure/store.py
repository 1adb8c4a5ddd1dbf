"""Records on disk: JSON lines, appended and synced one by one, safe to kill at any moment.

A record is written with one ``write`` to a file opened for appending, under a lock, then synced:
two writers cannot mix lines, and a kill loses at most the line being written. A torn last line (no
newline) is cut off before the next append; readers skip it.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from costmodel.errors import ConfigError

#: Statuses that a resumed sweep does not repeat: they are results.
FINISHED = frozenset({"ok", "noisy", "oom", "skipped_oom_predicted", "not_applicable"})


class RecordStore:
    """One records file. ``fresh`` empties it; nothing is written until the first record."""

    def __init__(self, path: str | os.PathLike[str], *, fresh: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            with self._locked() as fd:
                os.ftruncate(fd, 0)

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
            if os.write(fd, line) != len(line):
                raise ConfigError(
                    f"{self.path}: the record was not written whole: is the disk full?"
                )
            os.fsync(fd)
        return True

    def records(self) -> list[dict[str, Any]]:
        """Return all whole records, in order; raises ``ConfigError`` for a broken line."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        whole, _, _torn = data.rpartition(b"\n")
        found = []
        for number, line in enumerate(whole.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ConfigError(f"{self.path}:{number}: not a JSON record: {error}") from None
        return found

    def finished_keys(self, environment_id: str | None = None) -> set[str]:
        """Keys of points that need not be run again.

        With ``environment_id`` only what was measured in that very environment counts.
        """
        return {
            record["record_key"]
            for record in self.records()
            if record.get("status") in FINISHED
            and "record_key" in record
            and environment_id in (None, (record.get("environment") or {}).get("id"))
        }

    @contextmanager
    def _locked(self) -> Iterator[int]:
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)  # closing releases the lock


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

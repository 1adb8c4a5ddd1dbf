"""Records survive torn lines, kills and two writers."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from costmodel.errors import ConfigError
from measure.store import RecordStore

ROOT = Path(__file__).resolve().parents[2]


def record(key: str, status: str = "ok", environment: str = "e") -> dict[str, object]:
    return {"record_key": key, "status": status, "environment": {"id": environment}}


def test_records_come_back_in_order(tmp_path):
    store = RecordStore(tmp_path / "deep" / "runs.jsonl")
    assert store.records() == []
    for key in "abc":
        store.append(record(key))
    assert [r["record_key"] for r in store.records()] == ["a", "b", "c"]


def test_a_torn_last_line_is_skipped_and_then_cut(tmp_path):
    path = tmp_path / "runs.jsonl"
    store = RecordStore(path)
    store.append(record("a"))
    with path.open("ab") as file:
        file.write(b'{"record_key": "b", "sta')
    assert [r["record_key"] for r in store.records()] == ["a"]
    store.append(record("c"))
    assert [json.loads(x)["record_key"] for x in path.read_text().splitlines()] == ["a", "c"]


def test_a_file_that_is_one_long_torn_line_is_cut(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b"x" * 200_000)
    RecordStore(path).append(record("a"))
    assert [r["record_key"] for r in RecordStore(path).records()] == ["a"]


def test_a_broken_line_inside_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"record_key": "a"}\nnot json\n{"record_key": "b"}\n')
    with pytest.raises(ConfigError, match=r"runs\.jsonl:2"):
        RecordStore(path).records()


def test_nan_is_refused_before_anything_is_written(tmp_path):
    store = RecordStore(tmp_path / "runs.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        store.append({"ttft_s": float("nan")})
    assert store.records() == []


def test_finished_points_are_those_with_a_result_in_this_environment(tmp_path):
    store = RecordStore(tmp_path / "runs.jsonl")
    for key, status in (("a", "ok"), ("b", "crashed"), ("c", "oom"), ("d", "timeout")):
        store.append(record(key, status))
    store.append(record("x", "ok", environment="another"))
    assert store.finished_keys("e") == {"a", "c"}
    assert store.finished_keys() == {"a", "c", "x"}


def test_fresh_starts_over(tmp_path):
    path = tmp_path / "runs.jsonl"
    RecordStore(path).append(record("a"))
    assert RecordStore(path, fresh=True).records() == []


_WRITER = """
import sys
from measure.store import RecordStore
store = RecordStore(sys.argv[1])
for i in range(int(sys.argv[3])):
    store.append({"record_key": f"{sys.argv[2]}{i}", "filler": "x" * 5000})
"""


def _writer(path: Path, name: str, count: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", _WRITER, str(path), name, str(count)], cwd=ROOT)


def test_two_writers_do_not_mix_lines(tmp_path):
    path = tmp_path / "runs.jsonl"
    writers = [_writer(path, name, 60) for name in "ab"]
    assert [w.wait(timeout=30) for w in writers] == [0, 0]
    keys = [r["record_key"] for r in RecordStore(path).records()]
    assert sorted(keys) == sorted(f"{n}{i}" for n in "ab" for i in range(60))


def test_a_killed_writer_loses_at_most_its_last_record(tmp_path):
    path = tmp_path / "runs.jsonl"
    writer = _writer(path, "a", 100_000)
    deadline = time.monotonic() + 20
    while (not path.exists() or path.stat().st_size < 50_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait(timeout=10)
    RecordStore(path).append(record("after"))
    keys = [r["record_key"] for r in RecordStore(path).records()]
    assert len(keys) > 5
    assert keys == [f"a{i}" for i in range(len(keys) - 1)] + ["after"]


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]",
        "null",
        '{"record_key": ["a"], "status": "ok"}',
        '{"record_key": "a", "status": ["ok"]}',
        '{"record_key": "a", "status": "ok", "environment": "here"}',
        '{"record_key": "a", "status": "ok", "environment": {"id": []}}',
    ],
)
def test_a_foreign_line_is_named_with_its_number(tmp_path, line):
    path = tmp_path / "runs.jsonl"
    RecordStore(path).append(record("a"))
    before = path.read_text() + line + "\n"
    path.write_text(before)
    with pytest.raises(ConfigError, match=r"runs\.jsonl:2: not a JSON record"):
        RecordStore(path).finished_keys()
    assert path.read_text() == before


@pytest.mark.parametrize("fresh", [True, False])
def test_a_folder_is_no_records_file(tmp_path, fresh):
    with pytest.raises(ConfigError, match="is a folder"):
        RecordStore(tmp_path, fresh=fresh)


def test_a_device_is_no_records_file():
    for fresh in (True, False):
        with pytest.raises(ConfigError, match="device or a pipe"):
            RecordStore(os.devnull, fresh=fresh)


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, monkeypatch):
    store = RecordStore(tmp_path / "runs.jsonl")
    store.append(record("a"))

    def full(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(ConfigError, match="No space left"):
            store.append(record("b"))
    store.append(record("c"))
    assert [r["record_key"] for r in store.records()] == ["a", "c"]


def test_a_file_that_cannot_be_opened_is_said(tmp_path):
    path = tmp_path / ("x" * 300)
    with pytest.raises(ConfigError, match="cannot be written"):
        RecordStore(path, fresh=True)


def test_what_a_fresh_sweep_replaces_is_kept_beside_it(tmp_path):
    path = tmp_path / "runs.jsonl"
    RecordStore(path).append(record("a"))
    before = path.read_bytes()
    store = RecordStore(path, fresh=True)
    assert store.backup == tmp_path / "runs.jsonl.bak"
    assert store.backup.read_bytes() == before
    RecordStore(path, fresh=True)  # nothing to keep: the older records stay
    assert store.backup.read_bytes() == before

"""Files are written whole or not at all."""

import os
import stat
import threading

import pytest

from costmodel.errors import ConfigError
from costmodel.files import write_atomic


def test_text_and_bytes_replace_what_was_there(tmp_path):
    target = tmp_path / "a.txt"
    assert write_atomic(target, "größer\n") == target
    assert target.read_bytes() == "größer\n".encode()
    write_atomic(str(target), b"\x00\r\n")
    assert target.read_bytes() == b"\x00\r\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_lone_surrogate_becomes_a_question_mark(tmp_path):
    assert write_atomic(tmp_path / "a", "x\ud800y").read_bytes() == b"x?y"


def test_what_cannot_be_finished_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_impossible_targets_say_why(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        write_atomic(tmp_path, "x")
    with pytest.raises(ConfigError, match="does not exist"):
        write_atomic(tmp_path / "none" / "a", "x")


def test_links_are_followed_and_rights_are_those_of_a_new_file(tmp_path):
    target, link, plain = tmp_path / "a", tmp_path / "link", tmp_path / "plain"
    target.write_text("old")
    link.symlink_to(target)
    write_atomic(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    plain.write_text("")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_stays_a_pipe(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_atomic(pipe, "through")
    reader.join(5)
    assert got == [b"through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)

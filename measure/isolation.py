"""Runs functions in a process of their own and says how they ended, whatever happens to it.

    parent                                child: python -m measure.worker
    (function, arguments)  --socket-->    limits its memory, imports, calls
    Outcome                <--socket---   (status, value, message), or the socket closes

The child starts with the environment it is given, so settings that a process reads only at its
start take effect, and nothing leaks from one process to the next. The parent only waits. Both ends
are this program: the pickles never come from anywhere else.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

Status = Literal["ok", "oom", "crashed", "timeout", "error"]
#: Last characters of the child's stderr that a message keeps.
_TAIL = 400
#: Seconds a child that closed its socket, or was asked to end, has to do so.
_GRACE_S = 10.0
#: Longest wait: the system counts its milliseconds in 32 bits.
_LONGEST_S = 2e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call ended: ``value`` for "ok", else ``message`` says what happened. Where the call
    refused its point (an ``LccostError``: the process is as good as before) ``value`` is a dict,
    ``{"is_missing": True}`` where a package or a device was.
    """

    status: Status
    value: Any = None
    message: str = ""


class Worker:
    """One child process that serves one call after another until one of them ends it.

    Parameters
    ----------
    variables
        Set in the child's environment before it starts.
    limit_memory
        Cap the child's address space at what is available, so that too large a point ends as an
        error of its own instead of the kernel killing something.
    show_stderr
        Let the child write to this process's stderr (progress) instead of keeping it for messages.
    """

    def __init__(
        self,
        *,
        variables: Mapping[str, str] | None = None,
        limit_memory: bool = True,
        show_stderr: bool = False,
    ) -> None:
        self._limit_memory = limit_memory
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        ours, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "measure.worker", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if show_stderr else self._errors,
                pass_fds=(theirs.fileno(),),
                env=_environment(variables or {}),
                start_new_session=True,  # so that a timeout can end whatever the child started
            )
        self._connection = Connection(ours.detach())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether it can take another call."""
        return not self._connection.closed and self._child.poll() is None

    def call(self, function: str, arguments: Sequence[object] = (), *, timeout_s: float) -> Outcome:
        """Call ``"package.module:function"``; a crash or a timeout ends the worker."""
        try:
            self._connection.send((function, tuple(arguments), self._limit_memory))
            if not self._connection.poll(min(timeout_s, _LONGEST_S)):
                self.close()
                return Outcome(status="timeout", message=f"no result after {timeout_s:g} s")
            status, value, message = self._connection.recv()
            return Outcome(status=status, value=value, message=message)
        except (EOFError, ConnectionError):
            return self._crashed()
        except BaseException:  # interrupted: leave no child behind
            self.close()
            raise

    def close(self) -> None:
        """End the child and whatever it started."""
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._errors.close()

    def _crashed(self) -> Outcome:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_GRACE_S)
        self._errors.seek(0)
        tail = self._errors.read().decode("utf-8", "replace").strip()[-_TAIL:]
        code = self._child.poll()
        self.close()
        if code == -signal.SIGKILL:
            how = "killed (SIGKILL), as the kernel does when memory runs out"
        elif code is not None and code < 0:
            how = f"ended by signal {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code} and no result"
        return Outcome(status="crashed", message=f"{how}: {tail}" if tail else how)


def run_isolated(
    function: str,
    arguments: Sequence[object] = (),
    *,
    timeout_s: float,
    variables: Mapping[str, str] | None = None,
    limit_memory: bool = True,
    show_stderr: bool = False,
) -> Outcome:
    """Call ``"package.module:function"`` with ``arguments`` in a process of its own; options as of
    :class:`Worker`.
    """
    options: dict[str, Any] = {"limit_memory": limit_memory, "show_stderr": show_stderr}
    with Worker(variables=variables, **options) as worker:
        return worker.call(function, arguments, timeout_s=timeout_s)


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Extend the parent's: this source tree first on the path, ``variables`` on top."""
    root = str(Path(__file__).resolve().parent.parent)
    path = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}

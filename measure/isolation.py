"""Runs a function in a fresh process and says how it ended, whatever happens to it.

    parent                                   child: python -m measure.worker
    pickled (function, arguments)  --stdin-->  limits its memory, imports, calls
    Outcome  <------------------ temp file --  pickled value or error

The child starts with the environment it is given, so settings that a process reads only at its
start take effect, and nothing leaks from one point to the next. Both ends are this program: the
pickles never come from anywhere else.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "oom", "crashed", "timeout", "error"]
#: Last characters of the child's stderr that a message keeps.
_TAIL = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call ended: ``value`` for "ok", else ``message`` says what happened."""

    status: Status
    value: Any = None
    message: str = ""


def run_isolated(
    function: str,
    arguments: Sequence[object] = (),
    *,
    timeout_s: float,
    variables: Mapping[str, str] | None = None,
    limit_memory: bool = True,
    show_stderr: bool = False,
) -> Outcome:
    """Call ``"package.module:function"`` with ``arguments`` in a process of its own.

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
    request = pickle.dumps((function, tuple(arguments), limit_memory))
    with tempfile.TemporaryFile() as result:
        child = subprocess.Popen(
            [sys.executable, "-m", "measure.worker", str(result.fileno()), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=None if show_stderr else subprocess.PIPE,
            pass_fds=(result.fileno(),),
            env=_environment(variables or {}),
            start_new_session=True,  # so that a timeout can end whatever the child started
        )
        try:
            _, errors = child.communicate(request, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _end(child)
            return Outcome(status="timeout", message=f"no result after {timeout_s:g} s")
        except BaseException:  # interrupted: leave no child behind
            _end(child)
            raise
        result.seek(0)
        return _outcome(child.returncode, result.read(), (errors or b"").decode("utf-8", "replace"))


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Extend the parent's: this source tree first on the path, ``variables`` on top."""
    root = str(Path(__file__).resolve().parent.parent)
    path = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}


def _outcome(returncode: int, payload: bytes, errors: str) -> Outcome:
    if returncode == 0 and payload:
        status, value, message = pickle.loads(payload)
        return Outcome(status=status, value=value, message=message)
    tail = errors.strip()[-_TAIL:]
    if returncode == -signal.SIGKILL:
        how = "killed (SIGKILL), as the kernel does when memory runs out"
    elif returncode < 0:
        how = f"ended by signal {signal.Signals(-returncode).name}"
    else:
        how = f"ended with exit code {returncode} and no result"
    return Outcome(status="crashed", message=f"{how}: {tail}" if tail else how)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child's whole session and reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()

"""The child of ``isolation``: takes calls from a socket, makes them, says how each ended.

Started as ``python -m measure.worker FD PARENT``; of no use on its own.
"""

import contextlib
import ctypes
import importlib
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from costmodel.errors import LccostError, MissingExtraError, NotApplicableError
from measure.available_memory import available_memory_bytes

_PR_SET_PDEATHSIG = 1
#: What a point may raise by itself; anything else is a crash, with its traceback as the message.
_POINT_ERRORS = (
    *(ValueError, TypeError, ArithmeticError, LookupError, AttributeError, OSError),
    ImportError,  # an extra that is not installed
)
#: What PyTorch's allocators say when memory runs out (as RuntimeError on a CPU).
_OOM_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


def main() -> None:
    """Serve calls until the parent closes the socket."""
    die_with_parent(int(sys.argv[2]))
    with Connection(int(sys.argv[1])) as parent:
        while (request := _next(parent)) is not None:
            function, arguments, limit_memory = request
            parent.send(call(function, arguments, limit_memory=limit_memory))


def _next(parent: Connection) -> Any:
    with contextlib.suppress(EOFError, ConnectionError):
        return parent.recv()
    return None


def call(
    function: str, arguments: tuple[object, ...], *, limit_memory: bool = False
) -> tuple[str, object, str]:
    """Return (status, value, message); every way a point can fail by itself has a status."""
    module, _, name = function.partition(":")
    try:
        target = getattr(importlib.import_module(module), name)
        if limit_memory:  # after the imports, whose reservations are large and never touched
            _limit_memory()
        return "ok", target(*arguments), ""
    except MemoryError as error:
        return "oom", None, str(error) or "out of memory"
    except MissingExtraError as error:
        return "error", {"is_missing": True}, str(error)
    except NotApplicableError as error:
        refusal = {"status": "not_applicable", "applicable": False, "reason": str(error)}
        return "error", refusal, str(error)
    except LccostError as error:
        return "error", {}, str(error)
    except RuntimeError as error:
        text = str(error)
        oom = any(word in text.lower() for word in _OOM_WORDS)
        return ("oom" if oom else "error"), None, f"{type(error).__name__}: {text[:1000]}"
    except _POINT_ERRORS as error:
        return "error", None, f"{type(error).__name__}: {error}"


def die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process when its parent is killed (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was killed before the kernel was asked
        sys.exit("the process that started this worker is gone")


def _limit_memory() -> None:
    """Let the address space grow by what is available now and no further."""
    available = available_memory_bytes()
    statm = Path("/proc/self/statm")
    if available is None or not statm.exists():
        return
    own = int(statm.read_text("ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = own + available
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()

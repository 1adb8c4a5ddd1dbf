"""Where tasks run: here, in local processes, or on a Ray cluster.

All three take the same tasks and give the same answers. A worker that dies loses nothing: what it
was doing runs again elsewhere. Every process is set up once, by a call of its own.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Self

from costmodel.errors import ConfigError, LccostError, MissingExtraError

Task = tuple[Callable[..., Any], tuple[Any, ...]]
Progress = Callable[[int], None]
#: Hears of every task's result as it comes: (index of the task, result).
Done = Callable[[int, Any], None]
#: How often tasks are started again after workers died.
_RESTARTS = 3
_NO_RAY = "a Ray cluster needs Ray: pip install 'lccost[ray]'"


class Inline:
    """In this process; for little work and tests."""

    def __init__(self, setup: Task) -> None:
        setup[0](*setup[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self, tasks: Sequence[Task], progress: Progress, done: Done | None = None) -> list[Any]:
        """Results in the order of the tasks; ``progress`` and ``done`` hear of each."""
        out = []
        for index, (function, arguments) in enumerate(tasks):
            out.append(function(*arguments))
            if done is not None:
                done(index, out[-1])
            progress(1)
        return out


class Processes:
    """One local process per core."""

    def __init__(self, setup: Task, workers: int) -> None:
        self.setup = setup
        self.workers = workers
        self.pool = self._open()

    def _open(self) -> ProcessPoolExecutor:
        # Spawned, not forked: a fork of a process with threads may deadlock.
        return ProcessPoolExecutor(
            self.workers,
            mp_context=get_context("spawn"),
            initializer=self.setup[0],
            initargs=self.setup[1],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.pool.shutdown(wait=error is None, cancel_futures=True)

    def run(self, tasks: Sequence[Task], progress: Progress, done: Done | None = None) -> list[Any]:
        """See ``Inline.run``."""
        results: list[Any] = [None] * len(tasks)
        left = list(range(len(tasks)))
        for attempt in range(_RESTARTS + 1):
            try:
                futures = {self.pool.submit(tasks[i][0], *tasks[i][1]): i for i in left}
                _gather(futures, results, left, progress, done)
                return results
            except BrokenProcessPool:
                self.pool.shutdown(wait=False, cancel_futures=True)
                if attempt == _RESTARTS:
                    raise ConfigError(
                        f"worker processes died {attempt + 1} times (out of memory?); "
                        "use --workers 1, or fewer requests"
                    ) from None
                self.pool = self._open()
        raise AssertionError("unreachable")


def _gather(
    futures: dict[Future[Any], int],
    results: list[Any],
    left: list[int],
    progress: Progress,
    done: Done | None,
) -> None:
    """Take results as they come; what is in ``left`` at an exception is still to be done."""
    waiting = set(futures)
    while waiting:
        finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in finished:
            i = futures[future]
            results[i] = future.result()
            left.remove(i)
            if done is not None:
                done(i, results[i])
            progress(1)


class RayCluster:
    """A Ray cluster: ``ray`` starts one here or joins the one that the environment names,
    ``ray://host:port`` joins that one. Ray runs a task again when its worker dies. Every task is
    given ``num_cpus`` processors and ``num_gpus`` GPUs of its own.
    """

    def __init__(
        self, setup: Task, address: str | None, *, num_cpus: float = 1, num_gpus: float = 0
    ) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtraError(_NO_RAY) from error
        self.ray = ray
        self.started_here = not ray.is_initialized()
        if self.started_here:
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False)
            except (ValueError, ImportError) as error:
                # Ray's client for ray:// addresses is a part of its own.
                raise MissingExtraError(f"Ray cannot use {address}: {error}") from error
            except (ConnectionError, OSError, RuntimeError) as error:
                raise LccostError(f"no Ray cluster answers at {address}: {error}") from error
        self.setup = ray.put(setup)
        self.remote = ray.remote(_on_ray).options(
            max_retries=_RESTARTS, num_cpus=num_cpus, num_gpus=num_gpus
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.started_here:
            self.ray.shutdown()

    def run(self, tasks: Sequence[Task], progress: Progress, done: Done | None = None) -> list[Any]:
        """See ``Inline.run``."""
        results: list[Any] = [None] * len(tasks)
        token = self.setup.hex()
        futures = {
            self.remote.remote(self.setup, token, function, arguments).future(): i
            for i, (function, arguments) in enumerate(tasks)
        }
        _gather(futures, results, list(range(len(tasks))), progress, done)
        return results


_RAY_SETUP = ""


def _on_ray(setup: Task, token: str, function: Callable[..., Any], arguments: Any) -> Any:
    global _RAY_SETUP
    if token != _RAY_SETUP:
        setup[0](*setup[1])
        _RAY_SETUP = token
    return function(*arguments)


Executor = Inline | Processes | RayCluster


def check_executor(kind: str) -> None:
    """Raise ``ConfigError`` for a kind there is not, ``MissingExtraError`` where Ray is asked for
    and not installed; nothing is started.
    """
    if kind == "local":
        return
    if kind != "ray" and not kind.startswith("ray://"):
        raise ConfigError(f"executor: expected local, ray or ray://HOST:PORT, got {kind!r}")
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError(_NO_RAY)


def open_executor(
    kind: str,
    setup: Task,
    workers: int | None = None,
    *,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> Executor:
    """``local`` (processes; one worker stays in this one), ``ray`` or ``ray://address``."""
    if kind == "local":
        n = workers or os.cpu_count() or 1
        return Inline(setup) if n == 1 else Processes(setup, n)
    check_executor(kind)
    address = os.environ.get("RAY_ADDRESS") if kind == "ray" else kind
    return RayCluster(setup, address, num_cpus=num_cpus, num_gpus=num_gpus)

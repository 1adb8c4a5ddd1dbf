"""Where candidates are evaluated: here, in local processes, or on a Ray cluster.

All three take the same tasks and give the same answers. A worker that dies loses nothing: what it
was doing runs again elsewhere.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Self

from costmodel.errors import ConfigError, MissingExtraError
from costmodel.planning.requests import Requests
from costmodel.planning.spec import PlanSpec
from costmodel.planning.worker import set_context

Task = tuple[Callable[..., Any], tuple[Any, ...]]
Progress = Callable[[int], None]
#: How often tasks are started again after workers died.
_RESTARTS = 3


class Inline:
    """In this process; for small plans and tests."""

    def __init__(self, spec: PlanSpec, requests: Requests) -> None:
        set_context(spec, requests)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self, tasks: Sequence[Task], progress: Progress) -> list[Any]:
        """Results in the order of the tasks; ``progress`` hears of each that is done."""
        out = []
        for function, arguments in tasks:
            out.append(function(*arguments))
            progress(1)
        return out


class Processes:
    """One local process per core."""

    def __init__(self, spec: PlanSpec, requests: Requests, workers: int) -> None:
        self.context = (spec, requests)
        self.workers = workers
        self.pool = self._open()

    def _open(self) -> ProcessPoolExecutor:
        # Spawned, not forked: a fork of a process with threads may deadlock.
        return ProcessPoolExecutor(
            self.workers,
            mp_context=get_context("spawn"),
            initializer=set_context,
            initargs=self.context,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.pool.shutdown(wait=error is None, cancel_futures=True)

    def run(self, tasks: Sequence[Task], progress: Progress) -> list[Any]:
        """See ``Inline.run``."""
        results: list[Any] = [None] * len(tasks)
        left = list(range(len(tasks)))
        for attempt in range(_RESTARTS + 1):
            try:
                futures = {self.pool.submit(tasks[i][0], *tasks[i][1]): i for i in left}
                _gather(futures, results, left, progress)
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
    futures: dict[Future[Any], int], results: list[Any], left: list[int], progress: Progress
) -> None:
    """Take results as they come; what is in ``left`` at an exception is still to be done."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            i = futures[future]
            results[i] = future.result()
            left.remove(i)
            progress(1)


class RayCluster:
    """A Ray cluster: ``ray`` starts one here or joins the one that the environment names,
    ``ray://host:port`` joins that one. Ray runs a task again when its worker dies.
    """

    def __init__(self, spec: PlanSpec, requests: Requests, address: str | None) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtraError("a Ray cluster needs Ray: pip install 'lccost[ray]'") from error
        self.ray = ray
        self.started_here = not ray.is_initialized()
        if self.started_here:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        self.context = ray.put((spec, requests))
        self.remote = ray.remote(_on_ray).options(max_retries=_RESTARTS, num_cpus=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.started_here:
            self.ray.shutdown()

    def run(self, tasks: Sequence[Task], progress: Progress) -> list[Any]:
        """See ``Inline.run``."""
        results: list[Any] = [None] * len(tasks)
        token = self.context.hex()
        futures = {
            self.remote.remote(self.context, token, function, arguments).future(): i
            for i, (function, arguments) in enumerate(tasks)
        }
        _gather(futures, results, list(range(len(tasks))), progress)
        return results


_RAY_CONTEXT = ""


def _on_ray(
    context: tuple[PlanSpec, Requests], token: str, function: Callable[..., Any], arguments: Any
) -> Any:
    global _RAY_CONTEXT
    if token != _RAY_CONTEXT:
        set_context(*context)
        _RAY_CONTEXT = token
    return function(*arguments)


Executor = Inline | Processes | RayCluster


def open_executor(
    kind: str, spec: PlanSpec, requests: Requests, workers: int | None = None
) -> Executor:
    """``local`` (processes; one worker stays in this one), ``ray`` or ``ray://address``."""
    if kind == "local":
        n = workers or os.cpu_count() or 1
        return Inline(spec, requests) if n == 1 else Processes(spec, requests, n)
    if kind == "ray":
        return RayCluster(spec, requests, os.environ.get("RAY_ADDRESS"))
    if kind.startswith("ray://"):
        return RayCluster(spec, requests, kind)
    raise ConfigError(f"executor: expected local, ray or ray://HOST:PORT, got {kind!r}")

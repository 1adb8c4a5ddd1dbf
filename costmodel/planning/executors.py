"""Where candidates are evaluated: the executors of ``costmodel.executors``, set up with a plan."""

from costmodel import executors
from costmodel.executors import Executor, Progress, Task
from costmodel.planning.requests import Requests
from costmodel.planning.spec import PlanSpec
from costmodel.planning.worker import set_context

__all__ = ["Executor", "Inline", "Processes", "Progress", "RayCluster", "Task", "open_executor"]


class Inline(executors.Inline):
    """In this process; for small plans and tests."""

    def __init__(self, spec: PlanSpec, requests: Requests) -> None:
        super().__init__((set_context, (spec, requests)))


class Processes(executors.Processes):
    """One local process per core."""

    def __init__(self, spec: PlanSpec, requests: Requests, workers: int) -> None:
        super().__init__((set_context, (spec, requests)), workers)


class RayCluster(executors.RayCluster):
    """A Ray cluster; one processor a candidate."""

    def __init__(self, spec: PlanSpec, requests: Requests, address: str | None) -> None:
        super().__init__((set_context, (spec, requests)), address)


def open_executor(
    kind: str, spec: PlanSpec, requests: Requests, workers: int | None = None
) -> Executor:
    """``local`` (processes; one worker stays in this one), ``ray`` or ``ray://address``."""
    return executors.open_executor(kind, (set_context, (spec, requests)), workers)

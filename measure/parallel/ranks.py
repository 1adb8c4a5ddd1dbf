"""Starts the ranks of a point with torchrun's launcher, and joins what they observed.

Every rank is a process of its own on this machine: rank r runs on cuda:r over NCCL, or on the CPU
over Gloo. Times are rank 0's (all wait for each other in every block), bytes are
kept for all.
"""

import os
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from costmodel.errors import MeasurementError, MissingExtraError, NotApplicableError
from measure.observation_options import How
from measure.points import MeasurePoint
from measure.worker import call, die_with_parent

#: Seconds that a rank waits for the others before it gives up.
_PATIENCE_S = 300.0
_FLOPS = ("executed_prefill_flops", "executed_decode_flops")
_PEAKS = ("peak_prefill_bytes", "peak_decode_bytes")
#: What each rank has its own of.
_PER_RANK = (
    *("weights_bytes", "state_bytes", "state_host_bytes", "state_allocated_bytes"),
    *_PEAKS,
    *_FLOPS,
)


def observe(point: MeasurePoint, how: How | None = None) -> dict[str, Any]:
    """Measure ``point`` over its ranks; keys as of ``measure.observation.observe``, and ``ranks``.

    Raises what a rank could not do as an error of the point.
    """
    results = launch(point.tp, "measure.parallel.ranks:observe_rank", (point, how), point.device)
    # bytes are one GPU's, FLOPs the whole model's
    flops = {k: sum(r[k] for r in results) if results[0].get(k) else None for k in _FLOPS}
    largest = {k: max(r[k] for r in results) if results[0].get(k) else None for k in _PEAKS}
    ranks = [{k: r.get(k) for k in _PER_RANK} for r in results]
    return {**results[0], **flops, **largest, "ranks": ranks}


def observe_rank(point: MeasurePoint, how: How | None) -> dict[str, Any]:
    """One rank's part."""
    from measure.observation import observe as observe_here

    if point.device != "cpu":
        return observe_here(replace(point, device=f"cuda:{distributed.get_rank()}"), how)
    return observe_here(point, how)


def launch(n_ranks: int, function: str, arguments: tuple[Any, ...], device: str) -> list[Any]:
    """Call ``"package.module:function"`` in every rank; values by rank.

    Raises ``MemoryError`` where a rank ran out of memory, ``NotApplicableError`` and
    ``MissingExtraError`` as a rank did, else ``MeasurementError``.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        found: Mapping[int, Any] = elastic_launch(config, _rank)(function, arguments, device)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise MeasurementError(f"rank {rank} ended: {failure.message}"[:1000]) from None
    failed = [(rank, found[rank]) for rank in sorted(found) if found[rank][0] != "ok"]
    for rank, ending in sorted(failed, key=lambda x: x[1][0] != "oom"):
        raise _failure(rank, *ending)
    return [found[rank][1] for rank in range(n_ranks)]


def _failure(rank: int, status: str, value: object, message: str) -> Exception:
    """What a rank could not do (values as of ``measure.worker.call``)."""
    text = f"rank {rank}: {message}"
    said = value if isinstance(value, dict) else {}
    if status == "oom":
        return MemoryError(text)
    if said.get("status") == "not_applicable":
        return NotApplicableError(message)  # of the point, whichever rank says so
    return (MissingExtraError if said.get("is_missing") else MeasurementError)(text)


def _rank(function: str, arguments: tuple[Any, ...], device: str) -> tuple[str, Any, str]:
    """What one process does: join the others, make the call, say how it ended."""
    die_with_parent(os.getppid())
    gpu = device != "cpu"
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(
        "nccl" if gpu else "gloo", timeout=timedelta(seconds=_PATIENCE_S)
    )
    try:
        return call(function, arguments)
    finally:
        distributed.destroy_process_group()

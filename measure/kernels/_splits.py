"""Split-KV: how many programs share one sequence, and where they leave their partial results.

A decode step has few queries and many keys, so the keys of one KV head are shared out over
``n_splits`` programs. Each leaves, per query row, the largest score m, the sum l of exp2(score - m)
and the sum of exp2(score - m) V; ``merge_splits`` adds them up. Scores are in units of log2, so
that the hardware's exp2 is used as it is.

The count depends on shapes only, never on the lengths a step really has: those lie in a tensor on
the device, so a captured CUDA graph stays right while the sequence grows.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

#: Streaming multiprocessors assumed where there is no CUDA device (interpreter).
_NO_DEVICE_SMS = 1
#: Blocks of 128 threads that should run on one SM at a time to hide the latency of its loads.
BLOCKS_PER_SM = 4
#: More splits than this only add to the merge.
MAX_SPLITS = 128


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return _NO_DEVICE_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def split_count(
    units: int, capacity: int, block: int, sms: int, *, blocks_per_sm: int = BLOCKS_PER_SM
) -> int:
    """Programs per unit (a sequence's KV head) that fill the device once.

    Parameters
    ----------
    units
        Sequences x KV heads x whatever else is a program of its own.
    capacity
        Entries there is room for; a split never gets less than one ``block`` of them.
    sms
        Streaming multiprocessors.
    """
    fill = max(1, sms * blocks_per_sm // units)
    return max(1, min(fill, -(-capacity // block), MAX_SPLITS))


@dataclass(frozen=True, slots=True, eq=False)
class Partials:
    """Partial results, fp32: ``acc`` [rows, splits, H], ``m`` and ``l`` [rows, splits]."""

    acc: Tensor
    m: Tensor
    l: Tensor

    @classmethod
    def empty(cls, rows: int, splits: int, size: int, device: torch.device) -> "Partials":
        """Make room; call it once, outside a graph."""
        return cls(
            torch.empty(rows, splits, size, dtype=torch.float32, device=device),
            torch.empty(rows, splits, dtype=torch.float32, device=device),
            torch.empty(rows, splits, dtype=torch.float32, device=device),
        )

    @property
    def splits(self) -> int:
        """Programs per row."""
        return self.m.shape[1]

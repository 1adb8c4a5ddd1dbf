"""Large workloads in pieces that stay in cache, several at once."""

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Result = TypeVar("Result")

#: Points evaluated at once by one thread: about 20 live arrays of this many float64 stay in a
#: 2 MB L2 cache.
CHUNK_POINTS = 16384
#: Points of a chunk where threads share the work: a call of numpy must last long enough for the
#: others to run meanwhile, or they wait for the interpreter more than they compute (16,384 points
#: in two threads take as long as in one).
THREAD_POINTS = 65536
PARALLEL_CHUNKS = 4
#: Up to here distinct batches are found by listing, not by sorting.
MOST_LISTED = 2**20


def chunks(size: int) -> list[slice]:
    """Slices that cover ``size`` points: large ones where there is work for several threads."""
    step = THREAD_POINTS if _is_shared(size) else CHUNK_POINTS
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def _is_shared(size: int) -> bool:
    return size >= PARALLEL_CHUNKS * THREAD_POINTS


def distinct(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Distinct values, and which of them each value is; small whole numbers without sorting."""
    if not values.size or values.max() > MOST_LISTED:
        return np.unique(values, return_inverse=True)
    whole = values.astype(np.intp)
    seen = np.zeros(int(whole.max()) + 1, dtype=bool)
    seen[whole] = True
    found = np.flatnonzero(seen)
    place = np.zeros(seen.size, dtype=np.intp)
    place[found] = np.arange(found.size)
    return found.astype(np.float64), place[whole]


def in_threads(function: Callable[[slice], Result], parts: list[slice]) -> Iterator[Result]:
    """Results in order. numpy lets go of the interpreter, so large chunks run at once; smaller
    work is not worth the threads.
    """
    if not parts or not _is_shared(parts[-1].stop):
        yield from map(function, parts)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, parts)

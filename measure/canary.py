"""A fixed piece of work that says whether the machine is as fast as a moment ago.

A product of 512 x 512 matrices (compute), a sum over 64 MiB (bandwidth): about 15 ms on one core.
"""

import time

import torch

_REPEATS = 5


def canary_s() -> float:
    """Median seconds of CPU time of the fixed work."""
    matrix = torch.ones(512, 512)
    memory = torch.ones(2**24)
    samples = []
    for _ in range(_REPEATS + 1):
        start = time.thread_time()
        torch.mm(matrix, matrix)
        memory.sum()
        samples.append(time.thread_time() - start)
    return sorted(samples[1:])[_REPEATS // 2]  # the first call sets libraries up

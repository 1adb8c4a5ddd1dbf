"""Copies from host memory that run beside the GPU's work.

Pinned memory and a stream of their own let a layer's cache travel while the layer before it
computes; the stream that needs it waits for the copy's event, the host never does. Whole storages
are copied: a part of a [batch, heads, tokens, ...] tensor is many pieces, and would be gathered on
the host first.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Makes the current stream wait until the copies are there.
Wait = Callable[[], None]


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def start_copies(targets: Sequence[Tensor], sources: Sequence[Tensor], after: Any = None) -> Wait:
    """Begin copying each source (on the host) into its target, after the event ``after``, or after
    all that the current stream was asked for until now; without a GPU the copies are made at once.
    """
    device = targets[0].device
    if device.type != "cuda":
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return lambda: None
    stream = _stream(device)
    # the targets' memory may have belonged to work that the current stream has yet to do, and the
    # sources' last token may still be on its way to the host
    if after is None:
        stream.wait_stream(torch.cuda.current_stream(device))
    else:
        stream.wait_event(after)
    with torch.cuda.stream(stream):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        event = stream.record_event()
    return lambda: torch.cuda.current_stream(device).wait_event(event)

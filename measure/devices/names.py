"""Names of devices; importing this loads neither torch nor NVML."""

import re
from collections.abc import Mapping

_CUDA = re.compile(r"cuda(?::(\d{1,3}))?")


def is_device_name(name: str) -> bool:
    """``cpu``, ``cuda`` or ``cuda:N``."""
    return name == "cpu" or _CUDA.fullmatch(name) is not None


def cuda_index(name: str) -> int | None:
    """N of ``cuda:N`` (0 for ``cuda``), None for anything else."""
    match = _CUDA.fullmatch(name)
    return int(match[1] or 0) if match else None


def visible_gpu(index: int, variables: Mapping[str, str]) -> int | str:
    """What NVML calls CUDA's device ``index``: an index, or a UUID where the variable has one.

    ``CUDA_VISIBLE_DEVICES`` reorders and hides devices for CUDA, not for NVML. Without torch this
    is the best that can be known: CUDA may order unlike GPUs by speed.
    """
    listed = variables.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return index
    names = [x.strip() for x in listed.split(",") if x.strip()]
    if index >= len(names):
        return index
    return int(names[index]) if names[index].isdigit() else names[index]

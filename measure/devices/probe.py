"""What PyTorch finds on this machine; called in a process of its own, as it may start CUDA."""

from typing import Any

import torch


def missing(n_gpus: int, index: int) -> str:
    """Say why ``n_gpus`` devices from cuda:``index`` on cannot be used; empty: they can."""
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        return f"PyTorch {torch.__version__} {built}; lccost doctor says more"
    found = torch.cuda.device_count()
    if found < index + n_gpus:
        return f"there are {found} CUDA devices, cuda:{index + n_gpus - 1} was asked for"
    return ""


def title(index: int) -> str:
    """Name of cuda:``index``, which is there."""
    name: str = torch.cuda.get_device_name(index)
    return name


def cuda_facts() -> dict[str, Any]:
    """Versions and devices as PyTorch sees them; nothing of CUDA is called where it finds none."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "devices": [],
    }
    if not facts["available"]:
        return facts
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        facts["devices"].append(
            {
                "device": f"cuda:{index}",
                "name": p.name,
                "compute_capability": f"{p.major}.{p.minor}",
                "memory_bytes": p.total_memory,
                "multiprocessors": p.multi_processor_count,
                "l2_bytes": p.L2_cache_size,
                "uuid": str(getattr(p, "uuid", "")) or None,
            }
        )
    return facts

"""What machine and software a measurement was made with, and the settings a worker runs under.

Variables of the C library and of OpenMP are read once when a process starts, so workers get them
from outside (``isolation``). Nothing on the machine is ever changed.
"""

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from measure.devices.names import cuda_index, visible_gpu
from measure.devices.nvml import FIXED, Nvml, open_nvml

_PACKAGES = (
    *("lccost", "torch", "numpy", "transformers", "triton", "nvidia-ml-py"),
    *("optimum-quanto", "hqq"),
)
#: Variables that change how fast things run; recorded when set.
_VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "MKL_NUM_THREADS", "KMP_BLOCKTIME"),
    *("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD"),
    *(
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "CUDA_VISIBLE_DEVICES",
        "ONEDNN_MAX_CPU_ISA",
        "MKL_ENABLE_INSTRUCTIONS",
    ),
)


def worker_variables(threads: int) -> dict[str, str]:
    """Variables of a CPU worker.

    glibc keeps freed memory instead of returning it: otherwise every large temporary is faulted in
    page by page again (2 to 6 times the time of a long prefill or a dequantised cache). Idle
    OpenMP threads sleep: spinning ones lose whole scheduler ticks to a busy neighbour.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "MALLOC_TOP_PAD_": str(2**28),
    }


def fingerprint(variables: Mapping[str, str] | None = None, device: str = "cpu") -> dict[str, Any]:
    """Describe machine, ``device``, software and ``variables``; ``id`` changes when any of it does.

    Unknown facts are None. Hosts and users are not named.
    """
    environment = {**os.environ, **(variables or {})}
    facts: dict[str, Any] = {
        **_machine(),
        "gpu": _gpu(device),
        "versions": dict(_versions()),
        "variables": {k: environment[k] for k in _VARIABLES if k in environment},
        "git": _git_revision(),
    }
    stable = {k: v for k, v in facts.items() if k != "git"}
    text = json.dumps(stable, sort_keys=True)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:16], **facts}


@functools.cache
def _gpu(device: str) -> dict[str, Any] | None:
    """What the driver says about the GPU and how it is set, without touching CUDA; a GPU it says
    nothing about has a ``reason``.
    """
    index = cuda_index(device)
    if index is None:
        return None
    gpu = open_nvml(visible_gpu(index, os.environ))
    if not isinstance(gpu, Nvml):
        return {"reason": gpu.reason}
    facts = gpu.facts(FIXED)
    memory = gpu.read("memory") or {}
    uuid = facts.pop("uuid")
    # which of several GPUs it was, without naming it
    facts["uuid_hash"] = hashlib.sha256(uuid.encode()).hexdigest()[:12] if uuid else None
    return {**facts, "memory_bytes": memory.get("total"), "missing": dict(gpu.reasons)}


@functools.cache
def _machine() -> dict[str, Any]:
    info = _read("/proc/cpuinfo").partition("\n\n")[0]
    fields = dict(
        (key.strip(), value.strip())
        for key, _, value in (line.partition(":") for line in info.splitlines())
    )
    flags = set(fields.get("flags", "").split())
    notable = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "sve", "bf16")
    total = next((x for x in _read("/proc/meminfo").splitlines() if x.startswith("MemTotal")), "")
    return {
        "cpu": fields.get("model name") or platform.processor() or None,
        "cpu_vendor": fields.get("vendor_id"),
        "cpu_flags": [x for x in notable if x in flags],
        "cores": os.cpu_count(),
        "last_level_cache_bytes": _last_level_cache_bytes(),
        "memory_bytes": int(total.split()[1]) * 1024 if total else None,
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "system": platform.system(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled").strip() or None,
        "python": sys.version.split()[0],
    }


def _last_level_cache_bytes() -> int | None:
    sizes = [
        _read(str(path)).strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    factors = {"K": 2**10, "M": 2**20, "G": 2**30}
    values = [int(s[:-1]) * factors[s[-1]] for s in sizes if s and s[-1] in factors]
    return max(values, default=None)


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = []
    for name in _PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


@functools.cache
def _git_revision() -> str | None:
    """Commit of the source tree, with ``+`` when it has changes; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return ""

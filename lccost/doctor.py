"""What of this machine can be measured, what cannot, and why: facts for ``lccost doctor``.

Nothing is changed on the machine; PyTorch is asked in a process of its own.
"""

import importlib.util
import os
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from measure.available_memory import available_memory_bytes
from measure.devices.energy import Unavailable
from measure.devices.names import visible_gpu
from measure.devices.nvml import CHANGING, FIXED, Nvml, load_nvml, open_nvml
from measure.devices.rapl import open_rapl
from measure.environment import fingerprint
from measure.isolation import run_isolated
from measure.load import ForeignLoad

#: package to import, name it is installed under, what it is for, how to get it
_PACKAGES = (
    ("torch", "torch", "measure, calibrate", "pip install 'lccost[measure]'"),
    ("pynvml", "nvidia-ml-py", "GPU clocks, power, energy", "pip install 'lccost[measure]'"),
    ("triton", "triton", "--engine lccost", "pip install triton"),
    ("transformers", "transformers", "--engine transformers", "pip install 'lccost[transformers]'"),
    ("safetensors", "safetensors", "--weights FOLDER", "pip install 'lccost[transformers]'"),
    ("optimum.quanto", "optimum-quanto", "method hf_quanto", "pip install optimum-quanto"),
    ("hqq", "hqq", "method hf_hqq", "pip install hqq"),
    ("tomli_w", "tomli-w", "calibrate", "pip install lccost"),
    ("ray", "ray", "--executor ray", "pip install 'lccost[ray]'"),
    ("matplotlib", "matplotlib", "report, --plot", "pip install 'lccost[report]'"),
)
_PROBE_S, _LOAD_SPAN_S = 120.0, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Something that cannot be measured here, why, and what would help."""

    what: str
    why: str
    remedy: str = ""


def examine(device: str | None = None) -> dict[str, Any]:
    """Facts of the machine under ``machine``, ``packages``, ``cuda``, ``gpus``, ``load`` and
    ``limits``; ``device`` (cuda:N) leaves the other GPUs out.
    """
    packages = [_package(*row) for row in _PACKAGES]
    installed = {p["name"]: p["version"] for p in packages}
    cuda = _cuda(installed["torch"] is not None)
    load = _load()
    gpus, why_no_gpus = _gpus(cuda, device)
    found = fingerprint()
    limits = [
        *_cpu_limits(load),
        *(() if gpus else (Limit(what="GPU facts, power and energy", why=why_no_gpus),)),
        *(limit for gpu in gpus for limit in _gpu_limits(gpu)),
        *_cuda_limits(cuda),
        *(
            Limit(what=p["needed_for"], why=f"{p['name']} is not installed", remedy=p["remedy"])
            for p in packages
            if p["version"] is None
        ),
    ]
    return {
        "machine": {
            **{k: v for k, v in found.items() if k not in ("id", "versions", "variables", "gpu")},
            "available_memory_bytes": available_memory_bytes(),
            "environment_id": found["id"],
        },
        "packages": packages,
        "cuda": cuda,
        "gpus": gpus,
        "load": load,
        "limits": [
            {"what": x.what, "why": x.why, "remedy": x.remedy or None} for x in _once(limits)
        ],
    }


def _once(limits: list[Limit]) -> list[Limit]:
    return list(dict.fromkeys(limits))


def _package(module: str, name: str, needed_for: str, remedy: str) -> dict[str, Any]:
    version = None
    try:
        if importlib.util.find_spec(module) is not None:
            version = metadata.version(name)
    except (ModuleNotFoundError, metadata.PackageNotFoundError):
        version = None
    return {"name": name, "version": version, "needed_for": needed_for, "remedy": remedy}


def _cuda(has_torch: bool) -> dict[str, Any]:
    """What PyTorch finds; ``reason`` where it cannot say."""
    empty: dict[str, Any] = {"torch": None, "torch_cuda": None, "available": False, "devices": []}
    if not has_torch:
        return {**empty, "reason": "PyTorch is not installed"}
    outcome = run_isolated("measure.devices.probe:cuda_facts", timeout_s=_PROBE_S,
                           limit_memory=False)  # fmt: skip
    if outcome.status != "ok":
        return {**empty, "reason": f"PyTorch could not say: {outcome.message}"}
    facts: dict[str, Any] = outcome.value
    reason = None
    if not facts["available"]:
        built = facts["torch_cuda"] is None
        reason = "this PyTorch is built without CUDA" if built else "PyTorch finds no CUDA device"
    return {**facts, "reason": reason}


def _load() -> dict[str, Any]:
    """Cores that others use now, over half a second."""
    load = ForeignLoad()
    time.sleep(_LOAD_SPAN_S)
    return {"foreign_cores": round(load.foreign_cores(), 2), "cores": os.cpu_count()}


def _gpus(cuda: dict[str, Any], device: str | None) -> tuple[list[dict[str, Any]], str]:
    """(GPUs that the driver shows, why there are none)."""
    nvml = load_nvml()
    if isinstance(nvml, Unavailable):
        return [], nvml.reason
    names: list[tuple[str | None, int | str]]
    if cuda["devices"]:
        names = [(d["device"], d["uuid"] or _index(d["device"])) for d in cuda["devices"]]
    else:
        try:
            names = [(None, i) for i in range(int(nvml.nvmlDeviceGetCount()))]
        except nvml.NVMLError as error:
            return [], f"NVML: {error}"
    found = []
    for name, which in names:
        if device is not None and name != device:
            continue
        gpu = open_nvml(which)
        if isinstance(gpu, Nvml):
            found.append(_gpu(name, gpu))
    return found, "NVML shows no GPU"


def _index(device: str) -> int | str:
    return visible_gpu(int(device.partition(":")[2]), os.environ)


def _gpu(device: str | None, gpu: Nvml) -> dict[str, Any]:
    facts = gpu.facts((*FIXED, *CHANGING))
    source = gpu.energy_source()
    energy = (
        {"available": False, "reason": source.reason}
        if isinstance(source, Unavailable)
        else {"available": True, "scope": source.scope, "reason": None}
    )
    return {"device": device, **facts, "energy": energy, "missing": dict(gpu.reasons)}


def _cpu_limits(load: dict[str, Any]) -> list[Limit]:
    limits = []
    rapl = open_rapl()
    if isinstance(rapl, Unavailable):
        limits.append(Limit(what="energy of the CPU", why=rapl.reason))
    if load["foreign_cores"] > 0.1:
        limits.append(
            Limit(
                what="steady times",
                why=f"other work uses {load['foreign_cores']:.2f} of {load['cores']} cores now",
                remedy="measure with --threads 1, or when the machine is idle",
            )
        )
    return limits


def _gpu_limits(gpu: dict[str, Any]) -> list[Limit]:
    name = gpu["device"] or gpu["name"] or "GPU"
    limits = [Limit(what=f"{name}: {k}", why=v) for k, v in gpu["missing"].items()]
    if gpu["mig"]:
        limits.append(
            Limit(
                what=f"{name}: energy per token",
                why="MIG is on: power and energy are those of the whole GPU",
            )
        )
    others = gpu["processes"] or []
    if others:
        limits.append(
            Limit(
                what=f"{name}: steady times and memory",
                why=f"{len(others)} processes use the GPU now",
                remedy="measure when it is idle; records count them",
            )
        )
    return limits


def _cuda_limits(cuda: dict[str, Any]) -> list[Limit]:
    if cuda["reason"] is None:
        return []
    return [Limit(what="anything on --device cuda:0", why=cuda["reason"])]

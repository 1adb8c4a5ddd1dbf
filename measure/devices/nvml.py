"""What the NVIDIA driver says about a GPU, read through NVML. Nothing is ever set.

Every fact is read on its own: where the driver, the permission or the GPU (MIG, old parts) does not
give it, the fact is None and ``reasons`` says why, once. Without a driver there is no
:class:`Nvml` but an :class:`~measure.devices.energy.Unavailable`, and measuring goes on.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from measure.devices.energy import CounterError, Unavailable

#: Bits of the clocks' event reasons (NVML: nvmlClocksEventReasons, once ThrottleReasons).
EVENT_REASONS: Mapping[int, str] = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
#: Of these, what slows a busy GPU below what it could do.
SLOWING = frozenset(EVENT_REASONS.values()) - {"gpu_idle", "applications_clocks_setting"}
_SM, _MEMORY, _GPU_TEMPERATURE = 1, 2, 0

Reader = Callable[[Any, Any], Any]


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _cuda_version(nvml: Any, _: Any) -> str:
    version = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
    return f"{version // 1000}.{version % 1000 // 10}"


def _event_reasons(nvml: Any, handle: Any) -> list[str]:
    read = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    read = read or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    mask = int(read(handle))
    return [name for bit, name in EVENT_REASONS.items() if mask & bit]


def _watts(nvml: Any, handle: Any) -> float:
    """Instant power; without that field the driver's figure (a 1 s mean since Ampere)."""
    field = getattr(nvml, "NVML_FI_DEV_POWER_INSTANT", None)
    if field is not None:
        try:
            value = nvml.nvmlDeviceGetFieldValues(handle, [field])[0]
            if value.nvmlReturn == 0:
                return float(value.value.uiVal / 1e3)
        except nvml.NVMLError:
            pass
    return float(nvml.nvmlDeviceGetPowerUsage(handle) / 1e3)


def _memory(nvml: Any, handle: Any) -> dict[str, int]:
    version = getattr(nvml, "nvmlMemory_v2", None)
    try:
        info = nvml.nvmlDeviceGetMemoryInfo(handle, version=version)
    except nvml.NVMLError:  # an old driver; its "used" includes what the driver keeps for itself
        info = nvml.nvmlDeviceGetMemoryInfo(handle)
    names = ("total", "reserved", "free", "used")
    return {n: int(getattr(info, n)) for n in names if getattr(info, n, None) is not None}


def _processes(nvml: Any, handle: Any) -> list[dict[str, int | None]]:
    """Memory by process. In containers NVML gives the host's ids, or none at all."""
    found = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return [
        {
            "pid": int(p.pid),
            "memory_bytes": None if p.usedGpuMemory is None else int(p.usedGpuMemory),
        }
        for p in found
    ]


_READERS: Mapping[str, Reader] = {
    "name": lambda n, h: _text(n.nvmlDeviceGetName(h)),
    "uuid": lambda n, h: _text(n.nvmlDeviceGetUUID(h)),
    "driver": lambda n, _: _text(n.nvmlSystemGetDriverVersion()),
    "cuda_driver": _cuda_version,
    "vbios": lambda n, h: _text(n.nvmlDeviceGetVbiosVersion(h)),
    "mig": lambda n, h: bool(n.nvmlDeviceGetMigMode(h)[0]),
    "ecc": lambda n, h: bool(n.nvmlDeviceGetEccMode(h)[0]),
    "persistence": lambda n, h: bool(n.nvmlDeviceGetPersistenceMode(h)),
    "power_limit_w": lambda n, h: n.nvmlDeviceGetEnforcedPowerLimit(h) / 1e3,
    "max_sm_clock_mhz": lambda n, h: int(n.nvmlDeviceGetMaxClockInfo(h, _SM)),
    "max_memory_clock_mhz": lambda n, h: int(n.nvmlDeviceGetMaxClockInfo(h, _MEMORY)),
    "sm_clock_mhz": lambda n, h: int(n.nvmlDeviceGetClockInfo(h, _SM)),
    "memory_clock_mhz": lambda n, h: int(n.nvmlDeviceGetClockInfo(h, _MEMORY)),
    "temperature_c": lambda n, h: int(n.nvmlDeviceGetTemperature(h, _GPU_TEMPERATURE)),
    "utilisation_percent": lambda n, h: int(n.nvmlDeviceGetUtilizationRates(h).gpu),
    "event_reasons": _event_reasons,
    "power_w": _watts,
    "energy_j": lambda n, h: n.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3,
    "memory": _memory,
    "processes": _processes,
}
#: What does not change while a point runs.
FIXED = (
    *("name", "uuid", "driver", "cuda_driver", "vbios", "mig", "ecc", "persistence"),
    *("power_limit_w", "max_sm_clock_mhz", "max_memory_clock_mhz"),
)
#: What does.
CHANGING = (
    *("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "utilisation_percent"),
    *("event_reasons", "power_w", "memory", "processes"),
)


class Nvml:
    """One GPU. ``reasons`` collects why a fact cannot be had."""

    def __init__(self, module: Any, handle: Any) -> None:
        self._nvml, self._handle = module, handle
        self.reasons: dict[str, str] = {}

    def read(self, name: str) -> Any:
        """Return one fact, or None."""
        try:
            return _READERS[name](self._nvml, self._handle)
        except self._nvml.NVMLError as error:
            self.reasons.setdefault(name, str(error))
        except AttributeError as error:  # a binding older than the function
            self.reasons.setdefault(name, f"this version of nvidia-ml-py: {error}")
        return None

    def facts(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return several."""
        return {name: self.read(name) for name in names}

    def energy_source(self) -> "NvmlEnergy | Unavailable":
        """Return the GPU's energy counter, if it has one."""
        if self.read("energy_j") is None:
            return Unavailable(f"NVML energy counter: {self.reasons['energy_j']}")
        return NvmlEnergy(self, "mig_parent" if self.read("mig") else "gpu")


class NvmlEnergy:
    """Total energy since the driver was loaded; under MIG that of the whole GPU."""

    method = "nvml_total_energy"

    def __init__(self, gpu: Nvml, scope: str) -> None:
        self._gpu, self.scope = gpu, scope

    def joules(self) -> float:
        """Joules since the driver was loaded."""
        value = self._gpu.read("energy_j")
        if value is None:
            raise CounterError(self._gpu.reasons["energy_j"])
        return float(value)

    def watts(self) -> float | None:
        """Power now."""
        value = self._gpu.read("power_w")
        return None if value is None else float(value)


def load_nvml(module: Any = None) -> Any:
    """Return the initialised binding, or :class:`Unavailable`. ``module`` stands in for it."""
    try:
        nvml = module or importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return Unavailable("nvidia-ml-py is not installed: pip install 'lccost[measure]'")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Unavailable(f"NVML: {error}")
    return nvml


def open_nvml(
    which: int | str, module: Any = None, bus_id: str | None = None
) -> Nvml | Unavailable:
    """Return the GPU of an NVML index or a UUID (with or without ``GPU-``), or say why not.

    ``bus_id`` (domain:bus:device.function) finds the GPU where the UUID does not, as under MIG.
    """
    nvml = load_nvml(module)
    if isinstance(nvml, Unavailable):
        return nvml
    ways: list[tuple[Callable[[Any], Any], int | str]] = []
    if isinstance(which, int):
        ways.append((nvml.nvmlDeviceGetHandleByIndex, which))
    else:
        prefixes = ("",) if which.startswith(("GPU-", "MIG-")) else ("GPU-", "MIG-")
        ways += [(nvml.nvmlDeviceGetHandleByUUID, prefix + which) for prefix in prefixes]
    if bus_id:
        ways.append((nvml.nvmlDeviceGetHandleByPciBusId, bus_id))
    reason = ""
    for find, name in ways:
        try:
            return Nvml(nvml, find(name))
        except nvml.NVMLError as error:
            reason = reason or str(error)
    return Unavailable(f"NVML does not find GPU {which}: {reason}")

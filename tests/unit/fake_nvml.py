"""A stand-in for pynvml: scripted facts, and functions that fail as the driver's do."""

from types import SimpleNamespace


class NVMLError(Exception):
    """Base of the binding's errors."""


class FakeNvml:
    """``facts`` by function name; ``broken`` maps a function to the driver's words."""

    NVMLError = NVMLError
    NVML_FI_DEV_POWER_INSTANT = 186
    nvmlMemory_v2 = 2  # noqa: N815

    def __init__(self, broken=None, missing=(), uuids=("GPU-aaaa-1",), init_error=None):
        self.broken, self.missing = dict(broken or {}), set(missing)
        self.uuids, self.init_error = uuids, init_error
        self.energy_mj = 1_000_000.0
        self.power_w = 300.0
        self.mig = 0
        self.processes = [SimpleNamespace(pid=1, usedGpuMemory=None)]
        self.events = 0x1
        self.calls = []

    def __getattr__(self, name):
        if not name.startswith("nvml") or name in self.__dict__.get("missing", ()):
            raise AttributeError(name)

        def call(*arguments, **options):
            self.calls.append(name)
            if name == "nvmlInit" and self.init_error:
                raise NVMLError(self.init_error)
            if name in self.broken:
                raise NVMLError(self.broken[name])
            return self.answer(name, arguments, options)

        return call

    def answer(self, name, arguments, options):
        by_uuid = {u: i for i, u in enumerate(self.uuids)}
        if name == "nvmlDeviceGetHandleByUUID":
            if arguments[0] not in by_uuid:
                raise NVMLError("Not Found")
            return f"handle{by_uuid[arguments[0]]}"
        memory = SimpleNamespace(total=80, reserved=1, free=50, used=29)
        power = SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=int(self.power_w * 1000)))
        return {
            "nvmlInit": None,
            "nvmlDeviceGetCount": len(self.uuids),
            "nvmlDeviceGetHandleByIndex": f"handle{arguments[0] if arguments else 0}",
            "nvmlDeviceGetHandleByPciBusId": "handle-by-bus",
            "nvmlDeviceGetName": b"NVIDIA H200",
            "nvmlDeviceGetUUID": self.uuids[0],
            "nvmlSystemGetDriverVersion": "580.1",
            "nvmlSystemGetCudaDriverVersion_v2": 13020,
            "nvmlDeviceGetVbiosVersion": "96.00",
            "nvmlDeviceGetMigMode": [self.mig, self.mig],
            "nvmlDeviceGetEccMode": [1, 1],
            "nvmlDeviceGetPersistenceMode": 1,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetMaxClockInfo": 1980,
            "nvmlDeviceGetClockInfo": 1755,
            "nvmlDeviceGetTemperature": 45,
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=99),
            "nvmlDeviceGetCurrentClocksEventReasons": self.events,
            "nvmlDeviceGetCurrentClocksThrottleReasons": self.events,
            "nvmlDeviceGetFieldValues": [power],
            "nvmlDeviceGetPowerUsage": 250_000,
            "nvmlDeviceGetTotalEnergyConsumption": self.energy_mj,
            "nvmlDeviceGetMemoryInfo": memory,
            "nvmlDeviceGetComputeRunningProcesses": self.processes,
        }[name]

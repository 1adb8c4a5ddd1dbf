"""Opens a device by name; imports torch."""

from costmodel.errors import ConfigError
from measure.devices.base import AbstractDevice
from measure.devices.cpu import CpuDevice
from measure.devices.cuda import CudaDevice
from measure.devices.names import cuda_index


def open_device(name: str, threads: int = 1, *, pinned: bool = True) -> AbstractDevice:
    """Return ``cpu`` (with so many threads, kept on as many processors) or ``cuda:N``.

    Raises ``MissingExtraError`` where there is no such GPU.
    """
    if name == "cpu":
        return CpuDevice(threads, pinned=pinned)
    if cuda_index(name) is None:
        raise ConfigError(f"device: expected cpu or cuda:N, got {name!r}")
    return CudaDevice(name)

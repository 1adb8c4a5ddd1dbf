"""GPUs of a table by their spelling in it, each resolved and loaded once."""

import contextlib
from collections.abc import Mapping, Sequence

from costmodel.errors import ConfigError, UnknownNameError
from costmodel.hardware import HardwareProfile, load_hardware, resolve_gpu
from costmodel.validation.names import gpu_assumed


class Devices:
    """Profiles of a table's GPUs; ``override`` replaces every one of them."""

    def __init__(self, override: HardwareProfile | None) -> None:
        self._override = override
        self._names: dict[tuple[str, ...], str] = {}
        self._profiles: dict[str, HardwareProfile] = {}

    def name(self, record: Mapping[str, str], columns: Sequence[str] = ("hw", "device")) -> str:
        """Bundled name of a row's GPU; ``ConfigError`` when no spelling is known."""
        if self._override is not None:
            return self._override.name
        spellings = tuple(record.get(c, "") for c in columns)
        if spellings not in self._names:
            self._names[spellings] = _resolved(columns, spellings)
        return self._names[spellings]

    def profile(self, name: str) -> HardwareProfile:
        """The profile of a name that :meth:`name` has returned."""
        if self._override is not None:
            return self._override
        if name not in self._profiles:
            self._profiles[name] = load_hardware(name)
        return self._profiles[name]


def _resolved(columns: Sequence[str], spellings: Sequence[str]) -> str:
    given = [s for s in spellings if s]
    for spelling in given:
        with contextlib.suppress(UnknownNameError):
            return resolve_gpu(spelling)
    for spelling in given:
        assumed = gpu_assumed(spelling)
        if assumed is not None:
            return assumed
    shown = ", ".join(f"{c}={s[:60]!r}" for c, s in zip(columns, spellings, strict=True) if s)
    raise ConfigError(f"no profile of the GPU {shown or 'of the row: it is not named'}")

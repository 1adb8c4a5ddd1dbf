"""How a prediction is made: the options of ``predict``, checked, and their defaults."""

from dataclasses import dataclass

from costmodel.architecture import Architecture
from costmodel.errors import ConfigError
from costmodel.hardware import HardwareProfile
from costmodel.kernels.families import own_engines
from costmodel.workload import Level


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a prediction is made; see ``lccost predict --help``."""

    dtype: str | None = None
    weight_dtype: str = "checkpoint"
    level: Level = "ideal"
    tp: int = 1
    engine: str | None = None
    memory_fraction: float = 0.9

    def __post_init__(self) -> None:
        if self.level not in ("ideal", "reference"):
            raise ConfigError(f"level: expected ideal or reference, got {self.level!r}")
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigError(f"memory fraction: expected (0, 1], got {self.memory_fraction}")
        if not isinstance(self.tp, int) or self.tp < 1:
            raise ConfigError(f"tp: expected a whole number of at least 1, got {self.tp!r}")


def default_dtype(architecture: Architecture) -> str:
    """The checkpoint's 16-bit type; checkpoints in fp32 are served in bf16."""
    return architecture.dtype if architecture.dtype in ("bf16", "fp16") else "bf16"


def default_engine(hardware: HardwareProfile, level: Level) -> str:
    """Who executes when nobody is named: the only engine a profile was calibrated with, if any."""
    if hardware.is_cpu:
        return "torch"
    own = own_engines(hardware)
    if len(own) == 1 and level == "ideal":
        return own[0]
    return "vllm" if level == "ideal" else "transformers"

"""What fitted kernel models have in common, and what a kernel's name says about its structure.

A :class:`KernelKind` ties together the parameters of one operation kind, the beliefs about them
before any row is read, the function that turns a shape into seconds, and the work the datasheet
roofline needs. Calibration, validation and prediction all go through it.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np

from costmodel.errors import ConfigError
from costmodel.hardware import HardwareProfile
from costmodel.kernels.physics import Prior, tensor_peak
from costmodel.operation import Array

Shape = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Work:
    """What the datasheet roofline of a shape needs: FLOPs, the peak they run at, bytes."""

    flops: Array
    peak_flops_per_s: float
    n_bytes: Array


@dataclass(frozen=True, slots=True)
class KernelKind:
    """One operation kind.

    parameters   its dataclass of fitted numbers
    shape        names of the shape columns ``time_s`` reads
    variants     families are fitted apart per variant (a data type, a phase); "" is the only one
    priors       (kernel name, variant) -> the parameters that are fitted, with their priors
    structure    (kernel name, variant) -> parameters that are set, not fitted
    time_s       (parameters, device, shape, variant, cold) -> seconds
    work         (device, shape, variant) -> the datasheet work
    """

    name: str
    parameters: type
    shape: tuple[str, ...]
    variants: tuple[str, ...]
    priors: Callable[[str, str], Mapping[str, Prior]]
    structure: Callable[[str, str], Mapping[str, float]]
    time_s: Callable[[Any, HardwareProfile, Shape, str, bool], Array]
    work: Callable[[HardwareProfile, Shape, str], Work]

    def build(self, values: Mapping[str, float]) -> Any:
        """Parameters from numbers by name; names that are not parameters are left out.

        Raises ``ConfigError`` where one without a default is missing.
        """
        known = {f.name for f in fields(self.parameters)}
        missing = [
            f.name for f in fields(self.parameters) if f.default is MISSING and f.name not in values
        ]
        if missing:
            raise ConfigError(f"families.{self.name}: expected also {', '.join(missing)}")
        return self.parameters(**{k: float(v) for k, v in values.items() if k in known})

    def check(self, values: Mapping[str, float], kernel: str, variant: str) -> None:
        """Refuse parameters that no kernel has: ten times outside what a fit may find, below 0, or
        0 where a size or a ratio is asked for. Raises ``ConfigError``.
        """
        priors = self.priors(kernel, variant)
        for f in fields(self.parameters):
            if f.name not in values or values[f.name] == f.default:
                continue
            may_be_0 = f.default in (MISSING, 0.0) or f.name in SWITCHES
            low, high = (0.0 if may_be_0 else 1e-3), 1e15
            if f.name in priors:
                low, high = priors[f.name].low / BEYOND, priors[f.name].high * BEYOND
            if not low <= values[f.name] <= high:
                raise ConfigError(
                    f"families.{self.name}: {f.name}: expected {low:g} to {high:g}, "
                    f"got {values[f.name]:g}"
                )

    def roofline_s(self, device: HardwareProfile, shape: Shape, variant: str) -> Array:
        """Seconds at datasheet rates: max(FLOPs / peak, bytes / bandwidth)."""
        work = self.work(device, shape, variant)
        seconds: Array = np.maximum(
            np.asarray(work.flops) / work.peak_flops_per_s,
            np.asarray(work.n_bytes) / device.hbm_bytes_per_s,
        )
        return seconds


#: Parameters of a profile's own families may lie this many times outside the limits of fits.
BEYOND = 10.0
#: Parameters of 1 that 0 turns off.
SWITCHES = frozenset({"packs_heads", "swaps_heads"})

#: Module and constant of each kind; imported when it is first used.
_MODULES = {
    "gemm": ("gemm", "KIND"),
    "decode_attention": ("decode_attention", "KIND"),
    "prefill_attention": ("prefill_attention", "KIND"),
    "mla_decode_attention": ("mla", "DECODE_KIND"),
    "mla_prefill_attention": ("mla", "PREFILL_KIND"),
    "scan": ("scan", "KIND"),
    "moe_gemm": ("moe", "KIND"),
    "collective": ("collective", "KIND"),
    "sparse_attention": ("sparse", "KIND"),
    "fused": ("fused", "KIND"),
}


def kind_names() -> list[str]:
    """Kinds that can be fitted."""
    return sorted(_MODULES)


@functools.cache
def kernel_kind(name: str) -> KernelKind:
    """Return the kind of that name; its module is imported on first use."""
    module, constant = _MODULES[name]
    kind: KernelKind = getattr(importlib.import_module(f"costmodel.kernels.{module}"), constant)
    return kind


#: Substrings of kernel names, first match wins, and the class of implementation they mean.
_CLASSES = (
    ("fa4", "fa4"),
    ("fa3", "fa3"),
    ("fa2", "fa2"),
    ("vllm_flash_attn", "fa2"),  # vLLM on GPUs before Hopper
    ("trtllm", "trtllm"),
    ("flashinfer", "flashinfer"),
    ("flash_attention", "fa3"),  # SGLang's name for its FlashAttention-3 backend
    ("flash_attn", "fa2"),
    ("triton", "triton"),
    ("deepgemm", "deepgemm"),
    ("cutlass", "cutlass"),
    ("fp8_scaled_mm", "cutlass"),
    ("_eager", "eager"),  # collectives that the host starts one by one, and those in a graph
    ("_graph", "graph"),
)


def kernel_class(kernel: str) -> str:
    """Class of implementation behind a kernel's name; "other" when the name says nothing."""
    text = kernel.lower()
    return next((name for part, name in _CLASSES if part in text), "other")


def peak_of(device: HardwareProfile, dtype: str) -> float:
    """Peak of the datasheet roofline for a data type in any spelling."""
    return tensor_peak(device, "fp8" if dtype.startswith("fp8") else dtype)

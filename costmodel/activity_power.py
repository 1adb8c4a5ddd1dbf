"""Power of a GPU from what it is busy with: idle, plus activity of compute and of memory.

    P = min(TDP, TDP (idle + a_c u_c^g_c + a_m u_m^g_m))

u_c is the attained share of the peak FLOP rate, u_m of the memory bandwidth; idle is what a GPU
draws with its clocks up and nothing to do but launch. Parameters are shares of the TDP, apart for
decode and prefill; they are fitted on attention kernels of one GPU and transfer by its TDP.

What is ignored: temperature, and clocks that fall at the limit. The published power of kernels
that take microseconds is an average over whatever ran in the counter's window, so single calls
scatter by a quarter around any such law; sums over a step scatter less.
"""

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np

from costmodel.hardware import HardwareProfile
from costmodel.operation import Array

Regime = Literal["decode", "prefill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerParameters:
    """Shares of the TDP, and the exponents of activity; low and high are factors on the power.

    idle_fraction      nothing but launches
    compute_fraction, compute_exponent   a_c, g_c
    memory_fraction, memory_exponent     a_m, g_m
    """

    idle_fraction: float
    compute_fraction: float
    compute_exponent: float
    memory_fraction: float
    memory_exponent: float
    low: float = 1.0
    high: float = 1.0

    def share_of_tdp(self, compute_share: Array, memory_share: Array) -> Array:
        """P / TDP at attained shares of the peaks. Shape: that of the arguments broadcast."""
        compute = np.clip(compute_share, 0.0, 1.0) ** self.compute_exponent
        memory = np.clip(memory_share, 0.0, 1.0) ** self.memory_exponent
        total = self.idle_fraction + self.compute_fraction * compute + self.memory_fraction * memory
        share: Array = np.minimum(total, 1.0)
        return share


@functools.cache
def load_power(regime: Regime) -> PowerParameters:
    """The fitted parameters of a regime."""
    text = resources.files("costmodel").joinpath("data/power.toml").read_text("utf-8")
    row = tomllib.loads(text)[regime]
    return PowerParameters(**row["parameters"], low=row["low"], high=row["high"])


def active_power_w(
    hardware: HardwareProfile, regime: Regime, compute_share: Array, memory_share: Array
) -> Array | None:
    """Watts of one GPU at attained shares of its peaks; None where it states no TDP."""
    if hardware.tdp_w is None:
        return None
    return hardware.tdp_w * load_power(regime).share_of_tdp(compute_share, memory_share)

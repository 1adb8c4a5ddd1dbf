"""Power of a GPU from what it is busy with, and energy.

    P = TDP min(1, f (idle + a_t u_t^g_t + a_w u_w + a_kv u_kv))

u_t is the attained share of the peak FLOP rate, u_w of the memory bandwidth by weights and
activations, u_kv by cached keys and values, which pass through softmax on their way; idle is what a
GPU draws with its clocks up and nothing to do but launch; f is a factor of an implementation, 1 but
for some kernels. All are shares of the TDP (``costmodel/data/power.toml``), so the law carries over
to another GPU by its TDP.

Two laws for single attention kernels (``decode``, ``prefill``) are fitted on measured power of
one GPU; the law of whole decode steps (``step``) is anchored on published runs of another.
``SERVING``: decode under continuous batching by how full the KV pool is, for where nothing else
is known of the steps.

What is ignored: temperature, clocks that fall at the limit, the host. The published power of
kernels that take microseconds is an average over whatever ran in the counter's window, so single
calls scatter by a fifth around any such law; sums over a step scatter less.
"""

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from costmodel.files import DATA
from costmodel.hardware import HardwareProfile
from costmodel.operation import Array

Regime = Literal["decode", "prefill", "step"]
#: Of decode under load, fitted by others on H100: TDP x (0.43 + 0.43 x share of the KV pool in
#: use).
SERVING = (0.43, 0.43)
#: A GPU that prefills (H100 and H200 hosts, B200 attention kernels) and one with nothing to do
#: (80 W of 700 W), as shares of the TDP.
PREFILL_FRACTION = 0.90
IDLE_FRACTION = 0.11


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLaw:
    """Shares of the TDP at full activity; low and high are factors on the power.

    idle_fraction     clocks up, nothing but launches
    tensor_fraction, tensor_exponent   a_t at the peak FLOP rate, g_t
    weight_fraction   a_w, memory streaming at full bandwidth
    kv_fraction       a_kv, the same when it is cached keys and values
    factors           f of implementations, by name; they multiply
    gpu               the GPU it was fitted or anchored on
    """

    idle_fraction: float
    tensor_fraction: float
    tensor_exponent: float
    weight_fraction: float
    kv_fraction: float
    factors: Mapping[str, float] = field(default_factory=dict)
    low: float = 1.0
    high: float = 1.0
    gpu: str = ""

    def share_of_tdp(
        self,
        tensor_share: Array,
        weight_share: Array,
        kv_share: Array,
        factor: Array = 1.0,
    ) -> Array:
        """P / TDP at attained shares of the peaks. Shape: that of the arguments broadcast."""
        tensor = np.clip(tensor_share, 0.0, 1.0) ** self.tensor_exponent
        streamed = self.weight_fraction * np.clip(weight_share, 0.0, 1.0)
        streamed = streamed + self.kv_fraction * np.clip(kv_share, 0.0, 1.0)
        share: Array = np.minimum(
            factor * (self.idle_fraction + self.tensor_fraction * tensor + streamed), 1.0
        )
        return share


@functools.cache
def load_power(regime: Regime) -> PowerLaw:
    """The law of a regime that ships."""
    text = (DATA / "power.toml").read_text("utf-8")
    row = tomllib.loads(text)[regime]
    return PowerLaw(
        **row["parameters"],
        factors=row.get("factors", {}),
        low=row["low"],
        high=row["high"],
        gpu=row["gpu"],
    )


def step_power_w(
    hardware: HardwareProfile,
    tensor_share: Array,
    weight_share: Array,
    kv_share: Array,
    pool_share: Array,
) -> Array | None:
    """Mean watts of one GPU in decode steps that attain these shares of its peaks.

    The mean of two independent estimates: activity, and ``SERVING`` at ``pool_share`` of the KV
    pool in use. Activity alone is a fifth low for published sparse models under load, the law of
    the pool knows nothing of the batch. None where the device states no TDP.
    """
    by_pool = serving_power_w(hardware, pool_share)
    if hardware.tdp_w is None or by_pool is None:
        return None
    share = load_power("step").share_of_tdp(tensor_share, weight_share, kv_share)
    return 0.5 * (hardware.tdp_w * share + by_pool)


def power_basis(hardware: HardwareProfile) -> str | None:
    """Where the power of a step on a device comes from; None where it has no TDP."""
    if hardware.tdp_w is None:
        return None
    return "anchored" if hardware.name == load_power("step").gpu else "transferred"


def serving_power_w(hardware: HardwareProfile, kv_fraction: Array) -> Array | None:
    """Mean watts of one GPU that decodes under load, by the share of its KV pool in use.

    None where the device states no TDP.
    """
    if hardware.tdp_w is None:
        return None
    empty, full = SERVING
    return hardware.tdp_w * (empty + full * np.clip(kv_fraction, 0.0, 1.0))

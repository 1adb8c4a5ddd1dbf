"""Power and energy: a law for decode, prior until a device is measured.

P = TDP * (0.43 + 0.43 * share of the KV pool in use), fitted by others on H100 decode; mean
power over TDP is about 0.78 for dense models under load. Energy as TDP x time is some 40 % too
high.
"""

import numpy as np

from costmodel.hardware import HardwareProfile
from costmodel.operation import Array

IDLE_FRACTION = 0.43
ACTIVITY_FRACTION = 0.43


def decode_power_w(hardware: HardwareProfile, kv_fraction: Array) -> Array | None:
    """Mean watts of one GPU in decode; None where the device states no TDP."""
    if hardware.tdp_w is None:
        return None
    used = np.clip(kv_fraction, 0.0, 1.0)
    return hardware.tdp_w * (IDLE_FRACTION + ACTIVITY_FRACTION * used)

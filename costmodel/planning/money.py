"""Watts and dollars of a fleet.

Power follows ``costmodel.power``: decode under load by how full the KV pool is, prefill and
idleness as shares of the TDP. Rent usually includes power: a power price adds to it only where the
user names one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from costmodel.hardware import HardwareProfile
from costmodel.planning.fleet import Outcome
from costmodel.planning.spec import Money
from costmodel.power import IDLE_FRACTION, PREFILL_FRACTION, serving_power_w


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """US dollars per hour (low, mid, high), None without a price.

    watts         mean draw of all GPUs, idle ones too; None without a TDP
    decode_watts  the part of it that they draw while they decode
    """

    usd_per_hour: tuple[float, float, float] | None
    watts: float | None
    decode_watts: float | None


def summed(costs: Sequence[Cost]) -> Cost:
    """Of several pools; None where one of them is unknown."""
    usd = [c.usd_per_hour for c in costs if c.usd_per_hour is not None]
    watts = [c.watts for c in costs if c.watts is not None]
    decode = [c.decode_watts for c in costs if c.decode_watts is not None]
    low, mid, high = (sum(x[i] for x in usd) for i in range(3))
    return Cost(
        usd_per_hour=(low, mid, high) if len(usd) == len(costs) else None,
        watts=sum(watts) if len(watts) == len(costs) else None,
        decode_watts=sum(decode) if len(decode) == len(costs) else None,
    )


def rent_usd_per_hour(hardware: HardwareProfile, gpus: int) -> tuple[float, float, float] | None:
    """Rent of so many GPUs."""
    price = hardware.price_usd_per_hour
    return None if price is None else (price[0] * gpus, price[1] * gpus, price[2] * gpus)


def fleet_watts(
    hardware: HardwareProfile, outcome: Outcome, per_engine: int
) -> tuple[float, float] | None:
    """Mean draw of the whole fleet over the run, and the part of it that is decode."""
    if hardware.tdp_w is None or outcome.span_s <= 0:
        return None
    total = outcome.span_s * outcome.replicas
    idle = max(0.0, total - outcome.prefill_s - outcome.decode_s)
    decode_w = serving_power_w(hardware, outcome.kv_occupancy)
    assert decode_w is not None
    decode = outcome.decode_s * float(decode_w)
    prefill = outcome.prefill_s * PREFILL_FRACTION * hardware.tdp_w
    joules = prefill + decode + idle * IDLE_FRACTION * hardware.tdp_w
    gpus_per_s = per_engine / outcome.span_s
    return joules * gpus_per_s, decode * gpus_per_s


def fleet_cost(hardware: HardwareProfile, outcome: Outcome, per_engine: int, money: Money) -> Cost:
    """Rent of ``per_engine`` GPUs for each simulated engine, and power where it is paid apart."""
    drawn = fleet_watts(hardware, outcome, per_engine)
    watts, decode_watts = (None, None) if drawn is None else drawn
    usd = rent_usd_per_hour(hardware, outcome.replicas * per_engine)
    if usd is not None and money.power_usd_per_kwh is not None and watts is not None:
        power = watts / 1000.0 * money.pue * money.power_usd_per_kwh
        usd = (usd[0] + power, usd[1] + power, usd[2] + power)
    return Cost(usd_per_hour=usd, watts=watts, decode_watts=decode_watts)

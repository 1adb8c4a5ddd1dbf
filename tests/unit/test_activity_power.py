"""Power from activity: by hand, and within what a GPU can draw."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel import load_hardware
from costmodel.activity_power import PowerParameters, active_power_w, load_power

H100 = load_hardware("h100-sxm")


def test_the_law_by_hand() -> None:
    law = PowerParameters(
        idle_fraction=0.3,
        compute_fraction=0.4,
        compute_exponent=0.5,
        memory_fraction=0.2,
        memory_exponent=1.0,
    )
    # 0.3 + 0.4 * sqrt(0.25) + 0.2 * 0.5
    assert law.share_of_tdp(0.25, 0.5) == pytest.approx(0.6)
    assert law.share_of_tdp(1.0, 1.0) == pytest.approx(0.9)


@given(compute=st.floats(0, 2), memory=st.floats(0, 2), prefill=st.booleans())
def test_power_is_between_idle_and_the_limit(compute: float, memory: float, prefill: bool) -> None:
    regime = "prefill" if prefill else "decode"
    watts = active_power_w(H100, regime, compute, memory)  # type: ignore[arg-type]
    assert watts is not None
    assert load_power(regime).idle_fraction * 700.0 <= watts <= 700.0  # type: ignore[arg-type]


def test_more_activity_never_draws_less() -> None:
    shares = np.linspace(0, 1, 50)
    for regime in ("decode", "prefill"):
        for a, b in ((shares, 0.2), (0.2, shares)):
            watts = np.asarray(active_power_w(H100, regime, a, b))  # type: ignore[arg-type]
            assert np.all(np.diff(watts) >= 0)


def test_a_device_without_a_limit_has_no_power() -> None:
    nameless = replace(H100, tdp_w=None)
    assert active_power_w(nameless, "decode", 0.1, 0.1) is None

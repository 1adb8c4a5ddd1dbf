"""Power from activity: by hand, within what a GPU can draw, and what others published."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel import Workload, load_architecture, load_hardware, predict
from costmodel.power import PowerLaw, load_power, power_basis, serving_power_w, step_power_w

H100 = load_hardware("h100-sxm")
SHARE = st.floats(0, 2)


def test_the_law_by_hand() -> None:
    law = PowerLaw(
        idle_fraction=0.2,
        tensor_fraction=0.4,
        tensor_exponent=0.5,
        weight_fraction=0.1,
        kv_fraction=0.2,
    )
    # 0.2 + 0.4 * sqrt(0.25) + 0.1 * 0.5 + 0.2 * 0.25
    assert law.share_of_tdp(0.25, 0.5, 0.25) == pytest.approx(0.5)
    assert law.share_of_tdp(0.25, 0.5, 0.25, 0.8) == pytest.approx(0.4)
    assert law.share_of_tdp(1.0, 1.0, 1.0, 3.0) == 1.0  # never above the limit


@given(tensor=SHARE, weight=SHARE, kv=SHARE, pool=SHARE)
def test_power_is_between_idle_and_the_limit(
    tensor: float, weight: float, kv: float, pool: float
) -> None:
    watts = step_power_w(H100, tensor, weight, kv, pool)
    assert watts is not None
    assert load_power("step").idle_fraction * 700.0 <= watts <= 700.0


@pytest.mark.parametrize("regime", ["decode", "prefill", "step"])
def test_more_activity_never_draws_less(regime: str) -> None:
    law = load_power(regime)  # type: ignore[arg-type]
    shares = np.linspace(0, 1, 50)
    for arguments in ((shares, 0.2, 0.2), (0.2, shares, 0.2), (0.2, 0.2, shares)):
        assert np.all(np.diff(law.share_of_tdp(*arguments)) >= 0)
    assert law.low < 1.0 < law.high


def test_a_device_without_a_limit_has_no_power() -> None:
    nameless = replace(H100, tdp_w=None)
    assert step_power_w(nameless, 0.1, 0.1, 0.1, 0.1) is None
    assert serving_power_w(nameless, 0.5) is None
    assert power_basis(nameless) is None
    assert power_basis(H100) == "anchored"
    assert power_basis(load_hardware("b200-sxm")) == "transferred"


def power_share(model: str, batch: int, tp: int) -> float:
    """P / TDP of one GPU, from the joules of a token."""
    p = predict(
        load_architecture(model), "full", Workload.of(batch, 1024, 256), H100, engine="vllm", tp=tp
    )
    return float(p["energy_j_per_token"] * batch / p["tpot_s"] / tp / 700.0)


@pytest.mark.parametrize(
    ("model", "batch", "tp", "published"),
    [
        # Mean power of published runs under load, over the TDP: dense 0.78, MoE 0.70 to 0.73.
        ("llama-3.1-8b", 330, 1, 0.78),
        ("llama-3.1-70b", 330, 4, 0.78),
        ("mixtral-8x7b", 300, 2, 0.715),
        # The fitted law of decode with an almost empty pool.
        ("llama-3.1-8b", 1, 1, 0.43),
        ("llama-3.1-70b", 1, 4, 0.43),
    ],
)
def test_published_mean_power_within_a_fifth(
    model: str, batch: int, tp: int, published: float
) -> None:
    assert power_share(model, batch, tp) == pytest.approx(published, rel=0.2)

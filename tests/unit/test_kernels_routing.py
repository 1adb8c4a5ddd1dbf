"""Tokens per expert, against the published tables' own way of dealing, done draw by draw."""

import numpy as np
import pytest

from costmodel.kernels.routing import N_DRAWS, loads


def classes(*sizes: float, **how: float) -> tuple[float, float]:
    """(experts hit, assignments) of this GPU."""
    found = loads(*sizes, **how)  # type: ignore[arg-type]
    return float(sum(n for n, _ in found)), float(sum(n * load for n, load in found))


def test_dealt_experts_are_all_alike_and_none_idles() -> None:
    assert classes(16.0, 8.0, 128.0, 128.0, dealt=1.0) == (128.0, 128.0)
    assert classes(4.0, 8.0, 128.0, 128.0, dealt=1.0) == (32.0, 32.0)
    assert classes(4096.0, 8.0, 128.0, 16.0, dealt=1.0) == (16.0, 4096.0)
    assert classes(1.0, 1.0, 128.0, 4.0, dealt=1.0) == (1.0, 1.0)  # the first GPU has the first


@pytest.mark.parametrize("leftovers_first", [False, True])
@pytest.mark.parametrize("tokens", [1.0, 7.0, 64.0, 5000.0])
def test_a_power_law_deals_every_assignment(tokens: float, leftovers_first: bool) -> None:
    hit, dealt = classes(tokens, 8.0, 256.0, 256.0, 1.2, leftovers_first=leftovers_first)
    assert dealt == pytest.approx(tokens * 8.0)
    assert hit <= 256.0
    found = loads(tokens, 8.0, 256.0, 256.0, 1.2, leftovers_first=leftovers_first)
    most = max(float(load) for n, load in found if n > 0)
    assert leftovers_first or most <= tokens


def test_few_tokens_go_to_one_gpu_by_the_older_rule_and_to_all_in_turn_by_the_newer() -> None:
    # One token, 8 of 256 experts on 32 GPUs of 8: every draw rounds to none, all 8 are left over.
    assert classes(1.0, 8.0, 256.0, 8.0, 1.2, leftovers_first=True) == (8.0, 8.0)
    assert classes(1.0, 8.0, 256.0, 8.0, 1.2) == (1.0, 1.0)


def test_shares_follow_the_power_law() -> None:
    """Between 1 and 0.8 T with exponent 1.2, drawn apart: the largest tenth has this share."""
    generator = np.random.default_rng(5)
    low, high, a = 1.0, 0.8 * 20000, 1.2
    u = generator.random((400, 128))
    x = (low ** (1 - a) + u * (high ** (1 - a) - low ** (1 - a))) ** (1 / (1 - a))
    x = np.sort(x / x.sum(axis=1, keepdims=True), axis=1)
    expected = x[:, -13:].sum(axis=1).mean()
    found = loads(20000.0, 8.0, 128.0, 128.0, 1.2)
    flat = np.sort(np.concatenate([np.full(round(float(n * N_DRAWS)), float(m)) for n, m in found]))
    assert flat[-13 * N_DRAWS :].sum() / flat.sum() == pytest.approx(expected, rel=0.15)

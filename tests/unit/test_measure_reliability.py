"""Which records are called noisy or invalid, and of what."""

import pytest
import torch

from measure.reliability import judged
from measure.statistics import summarise
from measure.timing import Timing

STEADY, WILD = (1.0,) * 9, (1.0, 2.0) * 5


def verdict(logit=0.0, canary=1.0, forced=0, **samples):
    timings = {
        name: Timing(
            samples=taken, statistics=summarise(taken), timer="t", first_call_s=1.0, warmups=2,
            forced=forced,
        )
        for name, taken in {"ttft_s": STEADY, "tpot_s": STEADY, **samples}.items()
    }  # fmt: skip
    found = judged(
        timings, torch.tensor([logit]), canary=(1.0, canary), watched={}, warnings=["given"]
    )
    assert "given" in found["quality"]["warnings"]
    assert set(found["samples"]) == set(timings)
    return found["status"], found["is_valid"], "; ".join(found["quality"]["warnings"])


@pytest.mark.parametrize(
    ("case", "status", "is_valid", "words"),
    [
        ({}, "ok", True, "given"),
        ({"tpot_s": WILD}, "noisy", False, "tpot_s: spread"),
        ({"ttft_s": WILD}, "noisy", False, "ttft_s: spread"),
        # eager steps beside a captured one: the host's jitter is not in the metric
        ({"tpot_eager_s": WILD}, "ok", True, "tpot_eager_s: spread"),
        ({"logit": float("nan")}, "ok", False, "not finite"),
        ({"canary": 1.2}, "noisy", True, "changed speed"),
        ({"forced": 1}, "noisy", True, "blocks of samples were kept"),
    ],
)
def test_what_is_believed(case, status, is_valid, words):
    found = verdict(**case)
    assert found[:2] == (status, is_valid)
    assert words in found[2]

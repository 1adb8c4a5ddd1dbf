"""Every bundled model with every method: a prediction, or a reason."""

import math

import numpy as np
import pytest

from costmodel.errors import NotApplicableError
from costmodel.hardware import gpu_names, load_hardware
from costmodel.methods import method_class, method_names
from costmodel.predict import predict
from costmodel.registry import load_architecture, model_names
from costmodel.results import KEYS
from costmodel.workload import Workload

WORKLOAD = Workload.of(np.array([1, 16]), np.array([8192, 131072]))


@pytest.mark.parametrize("model", model_names())
def test_every_method_answers_or_says_why(model: str) -> None:
    architecture, hardware = load_architecture(model), load_hardware("b200-sxm")
    answered = 0
    reasons: dict[str, str] = {}
    for method in method_names():
        for level in ("ideal", "reference"):
            try:
                p = predict(
                    architecture,
                    method,
                    WORKLOAD,
                    hardware,
                    level=level,
                    dtype="bf16",
                    solve=False,
                )
            except NotApplicableError as error:
                reasons[method] = str(error)
                continue
            answered += 1
            for row in p.rows():
                assert list(row) == list(KEYS)
                for key, value in row.items():
                    if isinstance(value, float):
                        assert math.isfinite(value), key
                assert row["ttft_s"] >= row["roofline_ttft_s"]
                assert row["tpot_s"] >= row["roofline_tpot_s"]
                assert row["method_parameters"] is not None
    assert answered >= 2
    assert "full" not in reasons
    assert all(len(reason) > 20 for reason in reasons.values())


@pytest.mark.parametrize("gpu", gpu_names())
def test_every_gpu_answers(gpu: str) -> None:
    hardware = load_hardware(gpu)
    dtype = "bf16" if "bf16" in hardware.peak_flops_per_s else "fp16"
    p = predict(load_architecture("llama-3.2-1b"), "full", WORKLOAD, hardware, dtype=dtype)
    assert np.all(p["ttft_s"] > 0)
    assert np.all(p["max_batch"] >= 0)


@pytest.mark.parametrize("method", method_names())
def test_methods_describe_themselves(method: str) -> None:
    cls = method_class(method)
    assert method == cls.NAME
    assert cls.TITLE
    assert cls.REFERENCE
    assert cls.DOES_NOT_SAVE
    assert cls.STATE_FORMULA
    assert cls.REALISED_BY
    assert (cls.__doc__ or "").strip()
    missing = [k for k in cls().parameters if k not in cls.PARAMETERS]
    assert not missing, f"{method}: no meaning for {missing}"

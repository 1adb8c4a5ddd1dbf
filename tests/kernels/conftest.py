"""Where the kernels run: in the interpreter on the CPU, or on the CUDA device."""

import pytest
import torch

from measure.kernels import interpreted


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if interpreted() else "cuda")

"""Caches and shapes of the tests of H2O's and TOVA's steps."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from costmodel.mixers import Attention

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = dict(
    # sequences, KV heads, query heads of each
    heads=st.sampled_from([(1, 1, 8), (1, 2, 1), (2, 1, 3), (1, 1, 4)]),
    size=st.sampled_from([64, 128, 256]),
    # a tile has 64 tokens (32 for heads of 256): one less, one, one more, several
    held=st.sampled_from([1, 2, 31, 33, 63, 64, 65, 130]),
    splits=st.integers(1, 3),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**31),
)
FEW = settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def random(device, generator, dtype, *shape):
    return torch.randn(*shape, generator=generator).to(device, dtype)


def integer(device, value):
    return torch.tensor([value], dtype=torch.int64, device=device)


def twin(cls, method, device, dtype, heads, size):
    batch, n_kv, group = heads
    mixer = Attention(n_heads=n_kv * group, n_kv_heads=n_kv, head_dim=size, v_head_dim=size)
    return cls(method, mixer, batch=batch, dtype=dtype, device=device)

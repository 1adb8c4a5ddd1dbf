"""Bytes of the decode kernels: their docstrings' formulas, the twins' storages, the cost model."""

import numpy as np
import pytest
import torch

from costmodel.architecture import MixerGroup
from costmodel.engines import load_engine
from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from costmodel.workload import Point
from measure.methods import build_layer_cache

B, N, K, H, R = 2, 4, 2, 64, 128


def kivi(bits: int, t: int) -> float:
    """``measure/kernels/kivi_decode.py``: B K H [ Nk e + (T - Nk) b + Nv e + (T - Nv) b ]."""
    e = bits / 8 + 2 * 2 / 32
    nk, nv = t - t % R, max(0, t - R)
    return B * K * H * (nk * e + (t - nk) * 2 + nv * e + (t - nv) * 2)


def tokens(e: float, t: int) -> float:
    """``measure/kernels/token_decode.py``: 2 B K T H e."""
    return 2 * B * K * t * H * e


#: ``measure/kernels/quantise_append.py``: KIVI's value that leaves the residual, b read and e
#: written, and every R steps a block of R keys likewise, as a mean step pays them.
KIVI_2, KIVI_4 = 2.0 + (2.0 + 0.375), 2.0 + (2.0 + 0.625)

#: spec -> (bytes read of a cache of T tokens, bytes per element that appending the new token
#: moves, bytes that are not per token)
FORMS = {
    "kivi:bits=2": (lambda t: kivi(2, t), KIVI_2, 0),
    "kivi:bits=4": (lambda t: kivi(4, t), KIVI_4, 0),
    "full": (lambda t: tokens(2.0, t), 2.0, 0),
    "fp8_kv": (lambda t: tokens(1.0, t), 1.0, 8),
    "flexgen": (lambda t: tokens(0.5 + 2 * 2 / 64, t), 0.5 + 2 * 2 / 64, 0),
}


@pytest.mark.parametrize("spec", FORMS)
@pytest.mark.parametrize("t", [1, 127, 128, 129, 300])
def test_paper_twin_and_cost_model_agree(spec: str, t: int) -> None:
    read, appended_bytes, fixed = FORMS[spec]
    mixer = Attention(n_heads=N, n_kv_heads=K, head_dim=H, v_head_dim=H)
    twin = build_layer_cache(
        parse_method(spec), mixer, batch=B, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    twin.fill(t)
    assert twin.held_bytes == read(t) + fixed
    at = Point(
        batch=float(B),
        prompt_tokens=float(t),
        cached_tokens=float(t),
        reserved_tokens=float(t),
        dtype="bf16",
        kv_dtype="bf16",
        level="ideal",
        engine=load_engine("lccost"),
    )
    operations = parse_method(spec).decode(MixerGroup(mixer, 1, (0,), 1), at)
    attention = next(x for x in operations if x.kind == "decode_attention")
    # The cache once, what appending moves, nothing through memory in between.
    assert float(np.asarray(attention.workspace_bytes)) == 0
    expected = read(t) + 2 * B * K * H * appended_bytes
    assert float(np.asarray(attention.hbm_bytes)) == pytest.approx(expected, rel=1e-12)

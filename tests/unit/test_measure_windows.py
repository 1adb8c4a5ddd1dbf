"""Methods in a layer with a sliding window: what leaves it is neither held nor attended."""

import pytest
import torch
from twin_cases import BATCH, HEADS, KV_HEADS, SIZE, cache, part, probabilities, tokens

from costmodel.mixers import Attention
from measure.numerics import Rope
from measure.parts import rope_table, rotate

WINDOW = 20
LAYER = Attention(
    n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=SIZE, v_head_dim=SIZE, window_tokens=WINDOW
)
#: Methods whose packing loses nothing here, and those that keep every token anyway.
EXACT = ["kvquant:outlier_fraction=1", "kv_offload", "kv_offload:resident_layers=8", "h2o"]


@pytest.mark.parametrize("spec", EXACT)
@pytest.mark.parametrize("n", [5, 19, 20, 21, 33, 50])
@pytest.mark.parametrize("reserve", [0, 70])
def test_what_loses_nothing_is_windowed_attention(spec, n, reserve):
    q, k, v = tokens(n + 25)
    plain, twin = cache("full", mixer=LAYER), cache(spec, mixer=LAYER, reserve=reserve)
    rope = Rope() if twin.ROTATES else None
    twin.place(3, 8, rope)
    turned = q, k, v
    if rope is not None:
        table = rope_table(n + 25, SIZE, rope, torch.float32, torch.device("cpu"))
        turned = rotate(q, table), rotate(k, table), v
    torch.testing.assert_close(
        twin.prefill(*part((q, k, v), 0, n)), plain.prefill(*part(turned, 0, n))
    )
    for t in range(n, n + 25):
        mark = twin.snapshot()
        twin.decode(*part((q, k, v), t - 1, t))  # a wrong token, undone
        twin.restore(mark)
        found = twin.decode(*part((q, k, v), t, t + 1))
        torch.testing.assert_close(found, plain.decode(*part(turned, t, t + 1)))


PACKED = [
    "fp8_kv",
    "flexgen:bits=4,group=8",
    "kvquant:bits=3",
    "kivi:bits=4,group=8,residual_tokens=8",
    "kivi:bits=2,group=16,residual_tokens=32",
]


@pytest.mark.parametrize("spec", PACKED)
@pytest.mark.parametrize("n", [5, 20, 21, 40, 47])
@pytest.mark.parametrize("reserve", [0, 80])
def test_a_packed_window_is_attended_as_the_same_tokens_without_one(spec, n, reserve):
    """The slow form packs everything, then attends what is left of the window."""
    q, k, v = tokens(n + 30)
    twin = cache(spec, mixer=LAYER, reserve=reserve)
    twin.prefill(*part((q, k, v), 0, n))
    whole = cache(spec)
    whole.store(k[:, :, :n], v[:, :, :n])
    for t in range(n, n + 30):
        keys, values = history(whole, t)
        mark = twin.snapshot()
        twin.decode(*part((q, k, v), t - 1, t))  # a wrong token, undone
        twin.restore(mark)
        found = twin.decode(*part((q, k, v), t, t + 1))
        seen = slice(max(0, t - WINDOW + 1), t)
        for b in range(BATCH):
            for h in range(HEADS):
                one = h // (HEADS // KV_HEADS)
                p = probabilities(q[b, h, t], torch.cat((keys[b, one, seen], k[b, one, t : t + 1])))
                expected = p @ torch.cat((values[b, one, seen], v[b, one, t : t + 1]))
                torch.testing.assert_close(found[b, h, 0], expected, atol=1e-5, rtol=1e-4)
        whole.decode(*part((q, k, v), t, t + 1))


def history(whole, n):
    """What a cache without a window holds, unpacked, oldest first."""
    if whole.NAME != "kivi":
        return whole.unpacked(whole.keys, 0, n), whole.unpacked(whole.values, 0, n)
    blocks = whole.dequantised_keys(0, whole.keys.length).transpose(-1, -2).flatten(2, 3)
    ring = whole.recent_values.entries().roll(-whole._oldest, dims=2)
    packed = whole.dequantised_values(0, whole.values.length)
    return (
        torch.cat((blocks, whole.recent_keys.entries()), dim=2),
        torch.cat((packed, ring), dim=2),
    )

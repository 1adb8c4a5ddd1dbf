"""KVQuant's packing, tables, outliers and rotation, against slow and obvious code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twin_cases import BATCH, HEADS, KV_HEADS, SIZE, cache, part, probabilities, tokens

from measure.methods.kvquant import kmeans
from measure.methods.packing import pack_words, unpack_words
from measure.numerics import Rope
from measure.parts import rope_table, rotate


def test_three_bit_words_by_hand():
    # 0..7 at 3 bits from the lowest: 0o76543210 = 0xFAC688, then 0..2 in the next byte and a bit.
    words = pack_words(torch.arange(11, dtype=torch.uint8) % 8, 3)
    assert [x & 0xFFFFFFFF for x in words.tolist()] == [0x88FAC688, 0]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 3, 4]), st.integers(1, 70), st.integers(0, 2**31))
def test_words_are_as_few_as_the_bits_need_and_give_the_codes_back(bits, n, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (2, 3, n), generator=generator, dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.shape[-1] == -(-n * bits // 32)
    assert torch.equal(unpack_words(words, bits, n), codes)


def test_kmeans_finds_the_clusters_of_every_channel():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-3.0, 0.0, 1.0, 9.0], [10.0, 20.0, 30.0, 40.0]])
    which = torch.arange(200) % 4
    sample = centres[:, which].T + 0.01 * torch.randn(200, 2, generator=generator)
    assert torch.allclose(kmeans(sample, 4), centres, atol=0.01)


@pytest.mark.parametrize(("bits", "fraction"), [(2, 0.0), (3, 0.01), (4, 0.1), (3, 1.0)])
def test_every_element_is_exact_or_the_nearest_of_its_table(bits, fraction):
    q, k, v = tokens(30)
    twin = cache(f"kvquant:bits={bits},outlier_fraction={fraction}")
    twin.calibrate(k.transpose(1, 2).flatten(0, 1).flatten(1))
    twin.prefill(q, k, v)
    n = KV_HEADS * SIZE
    n_out = 0 if fraction == 0 else min(2 * (int(fraction / 2 * n) + 1), n)
    tables = twin.codebook.entries()[0].reshape(n, -1)
    for side, x in ((twin.keys, k), (twin.values, v)):
        found = twin.unpacked(side, 0, 30)
        for b in range(BATCH):
            for t in range(30):
                row, got = x[b, :, t].flatten(), found[b, :, t].flatten()
                if side is twin.keys:
                    span = tables[:, -1] - tables[:, 0]
                    order = ((row - (tables[:, 0] + tables[:, -1]) / 2) / span).argsort()
                else:
                    order = row.argsort()
                ends = (
                    [*order[: n_out // 2].tolist(), *order[n - n_out // 2 :].tolist()]
                    if n_out < n
                    else list(range(n))
                )
                assert torch.equal(got[ends], row[ends])
                rest = [i for i in range(n) if i not in ends]
                if not rest:
                    continue
                if side is twin.keys:
                    error = (row[:, None] - tables).abs().amin(1)
                    assert torch.allclose((got - row).abs()[rest], error[rest], atol=1e-6)
                else:
                    span = row[rest].max() - row[rest].min()
                    # quantiles at (j + 1/2) / 2^bits: the widest gap is the outermost
                    at = (torch.arange(2.0**bits) + 0.5) / 2**bits
                    levels = torch.erfinv(2 * at - 1)
                    widest = (levels[1:] - levels[:-1]).max() / (levels[-1] - levels[0])
                    assert (got - row).abs()[rest].max() <= span * widest / 2 + 1e-5


@pytest.mark.parametrize("n", [1, 20])
def test_keys_are_kept_before_rotation_and_turned_when_read(n):
    """With every element an outlier nothing is lost, so a step is full attention."""
    rope, total = Rope(), n + 8
    q, k, v = tokens(total)
    twin = cache("kvquant:outlier_fraction=1")
    twin.place(0, 1, rope)
    table = rope_table(total, SIZE, rope, torch.float32, torch.device("cpu"))
    turned_q, turned_k = rotate(q, table), rotate(k, table)
    twin.prefill(*part((q, k, v), 0, n))
    assert torch.equal(twin.unpacked(twin.keys, 0, n), k[:, :, :n])
    for t in range(n, total):
        found = twin.decode(*part((q, k, v), t, t + 1))
        for h in range(HEADS):
            one = h // (HEADS // KV_HEADS)
            expected = probabilities(turned_q[1, h, t], turned_k[1, one, : t + 1])
            torch.testing.assert_close(found[1, h, 0], expected @ v[1, one, : t + 1])

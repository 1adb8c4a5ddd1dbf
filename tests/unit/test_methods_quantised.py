"""Quantised caches against literal packing: what a simulation's tensors hold, at every step."""

from typing import Any

import numpy as np
import pytest
from method_points import attention, group, model, named, point, state_bytes, total

from costmodel.methods.parse import parse_method
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.mla import MLA, SparseIndex

GIB = 2**30
_MLA = MLA(
    n_heads=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    index=SparseIndex(n_heads=64, head_dim=128, top_k=2048),
)


def nbytes(arrays: list[Any]) -> int:
    return sum(a.nbytes for a in arrays if a is not None)


class PackedKivi:
    """Keys in blocks of R tokens per channel, values one by one; codes packed into 32-bit words."""

    def __init__(self, bits: int, group_size: int, residual: int, heads: int, dim: int, b: Any):
        self.bits, self.g, self.r, self.shape, self.b = bits, group_size, residual, (heads, dim), b
        self.keys = np.zeros((heads, 0, dim), b)
        self.values = np.zeros((heads, 0, dim), b)
        self.packed: list[np.ndarray[Any, Any]] = []

    def pack(self, elements: int) -> None:
        self.packed.append(np.zeros(elements * self.bits // 32, np.int32))
        self.packed.append(np.zeros(elements // self.g, self.b))  # scales
        self.packed.append(np.zeros(elements // self.g, self.b))  # zero points

    def prefill(self, n: int) -> None:
        heads, dim = self.shape
        quantised = n - n % self.r
        if quantised:
            self.pack(heads * dim * quantised)
        self.keys = np.zeros((heads, n - quantised, dim), self.b)
        old_values = max(0, n - self.r)
        if old_values:
            self.pack(heads * dim * old_values)
        self.values = np.zeros((heads, n - old_values, dim), self.b)

    def append(self) -> None:
        heads, dim = self.shape
        self.keys = np.concatenate([self.keys, np.zeros((heads, 1, dim), self.b)], axis=1)
        self.values = np.concatenate([self.values, np.zeros((heads, 1, dim), self.b)], axis=1)
        if self.keys.shape[1] == self.r:
            self.pack(heads * dim * self.r)
            self.keys = self.keys[:, :0].copy()
        if self.values.shape[1] > self.r:
            self.pack(heads * dim)
            self.values = self.values[:, 1:].copy()

    @property
    def nbytes(self) -> int:
        return nbytes([self.keys, self.values, *self.packed])


@pytest.mark.parametrize(
    ("bits", "group_size", "residual", "dtype"),
    [(2, 32, 128, "bf16"), (4, 32, 32, "bf16"), (2, 16, 64, "fp32"), (4, 64, 64, "fp32")],
)
@pytest.mark.parametrize("prompt", [1, 63, 64, 128, 129, 500])
def test_kivi_step_by_step(
    bits: int, group_size: int, residual: int, dtype: str, prompt: int
) -> None:
    b = np.float16 if dtype == "bf16" else np.float32
    cache = PackedKivi(bits, group_size, residual, heads=2, dim=64, b=b)
    cache.prefill(prompt)
    layers = group(attention(4, 2, 64), 1)
    spec = f"kivi:bits={bits},group={group_size},residual_tokens={residual}"
    for t in range(prompt, prompt + 140):
        assert state_bytes(spec, point(prompt, t, dtype=dtype), layers) == cache.nbytes, t
        cache.append()


def test_kivi_keeps_whole_key_blocks_behind_a_window() -> None:
    layers = group(attention(4, 2, 64, window_tokens=300), 1)
    per_element = 2 / 8 + 4 / 32
    # 1000 tokens: 104 keys in 16 bits, so 196 more are needed: two blocks of 128 keys
    expected = 2 * 64 * ((256 + 172) * per_element + (104 + 128) * 2)
    assert state_bytes("kivi", point(1000), layers) == expected


def test_kivi_prefill_holds_one_full_layer_and_decode_does_not() -> None:
    stack, layers = parse_method("kivi"), group()
    layer_bytes = 10_000 * 8 * 256 * 2
    prefill = stack.prefill(layers, point(10_000))
    assert max(float(op.transient_bytes) for op in prefill) >= layer_bytes
    assert max(float(op.transient_bytes) for op in stack.decode(layers, point(10_000))) == 0


def test_kivi_reference_bytes_with_and_without_gqa() -> None:
    # Packed state is read once, repeated (written G times), copied (read and written G times) and
    # read G times by the kernel: 1 + 4 G. Without GQA: read, written, read again.
    for mixer, factor in ((attention(32, 8), 17), (attention(8, 8), 3)):
        layers = group(mixer, 1)
        operations = parse_method("kivi").decode(layers, point(10_112, level="reference"))
        packed = (10_112 + 9_984) * 8 * 128 * 0.375
        residual = 128 * 8 * 128 * 2
        named_ops = [
            op
            for op in operations
            if op.name in ("repeat_packed", "make_packed_contiguous", "attention")
        ]
        new_token = 8 * 256 * 2
        assert total(named_ops, "hbm_bytes") == pytest.approx(
            factor * packed + residual + new_token
        )


class PackedGroups:
    """FlexGen: groups along the padded head of every token, two codes to a byte."""

    def __init__(self, heads: int, dim: int, group_size: int, b: Any) -> None:
        self.heads, self.b, self.g = heads, b, group_size
        self.padded = -(-dim // group_size) * group_size
        self.parts: list[np.ndarray[Any, Any]] = []

    def append(self) -> None:
        for _ in range(2):
            self.parts.append(np.zeros((self.heads, self.padded // 2), np.uint8))
            self.parts.append(np.zeros((self.heads, self.padded // self.g, 2), self.b))


@pytest.mark.parametrize(("dim", "group_size"), [(128, 64), (128, 32), (80, 64), (96, 64)])
def test_flexgen_step_by_step(dim: int, group_size: int) -> None:
    cache = PackedGroups(2, dim, group_size, np.float16)
    layers = group(attention(4, 2, dim), 1)
    for t in range(1, 70):
        cache.append()
        where = point(1, t)
        assert state_bytes(f"flexgen:group={group_size}", where, layers) == nbytes(cache.parts)


def test_flexgen_published_ratios() -> None:
    full = state_bytes("full", point())
    assert full / state_bytes("flexgen", point()) == pytest.approx(3.556, abs=5e-4)
    assert full / state_bytes("flexgen:group=32", point()) == 3.2


def test_flexgen_reference_moves_about_17_bytes_per_element() -> None:
    # op by op: unpack 0.5625 + 2, divide 4, add 4, permute 4, product 2 bytes per element of an MHA
    layers = group(attention(8, 8), 1)
    operations = parse_method("flexgen").decode(layers, point(level="reference"))
    chain = [op for op in operations if op.name in ("unpack", "dequantise", "permute_copy")]
    elements = 10_000 * 8 * 256
    product = named(operations, "attention").workspace_bytes
    assert (total(chain, "hbm_bytes") + product) / elements == 16.5625


def test_flexgen_makes_room_for_the_output() -> None:
    state = parse_method("flexgen").state(group(), point(1000, level="reference"))
    assert float(state.allocated) / float(state.device) == (1000 + 256 - 1) / 1000


def test_fp8_is_half_and_two_scales_a_layer() -> None:
    assert state_bytes("fp8_kv", point(batch=3)) == 3 * 10_000 * 8 * 256 * 32 + 32 * 8
    window = group(attention(window_tokens=100), 1)
    assert state_bytes("fp8_kv", point(), window) == 100 * 8 * 256 + 8


def test_fp8_latent_layout() -> None:
    # FlashMLA: 512 fp8 + 4 fp32 scales + 64 bf16 rope = 656 bytes; index key 128 + 4 = 132
    assert state_bytes("fp8_kv", point(1), group(_MLA, 1)) == 656 + 132
    operations = parse_method("fp8_kv").decode(group(_MLA, 1), point(5000))
    assert float(named(operations, "mla_attention").shape["kv_bytes"]) == 2048 * 656


def test_fp8_transformers_dequantises_everything() -> None:
    operations = parse_method("fp8_kv").decode(group(), point(level="reference"))
    elements = 10_000 * 8 * 256
    # float() 1 + 4, times scale 4 + 4, to bf16 4 + 2
    assert named(operations, "dequantise").workspace_bytes == 19 * elements


def test_kvquant_published_layout() -> None:
    # Llama-7B, 3 bits: 3072 code bytes, 42 outliers of 8 bytes for each of K and V, a table of 32
    layers = group(attention(32, 32), 1)
    one, two = (state_bytes("kvquant", point(t, level="reference"), layers) for t in (1000, 1001))
    assert two - one == 3776
    assert one - 1000 * 3776 == 4096 * (8 + 3) * 4  # tables and thresholds of the keys, once
    four = [
        state_bytes("kvquant:bits=4", point(t, level="reference"), layers) for t in (1000, 1001)
    ]
    assert four[1] - four[0] == 4096 + 672 + 64


def test_kvquant_ideal_layout() -> None:
    layers = group(attention(32, 32), 1)
    one, two = (state_bytes("kvquant", point(t), layers) for t in (1000, 1001))
    assert two - one == 3072 + 84 * 4 + 4  # 16-bit value and index; scale and offset of the values
    plain = [state_bytes("kvquant:outlier_fraction=0", point(t), layers) for t in (1000, 1001)]
    assert plain[1] - plain[0] == 3072 + 4


class TransformersQuantized:
    """QuantizedLayer: prompt packed; a residual of decoded tokens; all packed again at the R-th."""

    def __init__(self, prompt: int, residual: int, element: float, width: int) -> None:
        self.packed, self.rest, self.r = prompt, 0, residual
        self.element, self.width = element, width

    def append(self) -> None:
        if self.rest + 1 >= self.r:
            self.packed, self.rest = self.packed + self.rest + 1, 0
        else:
            self.rest += 1

    @property
    def nbytes(self) -> float:
        return self.width * (self.packed * self.element + self.rest * 2)


@pytest.mark.parametrize(
    ("spec", "element"),
    [
        ("hf_quanto", 0.5 + 4 / 64),
        ("hf_quanto:bits=2", 0.25 + 4 / 64),
        ("hf_hqq:bits=8", 1 + 4 / 64),
        ("hf_hqq:bits=3", 28 / 64 + 4 / 64),  # 64 codes take 7 words of ten
    ],
)
def test_transformers_quantized_cache_step_by_step(spec: str, element: float) -> None:
    cache = TransformersQuantized(100, 128, element, width=2 * 2 * 64)
    layers = group(attention(4, 2, 64), 1)
    for t in range(100, 400):
        assert state_bytes(spec, point(100, t), layers) == cache.nbytes, t
        cache.append()


def test_transformers_quantized_cache_against_published_size() -> None:
    # kvpress notebook: quanto int4 cache of Llama-3.1-8B at 128,000 tokens, 4.4 GiB of 15.6
    assert state_bytes("hf_quanto", point(128_000)) / GIB == pytest.approx(4.4, rel=0.01)
    assert state_bytes("full", point(128_000)) / GIB == pytest.approx(15.63, abs=0.01)


def test_transformers_quantized_cache_needs_full_attention() -> None:
    windowed = model(attention(), attention(window_tokens=128), name="gemma-like")
    reason = parse_method("hf_quanto").refusal(windowed)
    assert reason is not None
    assert "gemma-like also has windows or chunks" in reason
    assert parse_method("hf_quanto").refusal(model(attention())) is None


def test_gear_segments() -> None:
    layers = group(attention(4, 2, 64), 1)

    def segment(n: int, rank: int) -> int:
        codes = n * 128 // 2
        scales = 2 * 2 * 64 + 2 * 2 * n
        factors = rank * 2 * (2 * n + 128)
        outliers = 2 * (2 * int(0.02 * n * 128 / 2)) * (2 + 4)
        return 2 * (codes + scales + factors) + outliers

    for t in (500, 519, 520, 545):
        segments, buffered = divmod(t - 500, 20)
        expected = segment(500, 4) + segments * segment(20, 2) + buffered * 2 * 128 * 2
        assert state_bytes("gear", point(500, t), layers) == expected, t


def test_engines_without_fused_kernels_write_a_copy() -> None:
    for spec in ("kivi", "flexgen", "kvquant", "gear", "hf_quanto", "fp8_kv"):
        stack, layers = parse_method(spec), group()
        fused = stack.decode(layers, point())
        unpacked = stack.decode(layers, point(engine="torch"))
        (copy,) = (
            op for op in unpacked if op.name.startswith("dequantise_") or op.name == "dequantise"
        )
        assert float(copy.workspace_bytes) == 2 * 2 * float(copy.shape["elements"])
        assert float(copy.shape["elements"]) > 9_000 * 8 * 256
        assert total(unpacked, "state_bytes") == pytest.approx(total(fused, "state_bytes"))
        assert total(unpacked, "flops") == total(fused, "flops")


def test_head_sizes_that_do_not_pack_are_refused() -> None:
    reason = parse_method("kivi").refusal(model(attention(8, 8, 80), name="phi-like"))
    assert reason is not None
    assert "groups of 32" in reason
    assert "heads of 80" in reason


def test_recurrent_models_are_refused() -> None:
    mamba = Mamba2(n_heads=80, head_dim=64, d_state=128, n_groups=1, conv_kernel=4)
    for spec in ("kivi", "fp8_kv", "kv_offload", "h2o"):
        reason = parse_method(spec).refusal(model(mamba, name="mamba2"))
        assert reason is not None
        assert "mamba2 has none" in reason


@pytest.mark.parametrize(
    ("spec", "head", "expected"),
    [
        # 2 heads: 200 padded elements of half a byte and 2 groups of 4 bytes, for K and V of 1 head
        ("flexgen:group=100", 128, 12_345 * 2 * (200 / 2 + 2 * 4)),
        # groups of 96: 12,288 keys and 12,249 values of 96 elements packed, 57 and 96 left
        (
            "kivi:group=96,residual_tokens=96",
            96,
            (12_288 + 12_249) * (96 / 4 + 4) + (57 + 96) * 96 * 2,
        ),
    ],
)
def test_groups_that_are_no_power_of_two(spec: str, head: int, expected: float) -> None:
    layers = group(attention(4, 1, head), 1)
    assert state_bytes(spec, point(12_345), layers) == expected

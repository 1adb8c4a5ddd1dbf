"""Times from measured curves: every figure worked by hand."""

import numpy as np
import pytest

from costmodel.hardware import Curve, HardwareProfile, load_hardware
from costmodel.kernels import time_operation
from costmodel.kernels.curve_sizes import tiled_causal_pairs
from costmodel.kernels.curves import NOISE_FRACTION, curve_name, curve_time_s
from costmodel.model import Model
from costmodel.operation import Operation
from costmodel.options import Options
from costmodel.registry import load_architecture


def profile(**curves: Curve) -> HardwareProfile:
    return HardwareProfile(
        name="c",
        title="c",
        vendor="",
        generation="cpu",
        n_units=1,
        peak_flops_per_s={"bf16": 1e12, "fp32": 1e11},
        hbm_bytes_per_s=1e10,
        memory_bytes=1e10,
        memory_marketing_bytes=1e10,
        l2_bytes=None,
        tdp_w=None,
        link_bytes_per_s=None,
        host_link_bytes_per_s=None,
        is_cpu=True,
        curves={k.replace("__", "/"): v for k, v in curves.items()},
    )


def gemm(m, n=100.0, k=10.0, **changes) -> Operation:
    return Operation(
        name="qkv_proj", kind="gemm", flops=2.0 * m * n * k, weight_bytes=n * k * 2.0,
        shape={"m": m, "n": n, "k": k}, **changes,
    )  # fmt: skip


def test_names_sort_their_parameters():
    assert curve_name("gemm", "bf16", n=1536, k=2048.0) == "gemm/bf16/k=2048/n=1536"
    assert curve_name("dispatch") == "dispatch"


def test_time_per_flop_is_interpolated_in_logarithms():
    hw = profile(**{"gemm/bf16/k=10/n=100": Curve(x=(1.0, 100.0), y=(1e-9, 1e-11), spread=0.2)})
    # Half way between 1 and 100 in logarithms is 10, and between 1e-9 and 1e-11 it is 1e-10.
    found = curve_time_s(gemm(10.0), hw)
    assert found.seconds == pytest.approx(2 * 10 * 100 * 10 * 1e-10)
    assert found.spread == pytest.approx(0.2)
    assert float(found.extrapolated) == 0


def test_outside_the_grid_the_end_holds_and_is_marked():
    hw = profile(**{"gemm/bf16/k=10/n=100": Curve(x=(1.0, 100.0), y=(1e-9, 1e-11))})
    found = curve_time_s(gemm(np.array([1.0, 1000.0])), hw)
    assert found.seconds == pytest.approx([2e3 * 1e-9, 2e6 * 1e-11])
    assert found.extrapolated.tolist() == [0, 1]


def test_variants_are_weighted_by_distance_in_octaves():
    flat = {"x": (1.0, 10.0)}
    hw = profile(
        **{
            "gemm/bf16/k=10/n=50": Curve(y=(1e-9, 1e-9), **flat),
            "gemm/bf16/k=10/n=400": Curve(y=(1e-10, 1e-10), **flat),
        }
    )
    # n = 100 is one octave from 50 and two from 400: weights 1 and 1/16, 10^-(9 * 16 + 10)/17.
    found = curve_time_s(gemm(1.0), hw)
    assert found.seconds == pytest.approx(2000 * 10 ** -(154 / 17), rel=1e-4)
    assert float(found.extrapolated) == 0
    assert float(curve_time_s(gemm(1.0, n=5.0), hw).extrapolated) == 1  # over three octaves away


def test_another_dtype_has_no_curve():
    hw = profile(**{"gemm/bf16/k=10/n=100": Curve(x=(1.0,), y=(1e-9,))})
    assert curve_time_s(gemm(1.0, dtype="fp32"), hw) is None
    assert time_operation(gemm(1.0, dtype="fp32"), hw).basis == "prior"


def test_tiles_of_512_keys():
    # 1100 queries: 512 rows see 512 keys, 512 see 1024, the last 76 see all 1100.
    assert tiled_causal_pairs(1100.0) == 512 * 512 + 512 * 1024 + 76 * 1100
    # Fewer than a block see everything; whole blocks have no rest.
    assert tiled_causal_pairs(np.array([100.0, 1024.0])).tolist() == [1e4, 512 * 512 + 512 * 1024]


def test_prefill_attention_pays_for_whole_tiles():
    hw = profile(**{"prefill_attention/bf16/head_dim=4": Curve(x=(100.0,), y=(1e-9,))})
    pairs = 100 * 101 / 2
    op = Operation(
        name="attention", kind="prefill_attention", flops=pairs * 16.0,
        shape={"q_len": 100.0, "head_dim": 4.0},
    )  # fmt: skip
    assert curve_time_s(op, hw).seconds == pytest.approx(100 * 100 * 16 * 1e-9)


def test_an_operations_own_name_goes_before_its_kind():
    shape = {
        "batch": 2.0, "kv_len": 10.0, "n_heads": 4.0, "n_kv_heads": 2.0, "head_dim": 8.0,
        "v_head_dim": 8.0, "kv_bytes": 640.0,
    }  # fmt: skip
    hw = profile(
        **{
            "decode_attention/bf16/group=2/head_dim=8": Curve(x=(640.0,), y=(1e-9,)),
            "dequantised_attention/bf16/group=2/head_dim=8": Curve(x=(640.0,), y=(3e-9,)),
        }
    )
    plain = Operation(name="attention", kind="decode_attention", shape=shape)
    assert curve_time_s(plain, hw).seconds == pytest.approx(640 * 1e-9)  # per byte
    copied = Operation(name="dequantised_attention", kind="decode_attention", shape=shape)
    assert curve_time_s(copied, hw).seconds == pytest.approx(2 * 10 * 2 * 16 * 3e-9)  # per element


def test_elementwise_without_a_curve_streams_and_is_dispatched():
    hw = profile(stream=Curve(x=(1e3, 1e6), y=(1e-9, 1e-9)), dispatch=Curve(x=(1.0,), y=(2e-6,)))
    op = Operation(name="gather", kind="elementwise", workspace_bytes=5e3, launches=3)
    assert curve_time_s(op, hw).seconds == pytest.approx(5e3 * 1e-9 + 3 * 2e-6)
    scores = {"rows": 2.0, "length": 100.0, "k": 3.0}
    other = Operation(name="topk", kind="select", workspace_bytes=5e3, shape=scores)
    assert curve_time_s(other, hw) is None


def test_quantised_operations_count_elements_of_their_bits():
    hw = profile(
        **{
            "dequantise/bf16/bits=2": Curve(x=(1e3,), y=(1e-9,)),
            "dequantise/bf16/bits=4": Curve(x=(1e3,), y=(2e-9,)),
        }
    )
    op = Operation(
        name="dequantise", kind="elementwise", workspace_bytes=9e9,
        shape={"elements": np.array([0.0, 1e3]), "bits": 4.0},
    )  # fmt: skip
    found = curve_time_s(op, hw)
    assert found.seconds == pytest.approx([0.0, 1e3 * 2e-9], rel=1e-4)
    assert found.extrapolated.tolist() == [0, 0]  # no work extrapolates nothing


def test_the_interval_is_never_narrower_than_the_noise():
    hw = profile(**{"gemm/bf16/k=10/n=100": Curve(x=(1.0,), y=(1e-9,), spread=0.01)})
    found = time_operation(gemm(1.0), hw)
    assert found.basis == "calibrated"
    assert found.high_s / found.mid_s == pytest.approx(1 + NOISE_FRACTION)
    assert found.mid_s / found.low_s == pytest.approx(1 + NOISE_FRACTION)
    # 2,000 FLOPs at 1e12/s against 2,000 bytes at 1e10/s: memory binds and takes the whole time.
    assert found.memory_s == pytest.approx(found.mid_s)
    assert found.compute_s == pytest.approx(found.mid_s / 100)


def test_small_operations_of_a_layer_count_activations_by_its_blocks():
    curves = {
        "norm_rope_activation__bf16__blocks=1": Curve(x=(1e3,), y=(1e-8,), spread=0.1),
        "norm_rope_activation__bf16__blocks=2": Curve(x=(1e3,), y=(4e-8,), spread=0.1),
    }
    layer = Operation(
        name="norm_rope_activation", kind="elementwise", activation_bytes=1e3, weight_bytes=1e9,
        shape={"blocks": 2**0.5},
    )  # fmt: skip
    found = curve_time_s(layer, profile(**curves))
    assert float(found.seconds) == pytest.approx(2e-5)  # half an octave from both: their mean


def test_small_operations_with_a_gelu_have_curves_of_their_own_or_those_of_others():
    curves = {"norm_rope_activation__bf16__blocks=2": Curve(x=(1e3,), y=(1e-8,), spread=0.1)}
    own = {"norm_rope_activation_gelu__bf16__blocks=2": Curve(x=(1e3,), y=(3e-8,), spread=0.1)}

    def seconds(gelu: float, **measured: Curve) -> float:
        layer = Operation(
            name="norm_rope_activation", kind="elementwise", activation_bytes=1e3,
            shape={"blocks": 2.0, "gelu": gelu},
        )  # fmt: skip
        return float(curve_time_s(layer, profile(**measured)).seconds)

    assert seconds(1.0, **curves, **own) == pytest.approx(3e-5)
    assert seconds(0.0, **curves, **own) == pytest.approx(1e-5)
    assert seconds(1.0, **curves) == pytest.approx(1e-5)  # a profile made before there were any


@pytest.mark.parametrize(
    ("name", "gelu"), [("gemma-2-2b", True), ("recurrentgemma-2b", True), ("llama-3.2-1b", False)]
)
def test_models_say_which_activation_they_have(name, gelu):
    model = Model.of(load_architecture(name), "full", load_hardware("h100-sxm"), Options())
    assert model.run.has_gelu is gelu

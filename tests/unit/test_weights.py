"""Weight bytes: formats by hand, whole checkpoints against published sizes, names of modules."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Mapping
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.architecture import Architecture
from costmodel.errors import ConfigError, UnknownNameError
from costmodel.hardware import load_hardware
from costmodel.hf_config import frozen
from costmodel.mixers.base import Linear
from costmodel.registry import architecture_from_config, load_architecture, model_names
from costmodel.weights import WEIGHT_DTYPES, compute_dtype, linear_bytes, weights_bytes

SQUARE = Linear(name="o_proj", n_in=4096, n_out=4096, role="attention")
UP = Linear(name="gate_up_proj", n_in=4096, n_out=22016, role="mlp")
EXPERTS = Linear(name="experts_down", n_in=2880, n_out=2880, role="expert", copies=32)


def quantised(config: Mapping[str, object], model: str = "llama-2-7b") -> Architecture:
    """A bundled architecture with this ``quantization_config``."""
    pairs = frozen(config)
    assert isinstance(pairs, tuple)
    return dataclasses.replace(load_architecture(model), quantization=pairs)


# ---- formats, by hand ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bf16", 2 * 4096 * 4096),
        ("fp16", 2 * 4096 * 4096),
        ("fp8", 4096 * 4096 + 4),  # one fp32 scale
        ("int8", 4096 * 4096 + 4 * 4096),  # an fp32 scale per output row
        ("int4", 4096 * 4096 // 2 + 4096 * 32 * 2 + 4096 * 32 // 2),  # fp16 scale, 4-bit zero
        ("mxfp4", 4096 * 4096 // 2 + 4096 * 4096 // 32),  # 4.25 bits
        ("nvfp4", 4096 * 4096 // 2 + 4096 * 4096 // 16 + 4),  # 4.5 bits and one fp32
    ],
)
def test_explicit_dtype_by_hand(dtype: str, expected: int) -> None:
    assert linear_bytes(SQUARE, dtype, load_architecture("llama-2-7b")) == expected


def test_groups_that_do_not_fill_up_still_have_a_scale() -> None:
    # 2880 columns are 22.5 groups of 128: 23 scales per row
    odd = Linear(name="down_proj", n_in=2880, n_out=10, role="mlp")
    expected = 2880 * 10 / 2 + 10 * 23 * 2.5
    assert linear_bytes(odd, "int4", load_architecture("llama-2-7b")) == expected


def test_fp8_blocks_round_up_on_both_sides() -> None:
    # kv_a_proj of DeepSeek-V3: 576 rows are 4.5 blocks of 128, 7168 columns are 56
    linear = Linear(name="kv_a_proj", n_in=7168, n_out=576, role="attention")
    architecture = load_architecture("deepseek-v3")
    assert linear_bytes(linear, "checkpoint", architecture) == 576 * 7168 + 4 * 5 * 56


def test_copies_and_bias() -> None:
    linear = dataclasses.replace(EXPERTS, bias=32 * 2880)
    got = linear_bytes(linear, "mxfp4", load_architecture("gpt-oss-20b"))
    assert got == 32 * (2880 * 2880 / 2 + 2880 * 90) + 2 * 32 * 2880


def test_fused_matrices_have_the_scales_of_their_parts() -> None:
    # gate and up are two tensors in a checkpoint: two per-tensor scales
    assert linear_bytes(UP, "fp8", load_architecture("llama-2-7b")) == 4096 * 22016 + 2 * 4


@pytest.mark.parametrize("dtype", [d for d in WEIGHT_DTYPES if d != "checkpoint"])
def test_what_is_not_quantisable_stays_16_bit(dtype: str) -> None:
    router = Linear(name="router", n_in=64, n_out=8, role="router", quantisable=False)
    assert linear_bytes(router, dtype, load_architecture("mixtral-8x7b")) == 2 * 64 * 8


# ---- whole models against published sizes ---------------------------------------------------


@pytest.mark.parametrize(
    ("model", "published", "places"),
    [
        # openai/gpt-oss-20b, model.safetensors.index.json: metadata.total_size
        ("gpt-oss-20b", 13_761_264_768, 0),
        # openai/gpt-oss-120b: the bytes of its tensors
        ("gpt-oss-120b", 65_248_815_744, 0),
        # moonshotai/Kimi-K2.5: 594 GB in the repository; int4 experts in groups of 32
        ("kimi-k2.5", 594e9, 1e9),
        # openlm-research and Meta publish 13.48 GB for 7B in 16 bit (6,738,415,616 parameters)
        ("llama-2-7b", 2 * 6_738_415_616, 0),
    ],
)
def test_checkpoint_against_published_size(model: str, published: float, places: float) -> None:
    assert abs(weights_bytes(load_architecture(model), "checkpoint") - published) <= places


def test_deepseek_v3_against_its_files() -> None:
    """The files of deepseek-ai/DeepSeek-V3 hold 688,586,727,753 bytes, headers and MTP included.

    The model without MTP is priced; the MTP layer is added by hand from the report's shapes
    (arXiv 2412.19437, section 4.2): what remains must be the safetensors headers.
    """
    d = 7168

    def fp8(rows: int, columns: int) -> int:
        return rows * columns + 4 * math.ceil(rows / 128) * math.ceil(columns / 128)

    attention = fp8(1536, d) + fp8(128 * 192, 1536) + fp8(576, d) + fp8(128 * 256, 512)
    attention += fp8(d, 128 * 128) + 2 * (1536 + 512 + 2 * d)
    experts = 257 * (2 * fp8(2048, d) + fp8(d, 2048))
    router = 2 * 256 * d + 4 * 256
    around = 2 * (2 * d * d + 3 * d) + 2 * 2 * 129280 * d  # eh_proj, norms, embedding, head
    corrections = 4 * 256 * 58  # fp32, one per router: left out by design
    total = weights_bytes(load_architecture("deepseek-v3"), "checkpoint")
    total += attention + experts + router + around + corrections
    headers = 688_586_727_753 - total
    assert 0 < headers < 13e6
    # 91,991 tensors of roughly 130 bytes of JSON each
    assert headers / 91_991 == pytest.approx(130, rel=0.15)


def test_deepseek_v4_flash_against_vllm_log() -> None:
    # vllm-project/vllm issue 40802: "Checkpoint size: 148.66 GiB", with one MTP layer whose 256
    # experts of 3 x 4096 x 2048 take 4.25 bits; its attention and norms are under 0.2 %.
    mtp = 256 * 3 * 4096 * 2048 * 4.25 / 8
    total = weights_bytes(load_architecture("deepseek-v4-flash"), "checkpoint") + mtp
    assert total == pytest.approx(148.66 * 2**30, rel=0.005)


def test_awq_and_gptq_of_a_7b() -> None:
    # TheBloke's AWQ repositories of Llama-2-7B models publish 3.89 GB
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert weights_bytes(quantised(awq), "checkpoint", "fp16") == 3_889_307_648
    assert weights_bytes(quantised(awq), "checkpoint", "fp16") == weights_bytes(
        load_architecture("llama-2-7b"), "int4", "fp16"
    )
    # GPTQ keeps an int32 group index per input column besides: 32 x (6 x 4096 + 11008) of them
    columns = 32 * (6 * 4096 + 11008)
    assert weights_bytes(quantised(gptq), "checkpoint", "fp16") == 3_889_307_648 + 4 * columns


def test_unquantised_checkpoint_is_loaded_in_the_run_dtype() -> None:
    mamba = load_architecture("mamba-2.8b")  # float32 on disk
    assert weights_bytes(mamba, "checkpoint", "bf16") == 2 * mamba.n_parameters
    assert weights_bytes(mamba, "checkpoint", "fp32") == 4 * mamba.n_parameters


@pytest.mark.parametrize("model", model_names())
def test_16_bits_are_two_bytes_per_parameter(model: str) -> None:
    # Parameter counts are checked elsewhere; embeddings, tied heads and shared blocks agree.
    architecture = load_architecture(model)
    assert weights_bytes(architecture, "bf16") == 2 * architecture.n_parameters


@pytest.mark.parametrize("model", model_names())
def test_formats_are_ordered(model: str) -> None:
    architecture = load_architecture(model)
    sizes = [weights_bytes(architecture, d) for d in ("mxfp4", "nvfp4", "fp8", "int8", "bf16")]
    assert sizes == sorted(sizes)
    assert 0 < weights_bytes(architecture, "checkpoint") <= sizes[-1]


def test_explicit_dtype_replaces_the_checkpoint_formats() -> None:
    architecture = load_architecture("gpt-oss-20b")
    assert weights_bytes(architecture, "bf16") == 2 * architecture.n_parameters


def test_tied_embeddings_are_stored_once() -> None:
    tied = load_architecture("llama-3.2-1b")
    apart = dataclasses.replace(tied, tied_embeddings=False)
    difference = weights_bytes(apart, "bf16") - weights_bytes(tied, "bf16")
    assert difference == 2 * tied.vocab_size * tied.d_model


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_sharding_divides_vocabulary_and_matrices(dtype: str) -> None:
    whole = load_architecture("llama-3.1-70b")
    one, four = weights_bytes(whole, dtype), weights_bytes(whole.sharded(4), dtype, tp=4)
    # Norms stay whole on each GPU, and each holds its own per-tensor scales.
    assert four >= one / 4
    assert four == pytest.approx(one / 4, rel=1e-3)


# ---- modules left alone ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["self_attn"],
        ["model.layers.*.self_attn"],
        ["model.layers.*.self_attn*"],
        ["re:.*self_attn.*"],
        ["model.language_model.layers.*.self_attn.o_proj"],
        [f"model.layers.{i}.self_attn" for i in range(32)],
        ["language_model.model.layers.*.self_attn", "lm_head"],
    ],
)
def test_skipped_modules_stay_wide(names: list[str]) -> None:
    config = {"quant_method": "fp8", "modules_to_not_convert": names}
    architecture = quantised(config)
    assert linear_bytes(SQUARE, "checkpoint", architecture) == 2 * 4096 * 4096
    assert linear_bytes(UP, "checkpoint", architecture) < 1.01 * 4096 * 22016


@pytest.mark.parametrize("names", [["self_att"], ["o_pro"], ["k_proj"], ["lm_head"], [], ["1"]])
def test_other_names_match_nothing(names: list[str]) -> None:
    config = {"quant_method": "fp8", "modules_to_not_convert": names}
    layers = 31 / 32 if names == ["1"] else 1  # "1" names a layer, as a bare number would
    got = linear_bytes(SQUARE, "checkpoint", quantised(config))
    assert got == pytest.approx(4096 * 4096 * (layers + 2 * (1 - layers)), rel=1e-4)


def test_layers_named_one_by_one_are_a_share() -> None:
    names = [f"model.layers.{i}.mlp" for i in range(8)]
    architecture = quantised({"quant_method": "fp8", "ignored_layers": names})
    wide, narrow = 2 * 4096 * 22016, 4096 * 22016 + 8
    assert linear_bytes(UP, "checkpoint", architecture) == 0.25 * wide + 0.75 * narrow


def test_layer_1_is_not_layer_10() -> None:
    names = ["model.layers.1"]
    architecture = quantised({"quant_method": "fp8", "ignored_layers": names})
    wide, narrow = 2 * 4096 * 4096, 4096 * 4096 + 4
    expected = wide / 32 + narrow * 31 / 32
    assert linear_bytes(SQUARE, "checkpoint", architecture) == pytest.approx(expected)


def test_kimi_quantises_its_routed_experts_only() -> None:
    architecture = load_architecture("kimi-k2.5")
    expert = Linear(name="experts_down", n_in=2048, n_out=7168, role="expert")
    shared = Linear(name="down_proj", n_in=2048, n_out=7168, role="shared_expert")
    elements = 2048 * 7168
    assert linear_bytes(shared, "checkpoint", architecture) == 2 * elements
    # int4 in groups of 32 with a bf16 scale, and the packed tensor's shape (two int64)
    assert linear_bytes(expert, "checkpoint", architecture) == elements * (0.5 + 2 / 32) + 16


def test_compressed_tensors_groups_with_targets() -> None:
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "a": {"targets": ["re:.*self_attn.*"], "weights": fp8, "input_activations": fp8},
            "b": {"targets": ["re:.*mlp.*"], "weights": int4},
        },
        "ignore": ["lm_head"],
    }
    architecture = quantised(config)
    assert linear_bytes(SQUARE, "checkpoint", architecture) == 4096 * 4096 + 2 * 4096
    assert linear_bytes(UP, "checkpoint", architecture) == 4096 * 22016 * (0.5 + 2 / 64) + 2 * 16
    # what no group targets stays as it is
    gate = Linear(name="in_proj", n_in=8, n_out=8, role="mixer")
    assert linear_bytes(gate, "checkpoint", architecture) == 2 * 64


def test_nf4_of_bitsandbytes() -> None:
    # QLoRA (arXiv 2305.14314, section 3): 0.5 bit per weight for scales, 0.127 when they are
    # quantised again
    plain = quantised({"quant_method": "bitsandbytes", "load_in_4bit": True})
    double = quantised(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    )
    elements = 4096 * 4096
    assert linear_bytes(SQUARE, "checkpoint", plain) * 8 / elements == 4.5
    assert linear_bytes(SQUARE, "checkpoint", double) * 8 / elements == pytest.approx(
        4.127, abs=1e-3
    )


# ---- type of the multiplications --------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "gpu", "expected"),
    [
        ("bf16", "h100-sxm", "bf16"),
        ("fp8", "h100-sxm", "fp8"),
        ("fp8", "a100-sxm-80gb", "bf16"),  # stored only: no fp8 tensor cores
        ("int8", "h100-sxm", "bf16"),
        ("int4", "h100-sxm", "bf16"),
        ("mxfp4", "h100-sxm", "bf16"),
        ("nvfp4", "b200-sxm", "fp4"),
        ("nvfp4", "h100-sxm", "bf16"),
    ],
)
def test_multiplication_type(weights: str, gpu: str, expected: str) -> None:
    llama = load_architecture("llama-2-7b")
    assert compute_dtype(SQUARE, weights, llama, "bf16", load_hardware(gpu)) == expected


def test_router_is_multiplied_in_the_run_dtype() -> None:
    router = Linear(name="router", n_in=64, n_out=8, role="router", quantisable=False)
    llama = load_architecture("llama-2-7b")
    assert compute_dtype(router, "fp8", llama, "bf16", load_hardware("h100-sxm")) == "bf16"


@pytest.mark.parametrize("activations", [True, False])
def test_w8a8_multiplies_in_int8_and_w8a16_does_not(activations: bool) -> None:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    group: dict[str, object] = {"targets": ["Linear"], "weights": weights}
    if activations:
        group["input_activations"] = {"num_bits": 8, "type": "int"}
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": group}}
    got = compute_dtype(
        SQUARE, "checkpoint", quantised(config), "bf16", load_hardware("a100-sxm-80gb")
    )
    assert got == ("int8" if activations else "bf16")


@pytest.mark.parametrize(("activations", "expected"), [({"num_bits": 4}, "fp4"), (None, "bf16")])
def test_nvfp4_with_wide_activations_is_only_stored(activations: object, expected: str) -> None:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": group}}
    got = compute_dtype(SQUARE, "checkpoint", quantised(config), "bf16", load_hardware("b200-sxm"))
    assert got == expected


def test_gpt_oss_and_deepseek_multiply_as_their_engines_do() -> None:
    h100 = load_hardware("h100-sxm")
    oss, v4 = load_architecture("gpt-oss-20b"), load_architecture("deepseek-v4-flash")
    assert compute_dtype(EXPERTS, "checkpoint", oss, "bf16", h100) == "bf16"
    assert compute_dtype(SQUARE, "checkpoint", oss, "bf16", h100) == "bf16"
    assert compute_dtype(EXPERTS, "checkpoint", v4, "bf16", h100) == "fp8"


# ---- what cannot be read ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int3", "", "FP8", "checkpoint ", "x" * 5000])
def test_unknown_weight_dtype(name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        weights_bytes(load_architecture("llama-2-7b"), name)
    assert "weight dtype" in str(caught.value)
    assert len(str(caught.value)) < 300


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group"}}


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"quant_method": "hqq"}, "quant_method"),
        ({"bits": 4}, "quant_method"),
        ({"quant_method": 4}, "quant_method"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": ["a", 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"quant_method": "fp8", "ignored_layers": [3]}, "module names"),
        ({"quant_method": "gptq", "bits": 0}, "bits"),
        ({"quant_method": "gptq", "bits": "4"}, "bits"),
        ({"quant_method": "awq", "group_size": -7}, "group_size"),
        ({"quant_method": "awq", "group_size": True}, "group_size"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}}}, "config_groups.a"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {**GROUP, "weights": {"num_bits": 4, "strategy": "x"}}},
            },
            "strategy",
        ),
        ({"quant_method": "modelopt", "quant_algo": "MAGIC"}, "quant_algo"),
        ({"quant_method": "modelopt", "quant_algo": ["FP8"]}, "quant_algo"),
        ({"quant_method": "modelopt", "quantized_layers": {"a": 3}}, "quantized_layers"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": {
                        "targets": ["Linear"],
                        "weights": {
                            "num_bits": 8,
                            "type": "float",
                            "strategy": "block",
                            "block_structure": [0],
                        },
                    }
                },
            },
            "block_structure",
        ),
    ],
)
def test_unreadable_quantization_is_named(config: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        linear_bytes(SQUARE, "checkpoint", quantised(config))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "pattern",
    [
        "re:(a+)+$",
        "re:(.*)*x",
        "re:" + ".*" * 30 + "x",
        "re:(",
        "re:" + "a" * 10_000,
        "re:(a{1,99}){1,99}",
        "*" * 50 + "x",
        "[!" * 40,
    ],
)
def test_hostile_patterns_are_refused_or_quick(pattern: str) -> None:
    config = {"quant_method": "fp8", "modules_to_not_convert": [pattern]}
    start = time.perf_counter()
    with contextlib.suppress(ConfigError):
        linear_bytes(SQUARE, "checkpoint", quantised(config))
    assert time.perf_counter() - start < 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "weight_block_size",
        "modules_to_not_convert",
        "ignore",
        "exclude_modules",
        "bits",
        "w_bit",
        "group_size",
        "q_group_size",
        "config_groups",
        "quantized_layers",
        "quant_algo",
        "expert_dtype",
        "load_in_8bit",
        "bnb_4bit_use_double_quant",
    ]
)
WEIGHTS = st.fixed_dictionaries(
    {},
    optional={
        "num_bits": st.sampled_from([4, 8]) | JSON,
        "type": st.sampled_from(["int", "float"]) | JSON,
        "strategy": st.sampled_from(["tensor", "channel", "group", "block"]) | JSON,
        "group_size": st.integers(1, 256) | JSON,
        "block_structure": st.lists(st.integers(1, 256), min_size=2, max_size=2) | JSON,
        "symmetric": JSON,
    },
)
GROUPS = st.dictionaries(
    st.text(max_size=5),
    st.fixed_dictionaries({"weights": WEIGHTS, "targets": st.just(["Linear"]) | JSON})
    | st.fixed_dictionaries({"weights": WEIGHTS, "input_activations": JSON}),
    max_size=3,
)
METHODS = st.sampled_from(
    ["fp8", "gptq", "awq", "mxfp4", "bitsandbytes", "compressed-tensors", "modelopt", "fbgemm_fp8"]
)


@given(METHODS, st.dictionaries(KEYS, JSON, max_size=4), st.none() | GROUPS)
@settings(max_examples=300)
def test_any_quantization_config_is_priced_or_refused(
    method: str, rest: dict[str, object], groups: dict[str, object] | None
) -> None:
    config = {**rest, "quant_method": method}
    if groups is not None:
        config["config_groups"] = groups
    try:
        got = linear_bytes(SQUARE, "checkpoint", quantised(config))
    except ConfigError:
        return
    assert 0 < got <= 20 * 4096 * 4096


@given(
    st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64), st.sampled_from(WEIGHT_DTYPES)
)
def test_bytes_of_any_matrix(n_in: int, n_out: int, copies: int, dtype: str) -> None:
    llama = load_architecture("llama-2-7b")
    one = Linear(name="down_proj", n_in=n_in, n_out=n_out, role="mlp")
    many = dataclasses.replace(one, copies=copies)
    got = linear_bytes(one, dtype, llama)
    assert got >= n_in * n_out / 2
    assert linear_bytes(many, dtype, llama) == pytest.approx(copies * got)
    taller = dataclasses.replace(one, n_out=n_out + 1)
    assert linear_bytes(taller, dtype, llama) > got


def test_the_config_of_a_user_is_read_like_a_bundled_one() -> None:
    config: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "vocab_size": 1000,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "fp8"},
    }
    architecture = architecture_from_config(config, "mine")
    matrices = 2 * (256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 512)
    scales = 2 * 4 * 7  # q, k, v, o, gate, up, down
    norms = 2 * (2 * 2 * 256 + 256)
    assert weights_bytes(architecture, "checkpoint") == matrices + scales + norms + 2 * 2 * 256000


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_groups_of_nothing_are_refused(method: str) -> None:
    config = json.loads(
        resources.files("costmodel").joinpath("architectures/llama-2-7b.json").read_text("utf-8")
    )
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 0}
    with pytest.raises(ConfigError, match="group_size"):
        weights_bytes(architecture_from_config(config), "checkpoint")

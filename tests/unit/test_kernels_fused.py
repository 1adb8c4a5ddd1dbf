"""Families of this project's own kernels: ceilings by hand, priors, selection over sweeps."""

from dataclasses import replace

import numpy as np
import pytest

from costmodel.architecture import MixerGroup
from costmodel.engines import load_engine
from costmodel.fused_kernels import KERNELS, work_of
from costmodel.hardware import load_hardware
from costmodel.in_situ import in_situ
from costmodel.kernels import time_operation
from costmodel.kernels.fused import KIND, PRIORS, arithmetic_s, parts_s
from costmodel.methods.parse import parse_method
from costmodel.mixers import AbstractMixer, Attention
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.rglru import RGLRU
from costmodel.operation import Operation, Operations
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Point, Workload

GPU = load_hardware("h200-sxm")
MIXER = Attention(n_heads=32, n_kv_heads=8, head_dim=128, v_head_dim=128)
#: Steps and prompts that kernels run: (method, phase, mixer) by kernel.
CASES: dict[str, tuple[str, str, AbstractMixer]] = {
    "attention16": ("full", "decode", MIXER),
    "attention8": ("fp8_kv", "decode", MIXER),
    "flexgen4": ("flexgen", "decode", MIXER),
    "flexgen2": ("flexgen:bits=2", "decode", MIXER),
    "kivi2": ("kivi", "decode", MIXER),
    "kivi4": ("kivi:bits=4", "decode", MIXER),
    "h2o": ("h2o", "decode", MIXER),
    "tova": ("tova", "decode", MIXER),
    "ring": ("streaming_llm", "decode", MIXER),
    "quest": ("quest", "decode", MIXER),
    "infllm": ("infllm", "decode", MIXER),
    "prompt_scores": ("h2o", "prefill", MIXER),
    "window_scores": ("snapkv", "prefill", MIXER),
    "ssd_scan": (
        "full",
        "prefill",
        Mamba2(n_heads=80, head_dim=64, d_state=128, n_groups=1, conv_kernel=4),
    ),
    "rglru_scan": ("full", "prefill", RGLRU(width=4096, n_blocks=16, conv_kernel=4)),
}


def operations(
    spec: str, phase: str, mixer: AbstractMixer, tokens: float, batch: float, **more: str
) -> Operations:
    at = Point(
        batch=batch,
        prompt_tokens=tokens,
        cached_tokens=tokens,
        reserved_tokens=tokens + 256,
        level="ideal",
        engine=load_engine("lccost"),
        **{"dtype": "bf16", "kv_dtype": "bf16", **more},
    )
    stack = parse_method(spec).resolved(int(tokens))
    hook = stack.decode if phase == "decode" else stack.prefill
    return hook(MixerGroup(mixer, 1, (2,), 3), at)


def step(kernel: str, tokens: float = 32_768.0, batch: float = 8.0) -> Operation:
    (found,) = [op for op in operations(*CASES[kernel], tokens, batch) if op.kernel]
    assert found.kernel == kernel
    return found


def test_every_kernel_has_a_case() -> None:
    assert set(CASES) == set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_records_a_kernel_is_a_prior_and_never_below_its_floor(kernel: str) -> None:
    for gpu in map(load_hardware, ("h200-sxm", "a100-sxm-80gb", "b200-sxm", "l40s", "t4")):
        dtype = "bf16" if "bf16" in gpu.peak_flops_per_s else "fp16"
        for tokens, batch in ((8192.0, 1.0), (131_072.0, 1.0), (8192.0, 32.0), (131_072.0, 32.0)):
            op = replace(step(kernel, tokens, batch), dtype=dtype)
            time = time_operation(op, gpu, "lccost")
            assert time.basis == "prior"
            work = work_of(op, float(gpu.n_units))
            floor = max(
                float(op.hbm_bytes) / gpu.hbm_bytes_per_s,
                float(op.flops) / gpu.peak(dtype),
                float(arithmetic_s(gpu, work)),
            )
            assert floor <= float(time.low_s) <= float(time.mid_s) <= float(time.high_s)
            assert float(KIND.roofline_s(gpu, work, kernel)) <= float(time.mid_s)


def ceiling(kernel: str, tokens: float = 131_072.0) -> tuple[float, float]:
    """(seconds of the bytes, seconds of the arithmetic) at datasheet rates, batch 8."""
    op = step(kernel, tokens)
    work = work_of(op, GPU.n_units)
    return float(work["n_bytes"]) / GPU.hbm_bytes_per_s, float(arithmetic_s(GPU, work))


def test_ceilings_worked_by_hand() -> None:
    """8 x 8 KV heads x 131,072 tokens x 2 x 128 = 2.147e9 elements; 132 SMs at 1.83 GHz.

    KIVI-2: 2.4 of 128 lanes a clock: 2.147e9 x 2.4 / 30.92e12 = 166.7 us, against 3 bits each,
    805 MB plus residual at 4.8 TB/s = 168 us: alike, as the kernel's docstring finds.
    """
    elements = 8 * 8 * 131_072 * 256
    rate = 132 * 1.83e9
    memory, arithmetic = ceiling("kivi2")
    assert arithmetic == pytest.approx(elements * 2.4 / (128 * rate), rel=1e-3)
    assert memory == pytest.approx(arithmetic, rel=0.05)
    # 5 bits: memory binds; FP8 needs 1.75 of 64 lanes against a byte an element
    memory, arithmetic = ceiling("kivi4")
    assert arithmetic < 0.65 * memory
    memory, arithmetic = ceiling("attention8")
    assert memory == pytest.approx(elements / 4.8e12, rel=0.01)
    assert arithmetic == pytest.approx(elements * 1.75 / (64 * rate), rel=1e-3)
    assert arithmetic < memory
    # 16 rows of tf32 an element, under a fifth of the bytes' time (h2o_decode's docstring)
    memory, arithmetic = ceiling("h2o")
    assert arithmetic < 0.2 * memory
    # 28 bytes a kept token and KV head over K and V's 512: 5.5 %, less the positions, which
    # only the look for the lightest reads
    kept = 8 * 8 * 2 * np.floor(131_072 * 0.1)
    assert memory * 4.8e12 / kept == pytest.approx(512 + 24, rel=0.01)


def test_prompts_multiply_and_exponentiate_alike() -> None:
    """267 FLOPs per exponential on an H200 against 2 x 128 of a logit: alike."""
    work = work_of(step("prompt_scores"), GPU.n_units)
    pairs = 8 * 32 * 32_768 * 32_769 / 2
    assert float(work["special_ops"]) == pytest.approx(2 * pairs)
    assert float(work["half_flops"]) == pytest.approx(2 * pairs * 256)
    exponentials = 2 * pairs / (16 * 132 * 1.83e9)
    products = 2 * pairs * 256 / GPU.peak("bf16")
    assert exponentials == pytest.approx(products, rel=0.01)
    assert float(arithmetic_s(GPU, work)) == pytest.approx(max(exponentials, products))
    memory, arithmetic = ceiling("window_scores")
    assert memory > arithmetic  # 32 queries: two passes over K


def test_scans_move_what_their_docstrings_say() -> None:
    work = work_of(step("ssd_scan", 32_768.0, 1.0), GPU.n_units)
    # per head and token: 768 of x and y, 512 of states, 12 of decays; 768 of b and c for 80
    assert float(work["n_bytes"]) / 32_768 == pytest.approx(80 * (768 + 512 + 12) + 768)
    assert float(work["tf32_flops"]) / 32_768 / 80 == pytest.approx(82e3, rel=0.02)
    two, one = (work_of(step("rglru_scan", 32_768.0, b), GPU.n_units) for b in (1.0, 32.0))
    assert float(two["n_bytes"]) / 32_768 / 4096 == pytest.approx(14)
    assert float(one["n_bytes"]) / 32_768 / 4096 / 32 == pytest.approx(8)


def test_steps_of_other_engines_levels_and_heads_stay_as_they_were() -> None:
    wide = Attention(n_heads=32, n_kv_heads=1, head_dim=128, v_head_dim=128)
    odd = Attention(n_heads=8, n_kv_heads=8, head_dim=96, v_head_dim=96)
    windowed = Attention(n_heads=32, n_kv_heads=8, head_dim=128, v_head_dim=128, window_tokens=4096)
    for mixer in (wide, odd, windowed):
        assert not any(op.kernel for op in operations("kivi", "decode", mixer, 8192.0, 1.0))
    assert not any(
        op.kernel for op in operations("full", "decode", MIXER, 8192.0, 1.0, dtype="fp32")
    )
    for spec in ("h2o:variant=real_drop", "flexgen:bits=8", "kivi:group=48,residual_tokens=96"):
        assert not any(op.kernel for op in operations(spec, "decode", MIXER, 8192.0, 1.0)), spec


def test_a_step_is_one_operation_with_the_sum_of_its_parts() -> None:
    (joined,) = operations("h2o", "decode", MIXER, 32_768.0, 8.0)
    assert joined.name == "scored_attention"
    assert joined.launches == KERNELS["h2o"].launches
    at = {"batch": 8.0, "tokens": np.floor(32_768 * 0.1) * 2}
    cache = at["batch"] * at["tokens"] * 8 * 256 * 2
    new = at["batch"] * 8 * (256 * 2 + 8)
    scores = at["batch"] * at["tokens"] * 8 * 8
    assert float(joined.state_bytes) == cache + new + scores
    assert float(joined.workspace_bytes) == at["batch"] * at["tokens"] * 32 * 4


@pytest.mark.parametrize("kernel", ["attention16", "kivi2", "h2o", "ring"])
def test_a_measured_kernel_moves_its_bytes_no_faster_inside_a_pass(kernel: str) -> None:
    own = {name: prior.value for name, prior in PRIORS.items()}
    gpu = replace(GPU, families={f"fused/{kernel}/lccost": own})
    op = step(kernel, tokens=131_072.0, batch=32.0)
    alone = time_operation(op, gpu, "lccost")
    inside = time_operation(op, gpu, "lccost", in_situ())
    n_bytes = work_of(op, float(gpu.n_units or 1))["n_bytes"]
    streaming = n_bytes / (own["bandwidth_fraction"] * gpu.hbm_bytes_per_s)
    assert inside.basis == alone.basis == "calibrated"
    assert streaming < inside.mid_s
    assert inside.mid_s == pytest.approx(alone.mid_s, rel=0.25)


def test_more_programs_are_faster_until_the_bandwidth_is_full() -> None:
    parameters = KIND.build({name: prior.value for name, prior in PRIORS.items()})
    work = work_of(step("h2o", 131_072.0, 1.0), GPU.n_units)
    seconds = [
        float(KIND.time_s(parameters, replace(GPU, n_units=n), work, "h2o", True))
        for n in (8, 32, 128, 512)
    ]
    assert seconds[0] > seconds[1] > seconds[2] == seconds[3]


def test_no_program_is_faster_than_its_block() -> None:
    """64 kept tokens of 512 bytes at 1e10 bytes/s of 1.8 GHz, beside which the bandwidth's share
    of 8 heads is nothing.
    """
    parameters = KIND.build({name: prior.value for name, prior in PRIORS.items()})
    work = work_of(step("h2o", 640.0, 1.0), GPU.n_units)
    launch, memory, _ = parts_s(parameters, GPU, work, "h2o")
    assert float(launch) == pytest.approx(9e-6)
    assert float(memory) == pytest.approx(64 * 512 / (1e10 * 1.83 / 1.8), rel=1e-3)


def test_contexts_shorter_than_a_residual_do_not_move_the_others() -> None:
    """KIVI keeps the last 128 tokens in 16 bits: at 64 its cache is a plain one."""
    architecture = load_architecture("llama-3.1-8b")
    tokens = [64, 100, 128, 200, 1300, 32_768]
    for spec in ("kivi", "kivi:bits=4", "flexgen"):
        for engine in ("lccost", "vllm", "lmdeploy"):
            many = predict(architecture, spec, Workload.of(4, tokens), GPU, engine=engine)
            for i, n in enumerate(tokens):
                one = predict(architecture, spec, Workload.of(4, n), GPU, engine=engine)
                assert float(one["tpot_s"]) == pytest.approx(float(many["tpot_s"][i]), rel=1e-12)
                assert float(one["tpot_high_s"]) == pytest.approx(float(many["tpot_high_s"][i]))


@pytest.mark.parametrize("gpu", ["h200-sxm", "a100-sxm-80gb"])
def test_our_kernels_are_between_the_roofline_and_the_published_chain(gpu: str) -> None:
    architecture, device = load_architecture("llama-3.1-8b"), load_hardware(gpu)
    where = Workload.of(np.array([1, 8, 32])[:, None], [1024, 8192, 32_768, 131_072])
    specs = {spec for spec, _, mixer in CASES.values() if mixer is MIXER}
    for spec in sorted(specs | {"pyramidkv"}):
        own = predict(architecture, spec, where, device, engine="lccost", solve=False)
        published = predict(architecture, spec, where, device, level="reference", solve=False)
        for name in ("ttft", "tpot"):
            assert np.all(own[f"roofline_{name}_s"] <= own[f"{name}_low_s"]), spec
            # first tokens differ by what surrounds the same attention: less than a hundredth
            assert np.all(own[f"{name}_s"] <= published[f"{name}_s"] * 1.01), (spec, name)


def test_what_snapkv_keeps_is_attended_as_a_plain_cache_with_its_own_room() -> None:
    for spec in ("snapkv", "pyramidkv"):
        (op,) = operations(spec, "decode", MIXER, 32_768.0, 8.0)
        assert op.kernel == "attention16"
        assert float(op.shape["room_tokens"]) == float(op.shape["kv_len"]) + 256
    (op,) = operations("snapkv+kivi", "decode", MIXER, 32_768.0, 8.0)
    assert op.kernel == "kivi2"


@pytest.mark.parametrize(
    ("head_dim", "d_state", "fits"),
    [(64, 128, True), (128, 256, True), (128, 512, False), (80, 128, False)],
)
def test_the_scan_is_predicted_where_the_mixer_runs_it(
    head_dim: int, d_state: int, fits: bool
) -> None:
    pytest.importorskip("torch")
    from measure.mixers.mamba2 import Mamba2Runner
    from measure.numerics import Numerics

    mixer = Mamba2(n_heads=4, head_dim=head_dim, d_state=d_state, n_groups=1, conv_kernel=4)
    kernels = {op.kernel for op in operations("full", "prefill", mixer, 4096.0, 1.0)}
    assert ("ssd_scan" in kernels) == fits
    assert Mamba2Runner(mixer, Numerics())._fits() == fits

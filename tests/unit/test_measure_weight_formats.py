"""Weights in 8 and 4 bits: bytes as predicted, errors within half a step, any mixer and MLP."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.architecture import Architecture, Layer
from costmodel.errors import NotApplicableError
from costmodel.methods.parse import parse_method
from costmodel.mixers import AbstractMixer, Attention
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.mla import MLA
from costmodel.mixers.rglru import RGLRU
from costmodel.mlps import DenseMLP, MoE
from costmodel.weights import weights_bytes
from measure.engine import Decoder, Numerics, pack_weights, random_weights
from measure.flops import count_flops
from measure.mixers import build_cache
from measure.weight_formats import linear, packed

torch.set_num_threads(1)
D, V, CPU = 160, 40, torch.device("cpu")


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["int8", "int4"]),
    st.integers(1, 5),
    st.sampled_from([2, 126, 128, 130, 256, 300]),
    st.sampled_from([1e-3, 1.0]),
    st.integers(0, 2**31),
)
def test_errors_are_within_half_a_step(form, n_out, n_in, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n_out, n_in, generator=generator) * scale
    found = packed(matrix, form).dense(torch.float32)
    if form == "int8":
        step = matrix.abs().amax(1, keepdim=True) / 127
    else:
        groups = torch.nn.functional.pad(matrix, (0, -n_in % 128)).unflatten(1, (-1, 128))
        span = groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)
        # the zero is rounded too, so the ends of the range may move by half a step
        step = 2 * (span / 15).repeat_interleave(128, 1)[:, :n_in]
    # a scale in fp16 is off by 2^-11 of up to 15 codes
    assert bool(((found - matrix).abs() <= step * (0.5 + 15 * 2**-11) + 1e-7).all())
    x = torch.randn(3, n_in, generator=generator)
    torch.testing.assert_close(linear(x, packed(matrix, form)), x @ found.T)


def test_rows_are_unpacked_in_pieces_without_a_seam():
    matrix = torch.randn(1500, 512)
    x = torch.randn(2, 512)
    whole = packed(matrix, "int4")
    torch.testing.assert_close(linear(x, whole, torch.ones(1500)), x @ whole.dense(x.dtype).T + 1)


MIXERS: dict[str, AbstractMixer] = {
    "attention": Attention(n_heads=4, n_kv_heads=2, head_dim=32, v_head_dim=32, qkv_bias=True),
    "mla": MLA(
        n_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8,
        v_head_dim=10,
    ),
    "mamba2": Mamba2(
        n_heads=6, head_dim=8, d_state=16, n_groups=2, conv_kernel=4, chunk_tokens=8
    ),
    "rglru": RGLRU(width=160, n_blocks=4, conv_kernel=4),
}  # fmt: skip
MLPS = {
    "dense": DenseMLP(d_ff=192),
    "moe": MoE(n_experts=4, top_k=2, d_ff=64, shared_d_ff=32),
}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_bytes_equal_the_prediction_and_the_decoder_runs(mixer, mlp, form):
    layer = Layer(mixers=(MIXERS[mixer],), mlps=(MLPS[mlp],), other_parameters=2 * D)
    model = Architecture(
        name="tiny", hub_id="tiny", family="tiny", d_model=D, vocab_size=V, layers=(layer,) * 2,
        other_parameters=D,
    )  # fmt: skip
    plain = random_weights(model, torch.bfloat16, CPU, numerics=Numerics())
    small = pack_weights(model, plain, form, numerics=Numerics())
    assert small.nbytes == weights_bytes(model, form, "bf16")
    assert plain.nbytes == weights_bytes(model, "checkpoint", "bf16")
    logits, flops, tokens = [], [], torch.arange(18).view(2, 9)
    for weights in (plain, small):
        decoder = Decoder(model, weights, n_positions=16, numerics=Numerics())
        options = {"batch": 2, "dtype": torch.bfloat16, "device": CPU}
        caches = [build_cache(parse_method("full"), MIXERS[mixer], **options) for _ in range(2)]
        flops.append(count_flops(lambda d=decoder, c=caches: logits.append(d.prefill(tokens, c))))
        logits.append(decoder.decode(tokens[:, :1], caches))
    if mlp == "dense":
        assert flops[0] == flops[1]
    error = (logits[2] - logits[0]).float().std() / logits[0].float().std()
    assert error < (0.05 if form == "int8" else 0.6)


def test_other_formats_are_refused():
    with pytest.raises(NotApplicableError, match="int8, int4, got 'nvfp4'"):
        packed(torch.ones(2, 4), "nvfp4")

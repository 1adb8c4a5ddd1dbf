"""A captured step by kernels, replayed, is the next step: launches recorded in the interpreter."""

import pytest
import torch
from step_recorder import RecordingDevice

from costmodel.architecture import Architecture, Layer
from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from costmodel.mlps import DenseMLP
from measure.capture import captured_step
from measure.kernels import interpreted
from measure.points import MeasurePoint
from measure.sessions import TorchSession

assert interpreted()
D, SIZE = 64, 64
GQA = Attention(n_heads=4, n_kv_heads=2, head_dim=SIZE, v_head_dim=SIZE)
#: The first step from T on fills a block of 32 keys, the second begins a page of 16.
T, STEPS = 63, 2
CASES = {
    "full": "fp16",
    "kivi:bits=2,residual_tokens=32": "fp32",
    "flexgen:group=32": "fp32",
    "h2o:heavy_fraction=0.3,recent_fraction=0.2": "fp32",
    "tova:keep_tokens=40": "fp32",
    "streaming_llm:sink_tokens=4,window_tokens=36": "fp32",
    "quest:page_tokens=16,keep_tokens=48": "fp32",
    "snapkv:keep_tokens=40,window_tokens=16": "fp16",
}


@pytest.mark.parametrize("spec", CASES)
def test_replays_equal_eager_steps(spec):
    """``captured_step`` compares them; it is shown to find a step that repeats itself elsewhere."""
    n = 3 if "quest" in spec else 1  # the first two layers of Quest are dense
    layer = Layer(mixers=(GQA,), mlps=(DenseMLP(d_ff=48),), other_parameters=2 * D)
    whole = Architecture(
        name="tiny", hub_id="test/tiny", family="llama", d_model=D, vocab_size=50,
        layers=(layer,) * n, other_parameters=D,
    )  # fmt: skip
    point = MeasurePoint(
        architecture=whole, stack=parse_method(spec), context_tokens=T, output_tokens=STEPS,
        dtype=CASES[spec], engine="lccost",
    )  # fmt: skip
    session = TorchSession(point, torch.device("cpu"))
    session.prepare()
    session.fill()
    session.mark()
    device = RecordingDevice(kernels=True)
    captured = captured_step(session, device)
    assert captured.replay is not None, captured.reason
    assert device.recorded.launches > 0
    first, second = (captured.replay() or session.logits.clone() for _ in range(2))
    assert (first - second).abs().max() > 1e-3

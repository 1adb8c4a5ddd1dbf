"""Peaks of memory: what live tensors take at most equals what is predicted, to 3 %.

On the demo decoder with real widths, where a prompt's activations, scores and copies stand out
against the weights of two layers.
"""

from importlib import resources

import pytest
import torch

from costmodel.hardware import load_hardware
from costmodel.methods.parse import parse_method
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Workload
from measure.live_memory import transient_peak_bytes
from measure.points import LEVEL_OF_REALISATION, MeasurePoint
from measure.sessions import TorchSession

torch.set_num_threads(1)

DEMO = str(resources.files("measure").joinpath("data/demo-decoder.json"))
CONTEXT, OUTPUT = 500, 2
INFLLM = (
    "infllm:block_tokens=32,init_tokens=16,local_tokens=128,topk=2,cached_blocks=4,chunk_tokens=64"
)
CASES = [
    *(("best", x) for x in ("full", "kivi", "h2o", "snapkv:keep_tokens=100", INFLLM)),
    *(
        ("reference", x)
        for x in (
            *("fp8_kv", "flexgen", "kivi", "kvquant", "h2o", "h2o:variant=real_drop"),
            *("snapkv:keep_tokens=100", "tova:keep_tokens=100", "quest:keep_tokens=96"),
            *("streaming_llm:window_tokens=100", "minference:kept_tokens=100", "kv_offload"),
            *("streaming_llm:window_tokens=100,positions=fixed", INFLLM),
        )
    ),
]


@pytest.mark.parametrize(("form", "spec"), CASES, ids=lambda x: x.split(":block")[0])
def test_peaks_are_as_predicted(form, spec):
    architecture = load_architecture(DEMO)
    point = MeasurePoint(
        architecture=architecture,
        stack=parse_method(spec),
        context_tokens=CONTEXT,
        output_tokens=OUTPUT,
        realisation=form,
        layers=2,
        model_source=DEMO,
    )
    session = TorchSession(point, torch.device("cpu"))
    session.prepare()
    peaks = {}
    for phase, call in (("prefill", session.prefill), ("decode", session.decode)):
        resident = session.weights_bytes + session.allocated_bytes
        peaks[f"peak_{phase}_bytes"] = resident + transient_peak_bytes(call)
    predicted = predict(
        point.executed,
        spec,
        Workload.of(1, CONTEXT, OUTPUT),
        load_hardware("epyc-9654"),
        level=LEVEL_OF_REALISATION[form],
        engine="torch",
        dtype="bf16",
        solve=False,
    )
    for name, measured in peaks.items():
        assert float(predicted[name]) == pytest.approx(measured, rel=0.03), name

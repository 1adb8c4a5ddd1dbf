"""The whole chain for real: calibrate this CPU, predict a model it never saw, run the model.

One thread and its own CPU time, which a busy neighbour hardly moves; the plan is a small one, and
the bounds are several times what a quiet machine shows, but a class left unmeasured, a unit wrong
by two or weights taken for cached break them.
"""

import dataclasses

import numpy as np
import pytest
import tomli_w

from costmodel.hardware import load_hardware
from costmodel.methods.parse import parse_method
from costmodel.registry import architecture_from_config
from lccost.joins import predict_record
from measure.calibrate import profile_table
from measure.environment import fingerprint, worker_variables
from measure.isolation import run_isolated
from measure.microbenchmarks.plan import QUICK
from measure.observation_options import How
from measure.points import MeasurePoint
from measure.runner import Prediction, Rules, measure
from measure.timing import Budget

pytest.importorskip("torch")

MODEL = architecture_from_config(
    {
        "model_type": "llama",
        "hidden_size": 640,
        "intermediate_size": 1792,
        "num_hidden_layers": 4,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 9000,
        "tie_word_embeddings": True,
    },
    "chain",
)
PLAN = dataclasses.replace(
    QUICK,
    dtypes=("bf16",),
    seconds=0.02,
    pool_bytes=2**28,
    gemm_shapes=((1216, 832), (1088, 3008), (12032, 1088)),
    rows=(1, 16, 256, 1024),
    head_dims=(64,),
    groups=(4,),
    decode_tokens=(400, 3000),
    prefill_tokens=(300, 1100),
    kivi_tokens=(900,),
    quantise_tokens=(900,),
    layer_rows=(1, 64, 1024),
    stream_bytes=(2**12, 2**20, 2**26),
    bits=(2,),
    windows=(100,),
    scored_tokens=(200,),
    kept_tokens=(100,),
    method_tokens=(300,),
    selected_tokens=(600,),
    mamba2=((4, 16, 16, 32, 64),),
    rglru=((64, 2, 64),),
    mamba=((64, 4, 64),),
    delta=((2, "gdn", 64),),
    rwkv5=((2, 64),),
)


def test_predictions_of_an_unseen_model_hold(tmp_path):
    variables = worker_variables(1)
    found = run_isolated(
        "measure.microbenchmarks:run_plan", (PLAN, 1), timeout_s=300, variables=variables
    )
    assert found.status == "ok", found.message
    path = tmp_path / "this-cpu.toml"
    table = profile_table(
        found.value,
        fingerprint(variables),
        name="this-cpu",
        quick=True,
        threads=1,
        date="2026-01-01",
    )
    path.write_text(tomli_w.dumps(table), "utf-8")
    hardware = load_hardware(path)
    errors: dict[str, list[float]] = {"ttft_s": [], "tpot_s": []}
    for method, context in (("full", 600), ("full", 1500), ("kivi:bits=2", 1500)):
        point = MeasurePoint(
            architecture=MODEL,
            stack=parse_method(method),
            context_tokens=context,
            output_tokens=4,
            dtype="bf16",
            gpu=str(path),
        )
        record = measure(
            point,
            Prediction(row=predict_record(point.fields, hardware, MODEL)),
            rules=Rules(how=How(budget=Budget(seconds=0.5, min_samples=5))),
        )
        assert record["status"] in ("ok", "noisy"), record["message"]
        predicted = record["predicted"]
        assert predicted["basis"] == "calibrated"
        assert predicted["state_bytes"] == record["state_bytes"]
        for name in errors:
            errors[name].append(abs(predicted[name] / record[name] - 1))
    assert np.mean(errors["ttft_s"]) < 0.35, errors
    assert np.mean(errors["tpot_s"]) < 0.40, errors

"""Two real processes over Gloo share a model: the same logits, the predicted bytes per rank."""

from dataclasses import replace

import pytest
import torch
from parallel_cases import MODELS, TOTAL, logits, model, weights

from costmodel.errors import NotApplicableError
from costmodel.hardware import load_hardware
from costmodel.methods.parse import parse_method
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mlps import DenseMLP
from costmodel.weights import weights_bytes
from lccost.measuring import predictor
from measure.engine import Decoder
from measure.parallel.ranks import launch
from measure.parallel.shards import share_of
from measure.points import MeasurePoint
from measure.runner import Rules, predicted_of
from measure.runner import measure as measure_point

torch.set_num_threads(1)


def test_logits_equal_one_process_and_weights_the_prediction():
    by_rank = launch(2, "parallel_cases:in_a_rank", (), "cpu")
    for name, whole in MODELS.items():
        alone = logits(Decoder(whole, weights(name), n_positions=TOTAL), whole, "full")
        for found, held_bytes in (r[name] for r in by_rank):
            for mine, expected in zip(found, alone, strict=True):
                torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)
            assert held_bytes == weights_bytes(whole.sharded(2), "checkpoint", "fp32", 2)
        assert alone[0].std() > 0.1


def test_a_point_over_two_ranks_holds_what_is_predicted():
    whole = replace(MODELS["gqa"], vocab_size=52)  # an odd vocabulary is padded, and multiplied so
    point = MeasurePoint(
        architecture=whole, stack=parse_method("h2o:heavy_fraction=0.25,recent_fraction=0.25"),
        context_tokens=40, batch=2, output_tokens=4, tp=2,
    )  # fmt: skip
    predict = predictor(load_hardware("h100-sxm"), {whole.name: whole})
    found = measure_point(point, predicted_of(point, predict), Rules())
    assert found["status"] in ("ok", "noisy"), found["message"]
    predicted = found["predicted"]
    assert len(found["ranks"]) == 2
    for rank in found["ranks"]:
        for name in ("weights_bytes", "state_bytes", "state_host_bytes"):
            assert rank[name] == predicted[name]
    for name in ("executed_prefill_flops", "executed_decode_flops"):
        assert found[name] == predicted[name]  # of the whole model
    assert (found["tp"], predicted["tp"]) == (2, 2)
    assert found["statistics"]["tpot_s"]["n"] == 7
    assert found["energy"]["reason"] == "not asked for"
    # one rank's work is not others' use of the machine to the other
    assert found["quality"]["foreign_cores"] is None
    assert not any("other work" in x for x in found["quality"]["warnings"])


def test_a_rank_that_runs_out_of_memory_is_the_points_ending():
    with pytest.raises(MemoryError, match="rank 1: no room"):
        launch(2, "parallel_cases:fails_in_one_rank", (), "cpu")


def test_a_point_that_does_not_exist_is_said_by_its_ranks():
    layer = MODELS["gqa"].layers[0]
    mixer = Mamba2(n_heads=4, head_dim=16, d_state=16, n_groups=1, conv_kernel=4)
    hybrid = replace(MODELS["gqa"], layers=(replace(layer, mixers=(mixer,)),))
    point = MeasurePoint(architecture=hybrid, stack=parse_method("full"), context_tokens=8, tp=2)
    found = measure_point(point)
    assert (found["status"], found["applicable"]) == ("not_applicable", False)
    assert "mamba2 mixer" in found["reason"]


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(NotApplicableError, match="do not divide"):
        share_of(model({}, DenseMLP(d_ff=49)), 2)
    with pytest.raises(NotApplicableError, match="heads"):
        share_of(model({"n_heads": 6, "n_kv_heads": 3}, DenseMLP(d_ff=48)), 4)
    layer = MODELS["gqa"].layers[0]
    mixer = Mamba2(n_heads=4, head_dim=16, d_state=16, n_groups=1, conv_kernel=4)
    hybrid = replace(MODELS["gqa"], layers=(replace(layer, mixers=(mixer,)),))
    with pytest.raises(NotApplicableError, match="mamba2"):
        share_of(hybrid, 2)

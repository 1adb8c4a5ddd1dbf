"""``lccost measure`` and ``scripts/gpu_run.sh`` as people call them: rows, exit codes, resuming."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100, "head_dim": 32,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def run(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "lccost", *map(str, arguments)], cwd=ROOT, text=True,
        capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip


def measured(model, output, *arguments, **options):
    return run("measure", "--model", model, "--output", output, "--output-tokens", 4,
               "--seconds", 0.02, "--retries", 0, *arguments, **options)  # fmt: skip


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_product_with_impossible_combinations_and_some_layers(model, tmp_path):
    output = tmp_path / "runs.jsonl"
    # 32 elements a head cannot be packed in groups of 64 along them
    done = measured(model, output, "--method", "full,kivi:group=64", "--context", "16",
                    "--layers", 2, "--gpu", "xeon-8480plus")  # fmt: skip
    assert done.returncode == 0, done.stderr
    by_method = {r["method"]: r for r in rows(output)}
    full, kivi = by_method["full"], by_method["kivi"]
    assert full["status"] in ("ok", "noisy")
    assert (full["layers"], full["n_layers_model"], full["extrapolated"]) == (2, 3, True)
    assert full["whole_model"]["extrapolated"] is True
    # the embedding is whole already, state grows with the layers
    assert full["whole_model"]["state_bytes"] == pytest.approx(1.5 * full["state_bytes"])
    assert full["whole_model"]["weights_bytes"] < 1.5 * full["weights_bytes"]
    assert 0 < full["mfu"] < 1
    assert 0 < full["mbu"] < 1
    assert full["predicted"]["state_bytes"] == full["state_bytes"]
    assert (kivi["status"], kivi["applicable"]) == ("not_applicable", False)
    assert "64" in kivi["reason"]
    assert kivi["tpot_s"] is None


def test_resuming_finds_everything_done(model, tmp_path):
    output = tmp_path / "runs.jsonl"
    assert measured(model, output, "--context", "16").returncode == 0
    before = output.read_bytes()
    again = measured(model, output, "--context", "16", "--resume")
    assert again.returncode == 0
    assert "measured before" in again.stderr
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--context", "16", "--layers", "9"), 2, "expected 1 to 3"),
        (("--context", "16", "--method", "hf_quanto"), 2, "priced but cannot be run"),
        (("--context", "16", "--timeout", "0.01"), 1, "timeout"),
        (("--context", "16", "--timeout", "nan"), 2, "finite"),
        (("--context", "16", "--timeout", "inf"), 2, "finite"),
        (("--context", "16", "--seconds", "nan"), 2, "finite"),
        (("--context", "16", "--tp", "4"), 2, "heads"),
        (("--context", "16", "--weights", "/nowhere"), 2, "nowhere"),
        (("--context", "16", "--device", "tpu"), 2, "expected cpu or cuda"),
    ],
)
def test_exit_codes(model, tmp_path, arguments, code, words):
    done = measured(model, tmp_path / "runs.jsonl", *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_is_exit_4(model, tmp_path):
    output = tmp_path / "runs.jsonl"
    done = measured(model, output, "--context", "16", "--device", "cuda:0")
    assert done.returncode == 4, done.stderr
    assert "doctor" in done.stderr
    assert not output.exists()
    script = subprocess.run(
        [ROOT / "scripts" / "gpu_run.sh", tmp_path / "out"], text=True, capture_output=True,
        check=False, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert script.returncode == 4
    assert "no CUDA device" in script.stderr
    assert not (tmp_path / "out").exists()

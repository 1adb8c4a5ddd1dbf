"""``lccost measure`` and ``scripts/gpu_run.sh`` as people call them: rows, exit codes, resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
        (("--context", "16", "--timeout", "0.01"), 1, "timeout"),
        (("--context", "16", "--timeout", "nan"), 2, "finite"),
        (("--context", "16", "--threads", "100000"), 2, "processors here"),
        (("--context", "16", "--seed", str(2**64)), 2, "--seed"),
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


def checkpoint(tmp_path, **tensors):
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({k: torch.zeros(v) for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


LLAMA_TENSORS = {
    "model.embed_tokens.weight": (100, 64), "model.norm.weight": (64,),
    **{f"model.layers.{i}.{n}.weight": s for i in range(3) for n, s in (
        ("input_layernorm", (64,)), ("post_attention_layernorm", (64,)),
        ("self_attn.q_proj", (64, 64)), ("self_attn.k_proj", (32, 64)),
        ("self_attn.v_proj", (32, 64)), ("self_attn.o_proj", (64, 64)),
        ("mlp.gate_proj", (96, 64)), ("mlp.up_proj", (96, 64)), ("mlp.down_proj", (64, 96)),
    )},
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--engine", "lccost"), 4, "run on a CUDA device, got cpu"),
        (("--engine", "transformers", "--method", "kivi"), 2, "transformers has caches for"),
        (("--engine", "transformers", "--method", "kv_offload"), 2, "on a CUDA device only"),
        (("--method", "hf_quanto"), 2, "priced but cannot be run"),
        (("--executor", "slurm"), 2, "expected local, ray"),
        (("--max-prefill", "1"), 2, "--gpu PROFILE"),
    ],
)
def test_what_cannot_run_fails_before_anything_starts(model, tmp_path, arguments, code, words):
    output = tmp_path / "runs.jsonl"
    done = measured(model, output, "--context", "16", *arguments, TRITON_INTERPRET="0")
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "measure 1/1" not in done.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.layers.2.mlp.up_proj.weight": (90, 64)},
         "expects layer 2 mlp gate_up_proj of [192, 64], got [186, 64]"),
        (None, "a pickle"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_the_models_fails_up_front(model, tmp_path, changes, words):
    if changes is None:
        folder = tmp_path / "weights"
        folder.mkdir()
        (folder / "pytorch_model.bin").write_bytes(b"")
    else:
        folder = checkpoint(tmp_path, **{**LLAMA_TENSORS, **changes})
    output = tmp_path / "runs.jsonl"
    done = measured(model, output, "--context", "16", "--weights", folder)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert not output.exists()


def test_a_profile_of_another_device_is_said_once(model, tmp_path):
    output = tmp_path / "runs.jsonl"
    folder = checkpoint(tmp_path, **LLAMA_TENSORS)
    done = measured(model, output, "--context", "16", "--gpu", "h100-sxm", "--weights", folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--gpu h100-sxm is not the device that runs") == 1
    first = rows(output)[0]
    assert first["weights"] == "checkpoint"
    assert first["memory_check"]["limit"]


def test_an_interrupt_says_how_to_go_on(model, tmp_path):
    output = tmp_path / "runs.jsonl"
    command = [sys.executable, "-m", "lccost", "measure", "--model", model, "--context",
               ",".join(map(str, range(16, 32))), "--output", output, "--output-tokens", "4",
               "--seconds", "0.02"]  # fmt: skip
    # A background job of a shell hands on that interrupts are ignored.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sweep = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, preexec_fn=heard)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (output.exists() and output.stat().st_size):
        time.sleep(0.02)
    sweep.send_signal(signal.SIGINT)
    _, stderr = sweep.communicate(timeout=30)
    assert sweep.returncode == 1
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert 1 <= len(rows(output)) < 16


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

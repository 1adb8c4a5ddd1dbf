"""The command line as a user meets it."""

import csv
import io
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from costmodel.results import KEYS
from lccost.cli import COMMANDS, cli

BASE = ["predict", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--context", "32k"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def rows(*arguments: str) -> list[dict]:
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout, parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert set(document) >= {
        "schema_version",
        "lccost_version",
        "command",
        "inputs",
        "assumptions",
        "results",
    }
    return document["results"]


def test_json_rows_have_the_contract_keys_and_types() -> None:
    row = rows(*BASE, "--method", "kivi")[0]
    assert list(row) == list(KEYS)
    assert row["model"] == "llama-3.1-8b"
    assert row["method"] == "kivi"
    assert row["method_parameters"] == {"bits": 2, "group": 32, "residual_tokens": 128}
    assert row["gpu"] == "h100-sxm"
    assert row["context_tokens"] == 32768
    assert row["basis"] in {"datasheet", "prior", "transferred", "calibrated"}
    for name in ("prefill_bound", "decode_bound"):
        assert row[name] in {"compute", "weight", "kv", "launch", "link"}
    assert row["applicable"] is True
    assert row["fits"] is True
    for name in KEYS:
        if name.endswith(("_bytes", "_flops")):
            assert isinstance(row[name], int), name
    assert row["ttft_low_s"] <= row["ttft_s"] <= row["ttft_high_s"]


def test_product_order_and_method_specs_paste_back() -> None:
    methods = "full,kivi:bits=4,group=64,h2o,llmlingua2:rate=0.5+kivi:bits=4"
    table = rows(
        "predict",
        "--model",
        "llama-3.1-8b,qwen3-8b",
        "--gpu",
        "h100-sxm,l4",
        "--method",
        methods,
        "--context",
        "4k,8k",
        "--batch",
        "1,2",
    )
    assert len(table) == 2 * 2 * 4 * 2 * 2
    names = ("model", "gpu", "method_spec", "context_tokens", "batch")
    keys = [tuple(r[n] for n in names) for r in table]
    assert len(set(keys)) == len(keys)
    assert [k[0] for k in keys] == ["llama-3.1-8b"] * 32 + ["qwen3-8b"] * 32
    assert [k[3] for k in keys[:4]] == [4096, 4096, 8192, 8192]
    for spec in {k[2] for k in keys}:
        again = rows(*BASE, "--method", spec)
        assert again[0]["method_spec"] == spec


def test_methods_that_do_not_compose_are_a_row_in_a_list_and_an_error_alone() -> None:
    table = rows(*BASE, "--method", "full,kivi+flexgen,h2o")
    assert [r["applicable"] for r in table] == [True, False, True]
    assert "do not compose" in table[1]["reason"]
    assert (table[1]["method"], table[1]["ttft_s"]) == ("kivi+flexgen", None)
    alone = run(*BASE, "--method", "kivi+flexgen")
    assert alone.exit_code == 2
    assert "do not compose" in alone.stderr


def test_inapplicable_in_a_product_is_a_row_and_alone_is_an_error() -> None:
    table = rows(
        "predict",
        "--model",
        "llama-3.1-8b,mamba-2.8b",
        "--gpu",
        "h100-sxm",
        "--context",
        "8k",
        "--method",
        "full,kivi",
    )
    refused = [r for r in table if not r["applicable"]]
    assert [(r["model"], r["method"]) for r in refused] == [("mamba-2.8b", "kivi")]
    assert "mamba" in refused[0]["reason"]
    assert refused[0]["state_bytes"] is None
    assert refused[0]["ttft_s"] is None
    alone = run(
        "predict",
        "--model",
        "mamba-2.8b",
        "--gpu",
        "h100-sxm",
        "--context",
        "8k",
        "--method",
        "kivi",
    )
    assert alone.exit_code == 2
    assert "kivi acts on" in alone.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h100"], ["unknown GPU", "h100-sxm"]),
        (["--model", "llama-3.1-9b"], ["llama-3.1-8b"]),
        (["--method", "kiwi"], ["unknown method", "kivi"]),
        (["--method", "kivi:bit=2"], ["bits"]),
        (["--method", "kivi:bits=3"], ["expected bits of 2 or 4, got 3"]),
        (["--engine", "vlllm"], ["vllm"]),
        (["--weight-dtype", "int5"], ["int4"]),
        (["--context", "8x"], ["8x"]),
        (["--context", "0"], ["0"]),
        (["--tp", "3"], ["32 attention heads"]),
        (["--model", "/nonexistent/config.json"], ["/nonexistent/config.json"]),
    ],
    ids=lambda a: "-".join(a)[:30],
)
def test_mistakes_get_one_message_and_no_traceback(arguments: list[str], words: list[str]) -> None:
    result = run(*BASE, *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output


def test_bf16_on_a_gpu_without_it_names_the_way_out() -> None:
    alone = run("predict", "--model", "llama-3.1-8b", "--gpu", "t4", "--context", "1k")
    assert alone.exit_code == 2
    assert "--dtype fp16" in alone.output
    table = rows(*BASE, "--gpu", "t4")
    assert [r["applicable"] for r in table] == [True, False]
    assert "--dtype fp16" in table[1]["reason"]
    assert rows(
        "predict", "--model", "llama-3.1-8b", "--gpu", "t4", "--context", "1k", "--dtype", "fp16"
    )[0]["applicable"]


def test_csv_jsonl_and_md(tmp_path: Path) -> None:
    text = run(*BASE, "--method", "full,kivi", "--format", "csv").stdout
    parsed = list(csv.DictReader(io.StringIO(text)))
    assert [r["method"] for r in parsed] == ["full", "kivi"]
    assert json.loads(parsed[1]["method_parameters"])["bits"] == 2
    lines = run(*BASE, "--format", "jsonl").stdout.splitlines()
    assert json.loads(lines[0])["method"] == "full"
    target = tmp_path / "out.md"
    result = run(*BASE, "--method", "full,kivi", "--output", str(target))
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "| kivi" in target.read_text("utf-8")


def test_output_into_a_missing_folder_writes_nothing(tmp_path: Path) -> None:
    result = run(*BASE, "--output", str(tmp_path / "no" / "x.json"))
    assert result.exit_code == 2
    assert "does not exist" in result.output
    assert not list(tmp_path.iterdir())


def test_table_says_what_the_method_does_not_change_and_explains() -> None:
    text = run(*BASE, "--method", "full,kivi", "--explain").stdout
    for words in (
        "KV/state",
        "TTFT",
        "bound",
        "given up",
        "kivi does not save prefill",
        "no method here changes it",
        "2 m n k FLOPs",
        "engine vllm",
    ):
        assert words in text, words
    reference = run(*BASE, "--method", "kivi", "--level", "reference", "--explain").stdout
    assert "jy-yuan/KIVI" in reference


def test_solve_exit_codes() -> None:
    fits = run(*BASE, "--solve", "max-batch")
    assert fits.exit_code == 0
    assert "max batch: full 13" in fits.stdout
    nothing = run(
        "predict",
        "--model",
        "llama-3.1-405b",
        "--gpu",
        "l4",
        "--context",
        "8k",
        "--solve",
        "max-batch",
    )
    assert nothing.exit_code == 3
    assert "nothing fits" in nothing.output


def test_assume_is_said(tmp_path: Path) -> None:
    config = {
        "model_type": "foo_dense",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "vocab_size": 1000,
        "tie_word_embeddings": True,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    arguments = ["predict", "--model", str(path), "--gpu", "l4", "--context", "4k"]
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "foo_dense" in refused.output
    assert "--assume" in refused.output
    assert "llama" in refused.output
    row = rows(*arguments, "--assume", "llama")[0]
    assert row["assumed_family"] == "llama"


def test_every_command_has_help_with_examples() -> None:
    for name in COMMANDS:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert f"lccost {name}" in result.output, f"{name} shows no example"


def test_unknown_command_is_suggested() -> None:
    result = run("predikt")
    assert result.exit_code == 2
    assert "predict" in result.output


def test_module_entry_and_closed_pipe() -> None:
    command = f"{sys.executable} -m lccost models list | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["methods", "models", "gpus"])
def test_listings(command: str) -> None:
    listed = json.loads(run(command, "list", "--format", "json").stdout)["results"]
    minimum = {"methods": 18, "models": 80, "gpus": 37}[command]
    assert len(listed) >= minimum
    name = listed[0]["name"]
    shown = run(command, "show", name)
    assert shown.exit_code == 0
    assert name in shown.stdout


def test_a_product_of_impossible_combinations_is_rows() -> None:
    shape = ["predict", "--model", "mamba-2.8b", "--gpu", "h100-sxm"]
    for method, context in (("kivi,h2o", "8k"), ("kivi", "8k,9k")):
        more = ["--method", method, "--context", context]
        table = rows(*shape, *more)
        assert [r["applicable"] for r in table] == [False, False]
        assert all(r["reason"] and r["engine"] == "vllm" and r["ttft_s"] is None for r in table)
    text = run(*shape, "--method", "kivi,h2o", "--context", "8k")
    assert "no combination applies" in text.stdout
    asked = run(*shape, "--method", "kivi,h2o", "--context", "8k", "--solve", "max-batch")
    assert asked.exit_code == 3
    assert "nothing applies" in asked.output
    assert "kivi acts on" in asked.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "x.pdf"], ["x.pdf", ".json", ".csv"]),
        (["--engine", ""], ["unknown engine"]),
        (["--format", "csv", "--explain"], ["--explain", "json"]),
        (["--method", "k" * 5000], ["kkk..."]),
        (["--context", str(2**51)], ["at most 1,125,899,906,842,624"]),
        (["--context", "\u0663"], ["whole number"]),
        (["--gpu", "g" * 5000 + ".toml"], ["no such profile file"]),
    ],
    ids=lambda a: "-".join(a)[:20],
)
def test_odd_input_gets_one_short_message(arguments: list[str], words: list[str]) -> None:
    result = run(*BASE, *arguments)
    assert result.exit_code == 2, result.output
    assert len(result.output) < 700
    for word in words:
        assert word in result.output


def test_names_compare_case_insensitively() -> None:
    row = rows(
        "predict",
        "--model",
        "LLAMA-3.1-8B",
        "--gpu",
        "NVIDIA H100 80GB HBM3",
        "--context",
        "1K",
        "--method",
        "KIVI:Bits=4",
        "--dtype",
        "BF16",
        "--weight-dtype",
        "INT4",
        "--level",
        "Ideal",
        "--engine",
        "SGLang",
    )[0]
    assert (row["model"], row["gpu"]) == ("llama-3.1-8b", "h100-sxm")
    assert row["method_spec"] == "kivi:bits=4"
    assert (row["dtype"], row["weight_dtype"], row["engine"]) == ("bf16", "int4", "sglang")


def test_aliases_of_one_thing_are_one(tmp_path: Path) -> None:
    same = rows(
        "predict",
        "--model",
        "llama-3.1-8b,meta-llama/Llama-3.1-8B",
        "--context",
        "1k",
        "--gpu",
        "h100-sxm,H100-SXM5-80GB",
    )
    assert len(same) == 1
    other = tmp_path / "mine.toml"
    text = resources.files("hardware_profiles").joinpath("h100-sxm.toml").read_text("utf-8")
    other.write_text(text.replace("hbm_bytes_per_s = 3.35e12", "hbm_bytes_per_s = 3e12"))
    clash = run(*BASE, "--gpu", str(other))
    assert clash.exit_code == 2
    assert "two different GPUs are called h100-sxm" in clash.output


def test_what_a_reader_must_know_is_said() -> None:
    document = json.loads(run(*BASE, "--context", "1m", "--tp", "16", "--format", "json").stdout)
    said = " ".join(document["assumptions"])
    assert "1,048,576 tokens are more than the 131,072" in said
    assert "tp 16 spans nodes of 8" in said
    assert document["inputs"]["model"] == ["llama-3.1-8b"]
    assert document["inputs"]["assume"] is None


def test_extrapolated_times_are_said_beside_the_table() -> None:
    """Prompts of 131,072 tokens are eight times what prompt kernels were measured on."""
    asked = ("predict", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--method", "full")
    assert "extrapolated" in run(*asked, "--context", "128k").stdout
    assert "extrapolated" not in run(*asked, "--context", "8k").stdout


def test_explanations_add_up() -> None:
    document = json.loads(
        run(*BASE, "--method", "kivi,llmlingua2", "--explain", "--format", "json").stdout
    )
    for row, block in zip(document["results"], document["explanations"], strict=True):
        assert block["method_spec"] == row["method_spec"]
        assert block["state"]["bytes"] == row["state_bytes"]
        for phase in ("prefill", "decode"):
            assert block["memory"][phase]["peak_bytes"] == row[f"peak_{phase}_bytes"]
            ops = [op for op in block["operations"] if op["phase"] == phase]
            flops = sum(op["count"] * op["flops"] for op in ops)
            assert flops == pytest.approx(row[f"{phase}_flops"])
    gemm = next(op for op in document["explanations"][0]["operations"] if op["name"] == "o_proj")
    assert gemm["shape"] == {"m": 32768, "n": 4096, "k": 4096}
    text = run(*BASE, "--method", "kivi", "--explain").stdout
    for words in ("m 32,768, n 4,096, k 4,096", "peak     prefill", "Rk = T mod R", "K = 8"):
        assert words in text, words


def test_methods_show_when_they_act() -> None:
    assert "acts: before prefill" in run("methods", "show", "llmlingua2").stdout
    listed = json.loads(run("methods", "list", "--format", "json").stdout)["results"]
    assert all(row["acts"] for row in listed)


@pytest.mark.parametrize("command", ["measure", "calibrate"])
def test_without_torch_the_extra_is_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    target = str(tmp_path / "out")
    arguments = {
        "measure": ["--model", "llama-3.2-1b", "--context", "64", "--output", target],
        "calibrate": ["--output", target],
    }[command]
    result = run(command, *arguments)
    assert result.exit_code == 4
    assert "lccost[measure]" in result.output
    assert not list(tmp_path.iterdir())


def test_compare_has_nothing_to_draw(tmp_path: Path) -> None:
    empty = tmp_path / "none.jsonl"
    empty.write_text("")
    done = run("compare", str(empty), "--plot", str(tmp_path / "p.png"))
    assert done.exit_code == 2
    assert "nothing to compare" in done.output
    assert "the file is empty" in done.output
    assert not (tmp_path / "p.png").exists()


def test_architectures_stand_beside_each_other_by_score() -> None:
    shown = run("models", "show", "mamba-2.8b").stdout
    assert "LongBench average 20.7 with inputs of about 1,500 tokens" in shown
    pair = ["predict", "--model", "mamba-2.8b,falcon-mamba-7b", "--gpu", "l4", "--context", "2k"]
    said = json.loads(run(*pair, "--format", "json").stdout)["assumptions"]
    assert any(x.startswith("mamba-2.8b: uncompressed score LongBench average 20.7") for x in said)
    assert "falcon-mamba-7b: uncompressed score unknown" in said

"""Files that are broken, truncated, huge or meant to hurt: a short error that says file and key,
soon."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from costmodel.errors import ConfigError, LccostError
from costmodel.registry import architecture_from_config, load_architecture

GOOD: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < 2.0


def refuse(tmp_path: Path, content: str | bytes, *words: str) -> str:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        load_architecture(path)
    message = str(error.value)
    assert str(path) in message
    assert len(message) < 1500
    for word in words:
        assert word in message, message
    return message


TEXT = json.dumps(GOOD)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "not valid JSON"),
        (TEXT[:-20], "line 1"),
        ("{" + TEXT, "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ('"llama"', "expected a JSON object"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00ab", "UTF-8"),
        (b"\x00" * 1000, "not valid JSON"),
        (os.urandom(4096) + b"\xff", "UTF-8"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (TEXT[:-1] + ', "hidden_size": 64}', "twice"),
        ('{"hidden_size": ' + "9" * 10_000 + "}", "not a usable config.json"),
        ("{}", "no model_type"),
        ('{"model_type": null}', "no model_type"),
        ('{"model_type": {"$ref": "x"}}', "model_type"),
        ('{"model_type": "__import__(\'os\')"}', "__import__"),
        ('{"model_type": "../../etc/passwd"}', "not one lccost reads"),
    ],
    ids=range(18),
)
def test_broken_files(tmp_path: Path, content: str | bytes, word: str) -> None:
    refuse(tmp_path, content, word)


def test_a_file_as_large_as_weights_is_not_read(tmp_path: Path) -> None:
    refuse(tmp_path, b" " * (5 * 1024 * 1024), "4,194,304")


def test_infinity_where_real_files_have_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(TEXT[:-1] + ', "time_step_limit": [0.0, Infinity]}', "utf-8")
    assert load_architecture(path).n_parameters == 8_030_261_248


@pytest.mark.parametrize(
    "value",
    [-1, 0, 1.5, True, "4096", "", [4096], {"x": 1}, 10**30, 10**400, float("nan"), float("inf"),
     -float("inf"), 1e30],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("key", sorted(set(GOOD) - {"model_type"}))
def test_wrong_values_name_the_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        architecture_from_config({**GOOD, key: value}, "some/config.json")
    assert key in str(error.value)
    assert "some/config.json" in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("key", sorted(set(GOOD) - {"model_type", "num_key_value_heads"}))
def test_missing_keys_are_named(key: str) -> None:
    config = {k: v for k, v in GOOD.items() if k != key}
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        architecture_from_config(config, "x")


def test_a_million_layers_are_refused_before_they_are_built() -> None:
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        architecture_from_config({**GOOD, "num_hidden_layers": 1_000_000}, "x")


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        architecture_from_config({**GOOD, "num_key_value_heads": 5}, "x")
    with pytest.raises(ConfigError, match="head_dim"):
        architecture_from_config(
            {**GOOD, "num_attention_heads": 33, "num_key_value_heads": 33}, "x"
        )


MOE = {**GOOD, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


def test_more_experts_per_token_than_experts() -> None:
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        architecture_from_config({**MOE, "num_experts_per_tok": 9}, "x")


@pytest.mark.parametrize(
    "types", ["full_attention", ["full_attention"], [1] * 32, [None] * 32, {"0": "full"}]
)
def test_layer_types_of_the_wrong_shape(types: object) -> None:
    config = {**GOOD, "model_type": "gpt_oss", **{"num_local_experts": 8, "sliding_window": 128}}
    config |= {"num_experts_per_tok": 2, "layer_types": types}
    with pytest.raises(ConfigError, match="layer_types"):
        architecture_from_config(config, "x")


def test_text_config_that_is_no_object() -> None:
    with pytest.raises(ConfigError, match="text_config"):
        architecture_from_config({**GOOD, "text_config": "llama"}, "x")


def test_control_characters_do_not_reach_the_terminal() -> None:
    with pytest.raises(ConfigError) as error:
        architecture_from_config({**GOOD, "model_type": "\x1b[2Jllama"}, "x")
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["", " ", "no/such/model", "a" * 100_000, "x\x00y", "/dev/zero", "/", "no_such_file.json",
     "./nowhere/config.json", "\x1b[31m", "../../../etc/passwd"],
    ids=range(11),
)  # fmt: skip
def test_names_that_are_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LccostError) as error:
        load_architecture(name)
    assert len(str(error.value)) < 1500
    assert "\x1b" not in str(error.value)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="regular file"):
        load_architecture(path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text(TEXT, "utf-8")

    def denied(_self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_architecture(path)

"""Spellings of engines and methods in published tables (``costmodel/data/table_names.toml``)."""

import functools
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from costmodel.architecture import Architecture
from costmodel.errors import ConfigError, LccostError, NotApplicableError, UnknownNameError
from costmodel.hardware import normalised
from costmodel.methods.parse import parse_method
from costmodel.registry import bundled_architecture, load_architecture, model_names
from costmodel.serving.engine_times import POOLED

#: What the name of a checkpoint that others stored in fewer bits ends in.
_STORED = re.compile(
    r"[-_](?:fp8|fp4|nvfp4|mxfp4|awq|gptq|int4|int8|w4a16|w8a8|w8a16|fp8-kv|dynamic|static|block)$"
)
#: GPUs of a server, before or after their name.
_HOW_MANY = re.compile(r"^\d{1,4}-?x-?|(?:-x-?|(?<=\d)x)\d{1,2}$")


@functools.cache
def _table() -> dict[str, list[tuple[re.Pattern[str], Mapping[str, Any]]]]:
    text = resources.files("costmodel").joinpath("data/table_names.toml").read_text("utf-8")
    document = tomllib.loads(text)
    return {
        kind: [(re.compile(row["pattern"]), row) for row in rows] for kind, rows in document.items()
    }


@functools.lru_cache(maxsize=4096)
def engine_named(spelling: str) -> str:
    """The engine a table means: one with runs of its own, else "any", whose parameters were fitted
    on the runs of all.
    """
    text = spelling.strip().lower()[:200]
    for pattern, row in _table()["engine"]:
        if pattern.search(text):
            return str(row["engine"])
    return POOLED


@functools.lru_cache(maxsize=4096)
def precision_named(spelling: str, column: str) -> str:
    """How weights are stored, as ``serving.stored`` names it; "" is the checkpoint's own way.

    Raises ``ConfigError``, naming the column, where no pattern fits.
    """
    text = normalised(spelling[:200])
    for pattern, row in _table()["precision"]:
        if pattern.search(text):
            return str(row["precision"])
    raise ConfigError(f"{column}: no storage format for {spelling[:40]!r}")


def gpu_assumed(spelling: str) -> str | None:
    """The bundled GPU that a table means by a name without form factor or with remarks; None for
    any other.
    """
    text = re.sub(_HOW_MANY, "", normalised(spelling[:200]))
    for pattern, row in _table()["gpu"]:
        found = pattern.search(text)
        if found:
            return _filled(row["gpu"], found)
    return None


def model_named(spelling: str) -> Architecture:
    """The bundled model that a table means; raises ``UnknownNameError``.

    A cell opens no file and asks no hub. Checkpoints that others stored in fewer bits, or trained
    further, are known by the model they came from.
    """
    found = _model(spelling.strip().lower()[:200])
    if isinstance(found, UnknownNameError):
        raise found.with_traceback(None)
    return found


@functools.lru_cache(maxsize=4096)
def _model(text: str) -> Architecture | UnknownNameError:
    for name in (text, text.rpartition("/")[2]):
        plain = name
        while plain:
            found = bundled_architecture(plain)
            if found is not None:
                return found
            shorter = re.sub(_STORED, "", plain)
            plain = shorter if shorter != plain else ""
        for pattern, row in _table()["model"]:
            matched = pattern.search(name)
            if matched:
                return load_architecture(_filled(str(row["model"]), matched))
    return UnknownNameError("model", text, model_names(), "See: lccost models list")


@functools.lru_cache(maxsize=65536)
def method_named(spelling: str, prompt_tokens: float) -> str:
    """The method a table means, in the grammar of ``--method``.

    A name in that grammar stands for itself. Budgets that a table gives in tokens become shares of
    the prompt. Raises ``ConfigError`` where no pattern fits, ``NotApplicableError`` where what ran
    cannot be priced from the row.
    """
    text = spelling.strip().lower()[:200]
    for pattern, row in _table()["method"]:
        found = pattern.search(text)
        if not found:
            continue
        if "unsupported" in row:
            raise NotApplicableError(str(row["unsupported"]))
        method = _filled(row["method"], found)
        shares = {
            name: min(1.0, float(_filled(value, found)) / prompt_tokens)
            for name, value in row.get("tokens", {}).items()
        } | {
            name: 1.0 - float(_filled(value, found))
            for name, value in row.get("complement", {}).items()
        }
        return _with(method, shares)
    try:
        parse_method(text)
    except LccostError:
        raise ConfigError(f"no method is known by the name {spelling[:60]!r}") from None
    return text


def _filled(template: str, found: re.Match[str]) -> str:
    """``template`` with {1}, {2}, ... replaced by the groups of a match."""
    return re.sub(r"\{(\d)\}", lambda m: found.group(int(m.group(1))) or "", template)


def _with(method: str, parameters: Mapping[str, float]) -> str:
    """Parameters added to the first method of a composition."""
    if not parameters:
        return method
    first, plus, rest = method.partition("+")
    given = ",".join(f"{name}={value:.6g}" for name, value in parameters.items())
    joined = f"{first},{given}" if ":" in first else f"{first}:{given}"
    return joined + plus + rest

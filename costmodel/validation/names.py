"""Spellings of engines and methods in published tables (``costmodel/data/table_names.toml``)."""

import functools
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from costmodel.errors import ConfigError, NotApplicableError
from costmodel.serving.engine_times import POOLED


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
    on the runs of all. ``ConfigError`` where the cell is empty.
    """
    text = spelling.strip().lower()[:200]
    if not text:
        raise ConfigError("the row does not name an engine")
    for pattern, row in _table()["engine"]:
        if pattern.search(text):
            return str(row["engine"])
    return POOLED


def gpu_assumed(spelling: str) -> str | None:
    """The bundled GPU that a table means by a name without form factor; None for any other."""
    text = spelling.strip().lower()[:200]
    for pattern, row in _table()["gpu"]:
        if pattern.search(text):
            return str(row["gpu"])
    return None


@functools.lru_cache(maxsize=65536)
def method_named(spelling: str, prompt_tokens: float) -> str:
    """The method a table means, in the grammar of ``--method``.

    Budgets that a table gives in tokens become shares of the prompt. Raises ``ConfigError`` where
    no pattern fits, ``NotApplicableError`` where the method cannot be priced from the row.
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
    raise ConfigError(f"no method is known by the name {spelling[:60]!r}")


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

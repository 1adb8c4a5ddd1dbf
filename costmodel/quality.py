"""What a method gives up in accuracy: published figures, each with its source, and nothing else.

Data: ``costmodel/data/quality/*.csv``, one file per source, whose first lines say where it is from.
A *drop* is baseline minus method, in points, on the same model in the same source; a figure for
another model, another setting or a longer context than was measured is no answer: unknown.
Different architectures stand side by side with absolute scores (rows of ``full``), never as a drop.

A row names its setting by parameters (all must agree), by the share of the prompt kept, or by the
number of tokens kept; budgets agree within ``_TOLERANCE``. Evidence reaches to ``_REACH`` times the
context it was taken at, and down to any shorter one; for a budget in tokens down to a quarter.
"""

import csv
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from costmodel.files import DATA

_TOLERANCE = 0.06
_REACH = 1.25
#: How much shorter than the evaluated inputs a prompt may be for a budget in tokens, which leaves
#: less out the shorter the prompt is.
_SHORTER = 4.0
#: Tasks of a family; "average" is what speaks for a method as a whole, the broadest first.
_FAMILIES = {
    "average": ("LongBench average", "RULER", "InfiniteBench average"),
    "retrieval": ("RULER", "passkey", "needle", "key-value retrieval", "synthetic", "MRCR"),
    "qa": ("single-document QA", "multi-document QA"),
    "summarization": ("summarization",),
    "few-shot": ("few-shot",),
    "code": ("code",),
    "reasoning": ("reasoning", "MATH-500", "GPQA"),
}
#: Share of the prompt that a benchmark preset keeps, for parameters that were not resolved yet.
_PRESETS = {"2x": 0.5, "4x": 0.25, "6x": 0.17, "8x": 0.125}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One published figure.

    model            bundled name; empty for a model that is not bundled
    evaluated        the model as the source names it
    parameters       method parameters of the setting, as text
    kept_fraction, kept_tokens  budget of the setting, where it has one
    context_tokens   longest input of the evaluation; for a fixed budget the usual input, because
                     what a budget costs depends on what it leaves out
    baseline, value  score of the full cache and of the method; without a baseline the score
                     stands alone
    comparable       "yes": baseline and value come from one harness and one prompt;
                     "no": shown, never used as a drop; "exact": lossless by construction
    confidence       who says so: authors, paper, a secondary reading
    """

    method: str
    model: str
    evaluated: str
    parameters: Mapping[str, str]
    kept_fraction: float | None
    kept_tokens: float | None
    context_tokens: float | None
    task: str
    metric: str
    baseline: float | None
    value: float | None
    comparable: str
    confidence: str
    note: str
    source: str
    url: str
    harness: str

    @property
    def drop(self) -> float | None:
        """Points lost: baseline minus value where the two are comparable, else None."""
        if self.comparable != "yes" or self.baseline is None or self.value is None:
            return None
        return round(self.baseline - self.value, 2)

    @property
    def setting(self) -> str:
        """The setting in words."""
        parts = [f"{k}={v}" for k, v in self.parameters.items()]
        if self.kept_fraction is not None:
            parts.append(f"{self.kept_fraction:.4g} of the prompt kept")
        if self.kept_tokens is not None:
            parts.append(f"{self.kept_tokens:,.0f} tokens kept")
        return ", ".join(parts) or "-"


def evidence(method: str) -> list[dict[str, Any]]:
    """Every figure for a method, for listings; empty when there is none."""
    return [
        {
            "model": row.evaluated or "any",
            "setting": row.setting,
            "task": row.task,
            "context": row.context_tokens and int(row.context_tokens),
            "metric": row.metric,
            "baseline": row.baseline,
            "value": row.value,
            "drop": 0.0 if row.comparable == "exact" else row.drop,
            "source": row.source,
            "url": row.url,
            "confidence": row.confidence,
            "note": row.note,
        }
        for row in rows(method)
    ]


def scores(architecture_name: str) -> list[dict[str, Any]]:
    """Absolute scores of an uncompressed model: what different architectures are compared by."""
    name = _bare(architecture_name)
    return [
        {
            "model": row.evaluated,
            "task": row.task,
            "context": row.context_tokens and int(row.context_tokens),
            "metric": row.metric,
            "value": row.value,
            "source": row.source,
            "note": row.note,
        }
        for row in rows("full")
        if row.value is not None and name in (row.model, _bare(row.evaluated))
    ]


def task_families() -> tuple[str, ...]:
    """What ``task_family`` may be: the families, and every single task with a figure."""
    tasks: set[str] = set()
    for _, head, by_method in _sources():
        for lines in by_method.values():
            tasks |= {row["task"] for row in csv.DictReader([head, *lines])}
    return (*_FAMILIES, *sorted(tasks - set(_FAMILIES)))


def accuracy(
    architecture_name: str,
    method_name: str,
    parameters: Mapping[str, Any],
    context: float,
    *,
    task_family: str = "average",
) -> tuple[float | None, str]:
    """(points lost, source); (None, why it is unknown) where nobody measured this setting.

    ``parameters`` are the method's, resolved or with a preset; ``context`` the prompt's tokens.
    """
    parts = [p for p in method_name.split("+") if not _exact(p)]
    if not parts:
        return 0.0, _exact(method_name.split("+")[0])
    if len(parts) > 1:
        return None, f"unknown: the combination {method_name} was not measured"
    if method_name != parts[0]:
        method_name, parameters = parts[0], parameters[parts[0]]
    budget = kept_tokens(parameters, context)
    if budget is not None and budget >= context:
        return 0.0, "the budget holds the whole context"
    name = _bare(architecture_name)
    tasks = _FAMILIES.get(task_family, (task_family,))
    found = _comparable(method_name, tasks)
    if not found:
        return None, f"unknown: no comparable {task_family} figure for {method_name}"
    matches = [row for row in found if name in (row.model, _bare(row.evaluated))]
    if not matches:
        return None, f"unknown: {method_name} was not measured on {architecture_name}"
    matches = [row for row in matches if _same_setting(row, parameters, budget, context)]
    if not matches:
        return None, f"unknown: {method_name} was not measured with this setting on {name}"
    reaching = [row for row in matches if _reaches(row, context)]
    if not reaching:
        end = max(row.context_tokens or 0.0 for row in matches)
        side = "ends at" if end * _REACH < context else "starts near"
        if side == "starts near":
            end = min(row.context_tokens or 0.0 for row in matches) / _SHORTER
        return None, f"unknown at {context:,.0f} tokens: evidence {side} {end:,.0f}"
    best = min(
        reaching,
        key=lambda row: (_rank(row, tasks), abs(math.log((row.context_tokens or 1.0) / context))),
    )
    note = f" ({best.note})" if best.note else ""
    return best.drop, (
        f"{best.source}: {best.task} of {best.evaluated}, {best.setting}, inputs of up to or about "
        f"{best.context_tokens:,.0f} tokens, {best.baseline:g} -> {best.value:g}{note}"
    )


@functools.cache
def _comparable(method: str, tasks: tuple[str, ...]) -> tuple[Evidence, ...]:
    """Figures of these tasks that are a drop."""
    return tuple(r for r in rows(method) if r.drop is not None and _rank(r, tasks) is not None)


def _exact(method: str) -> str:
    """Why a method loses nothing, for those that are lossless by construction; else empty."""
    return next((row.note for row in _rows(method, ",exact,") if row.comparable == "exact"), "")


def kept_tokens(parameters: Mapping[str, Any], context: float) -> float | None:
    """Tokens of the prompt that a budget keeps or attends; None where every token stays."""
    p = parameters
    if p.get("preset") in _PRESETS:
        return _PRESETS[p["preset"]] * context
    share = p.get("rate", p.get("kept_fraction"))
    if share is not None:
        return float(share) * context
    if "heavy_fraction" in p:
        return (float(p["heavy_fraction"]) + float(p["recent_fraction"])) * context
    if "local_tokens" in p:
        return float(p["init_tokens"] + p["local_tokens"] + p["topk"] * p["block_tokens"])
    if "sink_tokens" in p:
        return float(p["sink_tokens"] + p["window_tokens"])
    return float(p["keep_tokens"]) if "keep_tokens" in p else None


def _same_setting(
    row: Evidence, parameters: Mapping[str, Any], budget: float | None, context: float
) -> bool:
    for key, text in row.parameters.items():
        value = parameters.get(key)
        if not isinstance(value, int | float) or not math.isclose(value, float(text)):
            return False
    wanted = row.kept_tokens
    if row.kept_fraction is not None:
        wanted = row.kept_fraction * context
    if wanted is None:
        return bool(row.parameters)
    return budget is not None and abs(budget / wanted - 1) <= _TOLERANCE


def _reaches(row: Evidence, context: float) -> bool:
    measured = row.context_tokens or 0.0
    long_enough = row.kept_tokens is None or context * _SHORTER >= measured
    return long_enough and measured * _REACH >= context


def _rank(row: Evidence, tasks: tuple[str, ...]) -> int | None:
    """Place of the row's task among those asked for; None when it is not one of them."""
    return next((i for i, task in enumerate(tasks) if row.task.startswith(task)), None)


def _bare(name: str) -> str:
    return name.strip().lower().rsplit("/", 1)[-1]


# Reading -------------------------------------------------------------------------------------


def rows(method: str) -> tuple[Evidence, ...]:
    """Every figure for a method, in file order."""
    return _rows(method, "")


@functools.cache
def _rows(method: str, holding: str) -> tuple[Evidence, ...]:
    """Those whose lines hold a text."""
    out = []
    for meta, head, by_method in _sources():
        wanted = [line for line in by_method.get(method, ()) if holding in line]
        out += [_evidence(row, meta) for row in csv.DictReader([head, *wanted])]
    return tuple(out)


@functools.cache
def _sources() -> tuple[tuple[dict[str, str], str, dict[str, list[str]]], ...]:
    """Of every file what its first lines say, the heading, and the lines of each method."""
    out = []
    for lines in _files():
        told = [line for line in lines if line.startswith("#")]
        head, *body = (line for line in lines if not line.startswith("#"))
        by_method: dict[str, list[str]] = {}
        for line in body:
            by_method.setdefault(line.partition(",")[0], []).append(line)
        meta = dict(line[2:].split(": ", 1) for line in told if line.startswith("# "))
        out.append((meta, head, by_method))
    return tuple(out)


@functools.cache
def _files() -> tuple[list[str], ...]:
    folder = DATA / "quality"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".csv")), key=lambda f: f.name)
    return tuple(f.read_text("utf-8").splitlines() for f in files)


def _evidence(row: Mapping[str, str], meta: Mapping[str, str]) -> Evidence:
    def number(key: str) -> float | None:
        return float(row[key]) if row[key] else None

    pairs = (piece.split("=", 1) for piece in row["parameters"].split(";") if piece)
    return Evidence(
        method=row["method"],
        model=row["model"],
        evaluated=row["evaluated"],
        parameters=dict(pairs),
        kept_fraction=number("kept_fraction"),
        kept_tokens=number("kept_tokens"),
        context_tokens=number("context_tokens"),
        task=row["task"],
        metric=row["metric"],
        baseline=number("baseline"),
        value=number("value"),
        comparable=row["comparable"],
        confidence=row["confidence"],
        note=row["note"],
        source=meta["source"],
        url=meta.get("url", ""),
        harness=meta["harness"],
    )

"""What lccost knows of methods, as rows and as text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from costmodel.architecture import Architecture
from costmodel.engines import load_engine
from costmodel.errors import ConfigError
from costmodel.methods import method_class, method_names
from costmodel.methods.parse import parse_methods
from costmodel.quality import evidence
from costmodel.registry import load_architecture
from costmodel.units import format_bytes
from costmodel.workload import Point
from lccost.catalogue_table import Columns, is_summary, joined, render, text

METHOD_COLUMNS: Columns = {
    "name": ("method", text),
    "title": ("what it is", text),
    "acts": ("acts", text),
    "parameters": ("parameters", lambda p: ", ".join(f"{k}={v}" for k, v in p.items()) or "-"),
    "reference": ("reference", text),
}


def method_rows() -> list[dict[str, Any]]:
    """One row per method."""
    rows = []
    for name in method_names():
        cls = method_class(name)
        method = cls()
        rows.append(
            {
                "name": name,
                "title": cls.TITLE,
                "acts": cls.ACTS,
                "stages": sorted(cls.STAGES),
                "parameters": {k: v for k, v in method.parameters.items() if v is not None},
                "reference": cls.REFERENCE,
            }
        )
    return rows


def method_details(spec: str, model: str, context: int) -> dict[str, Any]:
    """Everything about one method, with its numbers on a model at a context."""
    stacks = parse_methods([spec])
    if len(stacks) != 1 or len(stacks[0].methods) != 1:
        raise ConfigError(f"methods show: expected one method, got {spec!r}")
    stack = stacks[0]
    method, cls = stack.methods[0], type(stack.methods[0])
    architecture = load_architecture(model)
    refusal = stack.refusal(architecture)
    state = None if refusal else _state(stack, architecture, context)
    full = _state(parse_methods(["full"])[0], architecture, context)
    return {
        "name": method.NAME,
        "spec": stack.spec,
        "title": cls.TITLE,
        "reference": cls.REFERENCE,
        "acts": cls.ACTS,
        "stages": sorted(cls.STAGES),
        "parameters": {
            k: {"value": v, "meaning": cls.PARAMETERS.get(k, "")}
            for k, v in method.parameters.items()
        },
        "state_formula": cls.STATE_FORMULA,
        "example": {
            "model": architecture.name,
            "context_tokens": context,
            "not_applicable": refusal,
            "resolved": stack.resolved(context).parameters,
            "symbols": _symbols(architecture, context),
            "state_bytes": state and state[0],
            "state_host_bytes": state and state[1],
            "full_state_bytes": full[0],
        },
        "does_not_save": cls.DOES_NOT_SAVE,
        "realised_by": list(cls.REALISED_BY),
        "evidence": evidence(method.NAME),
    }


def _symbols(architecture: Architecture, context: int) -> dict[str, Any]:
    from costmodel.mixers import Attention

    group = next((g for g in architecture.mixer_groups if isinstance(g.mixer, Attention)), None)
    symbols: dict[str, Any] = {"B": 1, "T": context}
    if group is not None and isinstance(group.mixer, Attention):
        m = group.mixer
        symbols |= {
            "L": group.n_layers,
            "N": m.n_heads,
            "K": m.n_kv_heads,
            "Hk": m.head_dim,
            "Hv": m.v_head_dim,
            "b": 2,
        }
    return symbols


def _state(stack: Any, architecture: Architecture, context: int) -> tuple[int, int]:
    tokens = np.float64(stack.prompt_tokens(np.float64(context)))
    point = Point(
        batch=np.float64(1),
        prompt_tokens=tokens,
        cached_tokens=tokens,
        reserved_tokens=tokens,
        dtype="bf16",
        kv_dtype="bf16",
        level="ideal",
        engine=load_engine("vllm"),
    )
    states = [stack.state(g, point) for g in architecture.mixer_groups]
    return round(float(sum(s.device for s in states))), round(float(sum(s.host for s in states)))


def method_text(shown: Mapping[str, Any]) -> str:
    """The screen of ``lccost methods show``."""
    e = shown["example"]
    lines = [
        f"{shown['spec']}: {shown['title']}",
        f"  {shown['reference']}",
        f"  acts: {shown['acts']} (stages: {joined(shown['stages'])})",
        "",
        "Parameters",
    ]
    for name, p in shown["parameters"].items():
        lines.append(f"  {name} = {p['value']}    {p['meaning']}")
    if not shown["parameters"]:
        lines.append("  none")
    lines += ["", f"State   {shown['state_formula']}"]
    if e["not_applicable"]:
        lines.append(f"  {e['not_applicable']}")
    else:
        symbols = ", ".join(f"{k} = {v:,}" for k, v in e["symbols"].items())
        on_host = e["state_host_bytes"]
        host = f" + {format_bytes(on_host)} on the host" if on_host else ""
        full = e["full_state_bytes"]
        lines += [
            f"  {e['model']} with {symbols}:",
            f"  = {e['state_bytes']:,} bytes ({format_bytes(e['state_bytes'])}){host}; "
            f"full attention {full:,} bytes ({format_bytes(full)})"
            + (
                f", {e['full_state_bytes'] / e['state_bytes']:.2f} x smaller"
                if e["state_bytes"] and e["full_state_bytes"] > e["state_bytes"]
                else ""
            ),
        ]
        resolved = {k: v for k, v in e["resolved"].items() if v is not None}
        if resolved:
            lines.append("  with " + ", ".join(f"{k}={v}" for k, v in resolved.items()))
    lines += ["", f"Does not save  {shown['does_not_save']}"]
    lines += [f"Realised by    {joined(shown['realised_by'])}", "", "Accuracy evidence"]
    parts: list[Any] = ["\n".join(lines)]
    rows = shown["evidence"]
    if rows:
        main = [r for r in rows if is_summary(str(r["task"]))] or rows
        sources = list(dict.fromkeys(str(r["source"]) for r in main))
        parts.append(_evidence_table(main, sources))
        parts += [f"  [{i}] {source}" for i, source in enumerate(sources, start=1)]
        hidden = len(rows) - len(main)
        parts.append(
            "  drop = baseline minus method, in points, within one source and harness; models of "
            "different architecture are compared by score, never by drop."
            + (f" {hidden} rows of single tasks: --format json." if hidden else "")
        )
    else:
        parts.append("  unknown: no published figure is bundled for this method")
    return render(*parts)


def _evidence_table(rows: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    keys = ("model", "setting", "task", "context", "metric", "baseline", "value", "drop")
    for key in keys:
        out.add_column(key, overflow="fold")
    out.add_column("source")
    for row in rows:
        out.add_row(
            *("-" if row.get(k) is None else str(row[k]) for k in keys),
            f"[{sources.index(str(row['source'])) + 1}]",
        )
    return out

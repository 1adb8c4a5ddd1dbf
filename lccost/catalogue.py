"""What lccost knows, as rows and as text: methods, models, GPUs."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from costmodel.architecture import Architecture
from costmodel.engines import load_engine
from costmodel.errors import ConfigError
from costmodel.hardware import gpu_names, load_hardware
from costmodel.methods import method_class, method_names
from costmodel.methods.parse import parse_methods
from costmodel.mlps import MoE
from costmodel.quality import evidence, scores
from costmodel.registry import load_architecture, model_names
from costmodel.units import format_bytes, format_si
from costmodel.workload import Point
from lccost.show import console

Columns = dict[str, tuple[str, Callable[[Any], str]]]


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _joined(value: Sequence[str]) -> str:
    return ", ".join(value) or "-"


METHOD_COLUMNS: Columns = {
    "name": ("method", _text),
    "title": ("what it is", _text),
    "acts": ("acts", _text),
    "parameters": ("parameters", lambda p: ", ".join(f"{k}={v}" for k, v in p.items()) or "-"),
    "reference": ("reference", _text),
}
MODEL_COLUMNS: Columns = {
    "name": ("model", _text),
    "family": ("family", _text),
    "n_parameters": ("parameters", lambda n: format_si(float(n), "").strip()),
    "n_active_parameters": ("active", lambda n: format_si(float(n), "").strip()),
    "layers": ("layers", _text),
    "kv_bytes_per_token": ("KV per token", format_bytes),
    "bounded_kv_bytes": ("bounded KV", format_bytes),
    "fixed_state_bytes": ("fixed state", format_bytes),
    "confidence": ("confidence", lambda c: str(c).partition(":")[0]),
}
GPU_COLUMNS: Columns = {
    "name": ("gpu", _text),
    "title": ("device", _text),
    "bf16": ("bf16", lambda v: format_si(v, "FLOP/s")),
    "fp8": ("fp8", lambda v: format_si(v, "FLOP/s")),
    "hbm_bytes_per_s": ("bandwidth", lambda v: format_si(v, "B/s")),
    "memory_bytes": ("memory", format_bytes),
    "tdp_w": ("power", lambda v: "-" if v is None else f"{v:.0f} W"),
    "price_usd_per_hour": (
        "USD/h (low-high)",
        lambda p: "-" if p is None else f"{p[1]:.2f} ({p[0]:.2f}-{p[2]:.2f})",
    ),
}


def table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    """A plain table of rows."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, _ in columns.values():
        out.add_column(title, overflow="fold")
    for row in rows:
        out.add_row(*(show(row[key]) for key, (_, show) in columns.items()))
    return _render(out)


def _render(*parts: Any) -> str:
    file = io.StringIO()
    out = console(file)
    for part in parts:
        out.print(part)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


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
        f"  acts: {shown['acts']} (stages: {_joined(shown['stages'])})",
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
    lines += [f"Realised by    {_joined(shown['realised_by'])}", "", "Accuracy evidence"]
    parts: list[Any] = ["\n".join(lines)]
    rows = shown["evidence"]
    if rows:
        main = [r for r in rows if _is_summary(str(r["task"]))] or rows
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
    return _render(*parts)


def _is_summary(task: str) -> bool:
    """Averages and retrieval tests; single tasks of a benchmark are in the JSON form."""
    return any(word in task.lower() for word in ("average", "needle", "passkey", "ruler"))


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


def model_rows() -> list[dict[str, Any]]:
    """One row per bundled model."""
    return [_model_row(load_architecture(name)) for name in model_names()]


def _model_row(a: Architecture) -> dict[str, Any]:
    per_token = bounded = fixed = 0.0
    point = Point(
        batch=np.float64(1),
        prompt_tokens=np.float64(2**20),
        cached_tokens=np.float64(2**20),
        reserved_tokens=np.float64(2**20),
        dtype="bf16",
        kv_dtype="bf16",
        level="ideal",
        engine=load_engine("vllm"),
    )
    for g in a.mixer_groups:
        if not g.mixer.HAS_KV:
            fixed += g.n_layers * float(g.mixer.state_bytes(point))
        elif g.mixer.max_kv_tokens() is None:
            per_token += g.n_layers * g.mixer.kv_elements_per_token() * 2
        else:
            bounded += g.n_layers * float(g.mixer.state_bytes(point))
    return {
        "name": a.name,
        "hub_id": a.hub_id,
        "family": a.family,
        "n_parameters": a.n_parameters,
        "n_active_parameters": a.n_active_parameters,
        "layers": a.n_layers,
        "kv_bytes_per_token": round(per_token),
        "bounded_kv_bytes": round(bounded),
        "fixed_state_bytes": round(fixed),
        "max_context_tokens": a.max_context_tokens,
        "confidence": a.confidence,
        "source": a.source,
    }


def model_details(name: str, assume: str | None) -> dict[str, Any]:
    """One model with its layer kinds."""
    a = load_architecture(name, assume=assume)
    row = _model_row(a)
    row["mixers"] = [
        {
            "kind": g.mixer.KIND,
            "layers": g.n_layers,
            "description": _describe(g.mixer),
            "kv_elements_per_token": g.mixer.kv_elements_per_token(),
            "max_kv_tokens": g.mixer.max_kv_tokens(),
        }
        for g in a.mixer_groups
    ]
    row["mlps"] = [
        {"kind": "moe" if isinstance(m, MoE) else "dense", "layers": n, "description": _describe(m)}
        for m, n in a.mlp_groups
    ]
    row["scores"] = scores(a.name)
    row["assumed"] = a.assumed
    row["notes"] = list(a.notes)
    return row


def _describe(part: Any) -> str:
    """Class name and every field that is not at its default."""
    shown = [
        f"{f.name}={getattr(part, f.name)}"
        for f in fields(part)
        if f.default is MISSING or getattr(part, f.name) != f.default
    ]
    return f"{type(part).__name__}({', '.join(shown)})"


def model_text(shown: Mapping[str, Any]) -> str:
    """The screen of ``lccost models show``."""
    lines = [
        f"{shown['name']} ({shown['hub_id']}, {shown['family']})",
        f"  parameters {shown['n_parameters']:,}, active {shown['n_active_parameters']:,}",
        f"  KV cache {shown['kv_bytes_per_token']:,} bytes per token in 16 bits while it grows"
        f" + {format_bytes(shown['bounded_kv_bytes'])} in bounded windows"
        f" + {format_bytes(shown['fixed_state_bytes'])} fixed state, per sequence",
        "",
        f"{shown['layers']} layers",
    ]
    parts = (*shown["mixers"], *shown["mlps"])
    lines += [f"  {m['layers']:>3} x {m['description']}" for m in parts]
    lines += ["", f"source      {shown['source']}", f"confidence  {shown['confidence']}"]
    lines += [
        f"score       {s['task']} {s['value']:g} with inputs of about {s['context'] or 0:,} tokens "
        f"({s['source']})"
        for s in shown["scores"]
        if _is_summary(str(s["task"]))
    ]
    lines += [f"note        {n}" for n in shown["notes"]]
    if shown["assumed"]:
        lines.append("note        read as this family because --assume says so")
    return "\n".join(lines) + "\n"


def gpu_rows() -> list[dict[str, Any]]:
    """One row per bundled profile."""
    return [_gpu_row(name) for name in gpu_names()]


def _gpu_row(name: str) -> dict[str, Any]:
    h = load_hardware(name)
    peaks = dict(h.peak_flops_per_s)
    return {
        "name": h.name,
        "title": h.title,
        "vendor": h.vendor,
        "generation": h.generation,
        "bf16": peaks.get("bf16"),
        "fp8": peaks.get("fp8"),
        "peak_flops_per_s": peaks,
        "n_units": h.n_units,
        "hbm_bytes_per_s": h.hbm_bytes_per_s,
        "memory_bytes": h.memory_bytes,
        "memory_marketing_bytes": h.memory_marketing_bytes,
        "l2_bytes": h.l2_bytes,
        "tdp_w": h.tdp_w,
        "link_bytes_per_s": h.link_bytes_per_s,
        "host_link_bytes_per_s": h.host_link_bytes_per_s,
        "price_usd_per_hour": h.price_usd_per_hour and list(h.price_usd_per_hour),
        "price_date": h.price_date,
    }


def gpu_details(name: str) -> dict[str, Any]:
    """One profile with sources and confidence."""
    h = load_hardware(name)
    return {
        **_gpu_row(name),
        "sources": dict(h.sources),
        "confidence": dict(h.confidence),
        "notes": list(h.notes),
    }


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value == round(value) else f"{value:,}"
    return _text(value)


def gpu_text(shown: Mapping[str, Any]) -> str:
    """The screen of ``lccost gpus show``."""
    lines = [f"{shown['name']}: {shown['title']} ({shown['generation']})", ""]
    for key, value in shown.items():
        if key in ("name", "title", "sources", "confidence", "notes", "bf16", "fp8"):
            continue
        source = shown["sources"].get(key, "")
        sure = shown["confidence"].get(key, "")
        text = (
            ", ".join(f"{k} {format_si(v, 'FLOP/s')}" for k, v in value.items())
            if isinstance(value, dict)
            else _number(value)
        )
        lines.append(f"{key:24} {text}" + (f"    [{sure}] {source}" if source else ""))
    lines += [f"note: {n}" for n in shown["notes"]]
    return "\n".join(lines) + "\n"

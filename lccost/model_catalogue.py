"""What lccost knows of bundled models, as rows and as text."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from costmodel.architecture import Architecture
from costmodel.engines import load_engine
from costmodel.mlps import MoE
from costmodel.quality import scores
from costmodel.registry import load_architecture, model_names
from costmodel.units import format_bytes, format_si
from costmodel.workload import Point
from lccost.catalogue_table import Columns, is_summary, text

MODEL_COLUMNS: Columns = {
    "name": ("model", text),
    "family": ("family", text),
    "n_parameters": ("parameters", lambda n: format_si(float(n), "").strip()),
    "n_active_parameters": ("active", lambda n: format_si(float(n), "").strip()),
    "layers": ("layers", text),
    "kv_bytes_per_token": ("KV per token", format_bytes),
    "bounded_kv_bytes": ("bounded KV", format_bytes),
    "fixed_state_bytes": ("fixed state", format_bytes),
    "confidence": ("confidence", lambda c: str(c).partition(":")[0]),
}


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
        if is_summary(str(s["task"]))
    ]
    lines += [f"note        {n}" for n in shown["notes"]]
    if shown["assumed"]:
        lines.append("note        read as this family because --assume says so")
    return "\n".join(lines) + "\n"

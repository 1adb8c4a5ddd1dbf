"""What lccost knows of GPU profiles, as rows and as text."""

from collections.abc import Mapping
from typing import Any

from costmodel.hardware import gpu_names, load_hardware
from costmodel.units import format_bytes, format_si
from lccost.catalogue_table import Columns, text

GPU_COLUMNS: Columns = {
    "name": ("gpu", text),
    "title": ("device", text),
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
    return text(value)


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

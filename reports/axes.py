"""What an axis of a metric says: its words, its unit, and how its ticks read."""

from collections.abc import Callable
from dataclasses import dataclass

from costmodel.units import format_bytes, format_seconds, format_si


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisText:
    """``title`` in headings, ``label`` on the axis (with its unit), ``format`` for ticks."""

    title: str
    label: str
    format: Callable[[float], str]
    #: the same number, as the interactive charts write it: "s", "B", "" ...
    unit: str
    lower_is_better: bool = True


def _plain(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1e5 else format_si(value, "").strip()


def _bytes(value: float) -> str:
    return format_bytes(value).replace(".00 ", " ")


def _usd(value: float) -> str:
    return f"${value:,.3g}" if value < 1000 else f"${value:,.0f}"


AXES = {
    "ttft_s": AxisText(title="TTFT", label="TTFT (s)", format=format_seconds, unit="s"),
    "tpot_s": AxisText(title="TPOT", label="TPOT (s per token)", format=format_seconds, unit="s"),
    "tokens_per_s": AxisText(
        title="Throughput",
        label="throughput (output tokens per s)",
        format=_plain,
        unit="tokens/s",
        lower_is_better=False,
    ),
    "energy_j_per_token": AxisText(
        title="Energy",
        label="energy in decode (J per token)",
        format=lambda v: format_si(v, "J"),
        unit="J",
    ),
    "usd_per_million_output_tokens": AxisText(
        title="Cost",
        label="cost (US$ per million output tokens)",
        format=_usd,
        unit="US$",
    ),
    "max_batch": AxisText(
        title="Sequences that fit",
        label="most sequences at once (count)",
        format=_plain,
        unit="sequences",
        lower_is_better=False,
    ),
    "max_context_tokens": AxisText(
        title="Longest context",
        label="longest context that fits (tokens)",
        format=_plain,
        unit="tokens",
        lower_is_better=False,
    ),
    "state_bytes": AxisText(
        title="State", label="state on the device (bytes)", format=_bytes, unit="B"
    ),
    "state_host_bytes": AxisText(
        title="Host state", label="state in host memory (bytes)", format=_bytes, unit="B"
    ),
    "weights_bytes": AxisText(title="Weights", label="weights (bytes)", format=_bytes, unit="B"),
    "peak_bytes": AxisText(
        title="Peak memory", label="peak memory per device (bytes)", format=_bytes, unit="B"
    ),
    "peak_prefill_bytes": AxisText(
        title="Peak of prefill", label="peak of prefill (bytes)", format=_bytes, unit="B"
    ),
    "peak_decode_bytes": AxisText(
        title="Peak of decode", label="peak of decode (bytes)", format=_bytes, unit="B"
    ),
    "executed_prefill_flops": AxisText(
        title="Executed FLOPs of prefill",
        label="executed in prefill (FLOP)",
        format=lambda v: format_si(v, "FLOP"),
        unit="FLOP",
    ),
    "executed_decode_flops": AxisText(
        title="Executed FLOPs of decode",
        label="executed in a decode step (FLOP)",
        format=lambda v: format_si(v, "FLOP"),
        unit="FLOP",
    ),
}

"""The ranked table: one row a point and method, predicted and observed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from costmodel.units import format_bytes, format_seconds
from reports.axes import AXES
from reports.labels import percent, safe_text, tokens
from reports.ranking import Ranked, value_of
from reports.tables import Column, Table

_KEEP_ALWAYS = frozenset({"rank", "method_spec", "context_tokens", "tpot_s", "ttft_s"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Field:
    """A column: how its value is found and how it reads."""

    name: str
    title: str
    value: Callable[[Ranked], Any]
    text: Callable[[Any], str]
    is_number: bool = True


def point_rows(ranked: Sequence[Ranked]) -> Table:
    """The ranked table; row n is about ``ranked[n]``.

    Columns in which every row says the same are not columns: a note says it once.
    """
    rows = [[f.value(r) for f in _FIELDS] for r in ranked]
    shown, notes = [], []
    for n, f in enumerate(_FIELDS):
        values = [row[n] for row in rows]
        if f.name in _KEEP_ALWAYS:
            shown.append(n)
        elif all(v is None or v == "" for v in values):
            continue
        elif len(values) > 1 and len({str(v) for v in values}) == 1:
            notes.append(f"{f.title}: {f.text(values[0])}")
        else:
            shown.append(n)
    ranked_by = dict.fromkeys(AXES[r.metric].title for r in ranked)
    by = f"Ranked by {', '.join(ranked_by)} within each context." if ranked_by else ""
    return Table(
        title="Methods",
        columns=tuple(
            Column(name=_FIELDS[n].name, title=_FIELDS[n].title, is_number=_FIELDS[n].is_number)
            for n in shown
        ),
        values=tuple(tuple(row[n] for n in shown) for row in rows),
        texts=tuple(
            tuple("-" if row[n] is None else _FIELDS[n].text(row[n]) for n in shown) for row in rows
        ),
        notes=tuple(text for text in (by, "; ".join(notes)) if text),
    )


def _key(name: str) -> Callable[[Ranked], Any]:
    return lambda r: r.pair.key.text(name) or None


def _count(name: str) -> Callable[[Ranked], Any]:
    return lambda r: r.pair.key.number(name)


def _predicted(name: str) -> Callable[[Ranked], Any]:
    return lambda r: r.pair.value(name, "predicted")


def _observed(name: str) -> Callable[[Ranked], Any]:
    return lambda r: r.pair.value(name, "observed")


def _predicted_text(name: str) -> Callable[[Ranked], Any]:
    return lambda r: None if r.pair.predicted is None else r.pair.predicted.text(name) or None


def _either(name: str) -> Callable[[Ranked], Any]:
    return lambda r: value_of(r.pair, name)


def _fits(r: Ranked) -> str | None:
    fits = None if r.pair.predicted is None else r.pair.predicted.values.get("fits")
    return {True: "yes", False: "no"}.get(fits) if isinstance(fits, bool) else None


def _error(name: str) -> Callable[[Ranked], Any]:
    def value(r: Ranked) -> float | None:
        predicted, observed = r.pair.value(name, "predicted"), r.pair.value(name, "observed")
        if predicted is None or not observed:
            return None
        return 100.0 * (predicted - observed) / observed

    return value


def _status(r: Ranked) -> str | None:
    if "status" not in r.pair.key.values:
        return None
    return "noisy" if r.pair.is_noisy else r.pair.key.status


def _short(text: Any) -> str:
    return safe_text(str(text), 40)


def _signed(value: float) -> str:
    return percent(value, signed=True)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _text(name: str, title: str, value: Callable[[Ranked], Any]) -> _Field:
    return _Field(name=name, title=title, value=value, text=_short, is_number=False)


def _metric(name: str, title: str) -> _Field:
    return _Field(name=name, title=title, value=_predicted(name), text=AXES[name].format)


_FIELDS = (
    # What is ranked, and by what, stands first: the rest may need scrolling.
    _Field(name="rank", title="rank", value=lambda r: r.rank, text=_whole),
    _text("method_spec", "method", _key("method_spec")),
    _text("level", "level", _key("level")),
    _text("model", "model", _key("model")),
    _text("gpu", "device", lambda r: r.pair.key.device or None),
    _Field(name="context_tokens", title="context", value=_count("context_tokens"), text=tokens),
    _Field(name="batch", title="batch", value=_count("batch"), text=_whole),
    _metric("usd_per_million_output_tokens", "US$/M tokens"),
    _Field(
        name="accuracy_drop_points",
        title="accuracy lost",
        value=_predicted("accuracy_drop_points"),
        text=lambda v: f"{v:.3g}",
    ),
    _Field(name="ttft_s", title="TTFT", value=_predicted("ttft_s"), text=format_seconds),
    _Field(
        name="observed_ttft_s",
        title="TTFT observed",
        value=_observed("ttft_s"),
        text=format_seconds,
    ),
    _Field(name="ttft_error", title="TTFT error", value=_error("ttft_s"), text=_signed),
    _Field(name="tpot_s", title="TPOT", value=_predicted("tpot_s"), text=format_seconds),
    _Field(
        name="observed_tpot_s",
        title="TPOT observed",
        value=_observed("tpot_s"),
        text=format_seconds,
    ),
    _Field(name="tpot_error", title="TPOT error", value=_error("tpot_s"), text=_signed),
    _Field(name="state_bytes", title="state", value=_either("state_bytes"), text=format_bytes),
    _Field(name="peak_bytes", title="peak", value=_either("peak_bytes"), text=format_bytes),
    _text("fits", "fits", _fits),
    _metric("max_batch", "sequences"),
    _text("decode_bound", "decode bound", _predicted_text("decode_bound")),
    _text("prefill_bound", "prefill bound", _predicted_text("prefill_bound")),
    _metric("tokens_per_s", "tokens/s"),
    _metric("energy_j_per_token", "energy/token"),
    _text("engine", "engine", _key("engine")),
    _text("dtype", "dtype", _key("dtype")),
    _text("weight_dtype", "weights as", _key("weight_dtype")),
    _Field(name="tp", title="TP", value=_count("tp"), text=_whole),
    _Field(name="layers", title="layers", value=_count("layers"), text=_whole),
    _Field(name="output_tokens", title="output", value=_count("output_tokens"), text=tokens),
    _text("basis", "basis", _predicted_text("basis")),
    _text("status", "status", _status),
)

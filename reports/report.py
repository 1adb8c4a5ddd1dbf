"""What a report says, before anything is rendered: a pure function of the records.

Every output (page, Markdown, PDF, spreadsheet, JSON) shows the tables and texts made here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from costmodel.hardware import HardwareProfile
from reports.axes import AXES
from reports.comparison import Comparison, Pair, Predict, compare
from reports.labels import percent, safe_text
from reports.ranking import known_accuracy, margins, rank, verdict
from reports.records import Records
from reports.report_tables import (
    accuracy_table,
    break_even_table,
    left_out_table,
    provenance_table,
    reproduce_table,
    sensitivity_table,
    validation_table,
)
from reports.tables import Table, error_table
from reports.tabulate import point_rows


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Report:
    """Everything a report shows, in the order it is shown."""

    title: str
    verdict: str
    remarks: tuple[str, ...]
    comparison: Comparison
    hardware: tuple[HardwareProfile, ...]
    ranking: Table
    errors: Table
    validation: Table
    break_even: Table
    sensitivity: Table
    accuracy: Table
    assumptions: tuple[str, ...]
    provenance: Table
    left_out: Table
    reproduce: Table
    explanations: tuple[Mapping[str, Any], ...] = ()

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All pairs; row n of ``ranking`` is about ``ranked_pairs[n]``."""
        return self.comparison.pairs


def build_report(
    records: Records,
    *,
    hardware: Iterable[HardwareProfile] = (),
    predict: Predict | None = None,
    title: str = "",
    command: str = "",
    version: str = "",
) -> Report:
    """Compare, rank and tabulate.

    Parameters
    ----------
    records
        What ``read_records`` returned.
    hardware
        Profiles of the devices in the records, for rooflines, capacity and provenance.
    predict
        As for :func:`reports.comparison.compare`.
    title, command, version
        Heading, the exact command line that makes this report again, and lccost's version.
    """
    comparison = compare(records, predict)
    ranked = rank(comparison.pairs)
    profiles = tuple(hardware)
    return Report(
        title=safe_text(title, 120) or _title(comparison.pairs),
        verdict=verdict(ranked),
        remarks=(*known_accuracy(ranked), *_remarks(comparison, records)),
        comparison=comparison,
        hardware=profiles,
        ranking=point_rows(ranked),
        errors=error_table(comparison, ("method_spec", "level"), exact_rows=False).without(
            "worst_origin"
        ),
        validation=validation_table(records),
        break_even=break_even_table(comparison.pairs),
        sensitivity=sensitivity_table(margins(ranked)),
        accuracy=accuracy_table(comparison.pairs),
        assumptions=_assumptions(records, comparison.pairs),
        provenance=provenance_table(profiles),
        left_out=left_out_table(comparison, records),
        reproduce=reproduce_table(records, command, version),
        explanations=_explanations(records),
    )


def _title(pairs: Sequence[Pair]) -> str:
    models = list(dict.fromkeys(p.key.text("model", "?") for p in pairs))
    devices = list(dict.fromkeys(p.key.device or "?" for p in pairs))
    if not pairs:
        return "Cost report"
    names = [
        safe_text(group[0], 40) if len(group) == 1 else f"{len(group)} {word}"
        for group, word in ((models, "models"), (devices, "devices"))
    ]
    return f"What long context costs: {names[0]} on {names[1]}"


def _remarks(comparison: Comparison, records: Records) -> tuple[str, ...]:
    remarks = []
    for metric in ("ttft_s", "tpot_s"):
        for basis in dict.fromkeys(e.pair.basis for e in comparison.errors):
            sizes = sorted(
                abs(e.error)
                for e in comparison.errors
                if e.metric == metric and e.pair.basis == basis
            )
            if sizes:
                middle = 50 * (sizes[(len(sizes) - 1) // 2] + sizes[len(sizes) // 2])
                remarks.append(
                    f"{AXES[metric].title}: {len(sizes)} observations, predicted ({basis}) with a "
                    f"median error of {percent(middle)}, at worst {percent(100 * sizes[-1])}."
                )
    exact = [e for e in comparison.errors if e.metric == "state_bytes"]
    if exact and all(e.error == 0 for e in exact):
        remarks.append(f"State: all {len(exact)} measured caches equal the prediction to the byte.")
    if records.measurements and not comparison.errors:
        remarks.append(
            "No record of this report ran and could be compared: all of it is predicted."
        )
    if comparison.unjoined:
        remarks.append(
            f"Could not be compared (listed below): {len(comparison.unjoined)} "
            f"of {len(records.measurements)} records."
        )
    bases = sorted({p.basis for p in comparison.pairs if p.basis})
    if len(bases) > 1:
        remarks.append(f"Predictions of different basis stand side by side: {', '.join(bases)}.")
    return (*remarks, *records.notes)


def _assumptions(records: Records, pairs: Sequence[Pair]) -> tuple[str, ...]:
    found: list[str] = []
    for header in records.headers:
        listed = header.values.get("assumptions")
        if isinstance(listed, list):
            found += [safe_text(str(text), 400) for text in listed]
    for p in pairs:
        notes = None if p.predicted is None else p.predicted.values.get("notes")
        if isinstance(notes, list):
            found += [
                f"{safe_text(p.key.text('model'), 40)}: {safe_text(str(n), 400)}" for n in notes
            ]
        family = None if p.predicted is None else p.predicted.text("assumed_family")
        if family:
            found.append(f"{safe_text(p.key.text('model'), 40)}: read as family {family}")
    extrapolated = [
        p
        for p in pairs
        if p.predicted is not None and p.predicted.values.get("extrapolated") is True
    ]
    if extrapolated:
        found.append(f"{len(extrapolated)} predictions extrapolate beyond the calibrated range.")
    return tuple(dict.fromkeys(found))


def _explanations(records: Records) -> tuple[Mapping[str, Any], ...]:
    found: list[Mapping[str, Any]] = []
    for header in records.headers:
        listed = header.values.get("explanations")
        if isinstance(listed, list):
            found += [item for item in listed if isinstance(item, dict)]
    return tuple(found)

"""Finds the prediction of a measured point, or the nearest one and how it differs."""

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from reports.labels import safe_text
from reports.records import KEY_FIELDS, Row

#: Fields that must agree where both sides have them; the first ones find the candidates.
_JOIN_FIELDS = (*(k for k in KEY_FIELDS if k not in ("method_spec", "method_parameters")), "layers")
_MAX_CANDIDATES = 200


class PredictionIndex:
    """Predictions by point, and which of them were taken."""

    def __init__(self, predictions: Iterable[Row]) -> None:
        self._rows = list(predictions)
        self._used: set[int] = set()
        self._near: dict[tuple[str, str], list[Row]] = defaultdict(list)
        self._exact: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for row in self._rows:
            self._near[_family(row)].append(row)
            self._exact[_place(row)].append(row)

    def matching(self, record: Row) -> list[Row]:
        """Predictions whose key fields agree with the record's, in file order."""
        found = [r for r in self._exact[_place(record)] if not _differences(record, r)]
        self._used.update(id(r) for r in found)
        return found

    def explain(self, record: Row) -> str:
        """Why nothing matched, by the nearest prediction."""
        if not self._rows:
            return "the record carries no prediction, and no predictions were given"
        near = self._near[_family(record)][:_MAX_CANDIDATES]
        if not near:
            return "no prediction of this model and method among the files"
        fewest = min((_differences(record, r) for r in near), key=len)
        return f"no prediction of this point; the nearest differs in {', '.join(fewest)}"

    def unused(self) -> list[Row]:
        """Predictions that no record took."""
        return [r for r in self._rows if id(r) not in self._used]


def _family(row: Row) -> tuple[str, str]:
    return row.text("model").lower(), row.text("method").lower()


def _place(row: Row) -> tuple[Any, ...]:
    return (*_family(row), row.number("batch"), row.number("context_tokens"))


def _differences(record: Row, prediction: Row) -> list[str]:
    """Key fields in which two rows disagree, in words; a field only one side has is no conflict."""
    different = []
    for name in _JOIN_FIELDS:
        mine, theirs = record.values.get(name), prediction.values.get(name)
        if mine is None or theirs is None or hashable(mine) == hashable(theirs):
            continue
        different.append(f"{name} ({_short(theirs)}, not {_short(mine)})")
    mine, theirs = _method_key(record, prediction)
    if mine != theirs:
        different.append(f"method_parameters ({_short(theirs)}, not {_short(mine)})")
    return different


def _method_key(record: Row, prediction: Row) -> tuple[str, str]:
    """Both methods in the most exact form that both rows have."""
    for name in ("method_parameters", "method_spec"):
        mine, theirs = record.values.get(name), prediction.values.get(name)
        if mine is not None and theirs is not None:
            return hashable(mine), hashable(theirs)
    return "", ""


def hashable(value: Any) -> Any:
    """A value as a dictionary key; texts without their case."""
    if isinstance(value, (dict, list)):
        return json.dumps(value, sort_keys=True)
    return value.lower() if isinstance(value, str) else value


def _short(value: Any) -> str:
    return safe_text(str(value), 60)

"""Write fitted families: one JSON file per kind, one table per family."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from costmodel.kernels.kinds import kernel_kind

NOTES = (
    "Kernel families of kind {kind}, fitted by `python -m costmodel.calibration`; do not edit.",
    "Parameters: docstring of costmodel/kernels/{module}.py. Rates scale with the datasheet.",
    "held_out_percent: errors on rows no fit had seen (both halves of {n_splits} seeded splits), "
    "beside those of the datasheet roofline; coverage, interval_width: of intervals judged on "
    "unseen rows. The parameters themselves are of a fit to all rows; half_fits: of one half of "
    "each split. interval: factors on a prediction on which those differ as usual (standard "
    "deviation of the logarithm). generation_spread: what a transfer to another generation adds to "
    "it, as squares of logarithms: the most that any GPU left out needed.",
    "Table: {source}",
    "Rows were left out where a device could not have run them: {n_rejected}.",
)


def sha256(path: Path) -> str:
    """Hash of a table's bytes, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def document(
    kind: str,
    families: Sequence[Mapping[str, Any]],
    *,
    fitted: str,
    source: str,
    n_rejected: int,
    n_splits: int,
) -> str:
    """The text of one family file: JSON, one line per key of a family, so that diffs read well."""
    module = kernel_kind(kind).time_s.__module__.rpartition(".")[2]
    notes = [
        note.format(
            kind=kind, module=module, n_splits=n_splits, source=source, n_rejected=n_rejected
        )
        for note in NOTES
    ]
    rows = [
        ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in row.items())
        for row in families
    ]
    head = json.dumps({"notes": notes, "kind": kind, "fitted": fitted}, indent=1)[:-2]
    return (
        f'{head},\n "family": [\n' + ",\n".join(f"  {{\n{row}\n  }}" for row in rows) + "\n ]\n}\n"
    )


def toml_value(value: Any) -> str:
    """A TOML value: text, number, list, or a table in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON text is a TOML basic string, but for this one control character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {toml_value(v)}" for k, v in value.items()) + " }"
    return "[" + ", ".join(toml_value(v) for v in value) + "]"

"""One scalar per phase from runs of this very device: a profile whose basis is ``anchored``.

Never one per operation class: classes fitted to whole passes of one model (they are collinear) were
off by 42 % on another, where a single factor per phase halved the error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from costmodel.errors import ConfigError
from costmodel.hardware import load_hardware, profile_path
from costmodel.tables import read_toml
from lccost.joins import predict_record

_METRICS = {"prefill": "ttft_s", "decode": "tpot_s"}


def anchored_profile(profile: str | Path, records: Sequence[Mapping[str, Any]]) -> str:
    """TOML of ``profile`` (bundled by name, or a file) with ``[anchors]``: per phase the geometric
    mean of observed over predicted seconds of all valid records.

    Anchors that the profile has already are replaced. Raises ``ConfigError`` where no record is
    valid; records of other devices are the caller's to leave out.
    """
    base = replace(load_hardware(profile), anchors={})
    ratios: dict[str, list[float]] = {phase: [] for phase in _METRICS}
    keys = []
    for record in records:
        if record.get("status") != "ok" or record.get("is_valid") is False:
            continue
        predicted = predict_record(record, base)
        keys.append(str(record.get("record_key")))
        for phase, metric in _METRICS.items():
            if record.get(metric) and predicted.get(metric):
                ratios[phase].append(record[metric] / predicted[metric])
    factors = {p: float(np.exp(np.mean(np.log(r)))) for p, r in ratios.items() if r}
    if not factors:
        raise ConfigError("anchor: expected at least one record that is ok and valid, got none")
    table = read_toml(profile_path(profile))
    table["anchors"] = {p: float(f"{x:.6g}") for p, x in factors.items()}
    facts = dict(table.get("calibration", {}))
    table["calibration"] = {**facts, "anchored_by": ", ".join(dict.fromkeys(keys))}
    return tomli_w.dumps(table)

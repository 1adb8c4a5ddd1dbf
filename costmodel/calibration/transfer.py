"""How well families transfer: a GPU predicted as if none of its rows had ever been fitted.

Families are fitted per GPU, so leaving a GPU out leaves its families out; its rows are predicted by
the nearest of the others, rates scaled by the datasheet, as for any GPU without families. No
predicted row was seen by the families that predict it; the one number that is fitted here is how
much wider their intervals become. Which kernel ran is known by its name, and with it tiles and
forms; nothing of its times is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from costmodel.calibration.families import errors_percent
from costmodel.calibration.intervals import COVERED_SHARE
from costmodel.calibration.tables import Rows, read_table
from costmodel.hardware import load_hardware
from costmodel.kernels.families import (
    GENERATION_SPREAD,
    SISTER_SPREAD,
    Family,
    family_without,
)
from costmodel.kernels.kinds import kernel_kind
from costmodel.operation import Array

#: A GPU with fewer rows of a kind says too little of its transfers.
LEAST_ROWS = 40


@dataclass(frozen=True, slots=True)
class Transferred:
    """Errors in percent of one GPU's rows of one kind, predicted without its families.

    ``errors``: mape, median, p90, bias; coverage and interval_width of low-high; roofline_mape.
    """

    kind: str
    hardware: str
    n_rows: int
    errors: dict[str, float]


def family_elsewhere(rows: Rows, families: Sequence[Family] | None = None) -> Family | None:
    """The family that answers for the rows of a kernel if none had been fitted on their GPU; of
    those that ship, or of ``families``.
    """
    key = rows.key
    return family_without(
        key.hardware,
        key.kind,
        key.engine,
        load_hardware(key.hardware),
        variant=key.variant,
        kernel=key.kernel,
        within={k: float(np.median(v)) for k, v in rows.shape.items()},
        families=families,
    )


def transfer_errors(paths: Sequence[Path], without: Sequence[str]) -> list[Transferred]:
    """Every kind of the tables on every GPU of ``without``, left out one at a time."""
    found: dict[tuple[str, str], list[tuple[Rows, tuple[Array, Array, Array]]]] = {}
    for path in paths:
        for rows in read_table(path).families:
            key = rows.key
            if key.hardware not in without:
                continue
            family = family_elsewhere(rows)
            if family is not None:
                times = family.time_s(load_hardware(key.hardware), rows.shape, cold=False)
                found.setdefault((key.kind, key.hardware), []).append((rows, times))
    return [_judged(*key, items) for key, items in sorted(found.items())]


def _judged(
    kind: str, hardware: str, items: Sequence[tuple[Rows, tuple[Array, Array, Array]]]
) -> Transferred:
    device = load_hardware(hardware)
    observed = np.concatenate([rows.observed_s for rows, _ in items])
    low, mid, high = (
        np.concatenate([np.broadcast_to(t[i], len(rows)) for rows, t in items]) for i in range(3)
    )
    model = kernel_kind(kind)
    roofline = np.concatenate(
        [
            np.broadcast_to(model.roofline_s(device, rows.shape, rows.key.variant), len(rows))
            for rows, _ in items
        ]
    )
    errors = errors_percent(mid, observed)
    inside = (observed >= low) & (observed <= high)
    errors |= {
        "coverage": float(inside.mean() * 100.0),
        "interval_width": float(np.median((high - low) / mid) * 100.0),
        "roofline_mape": errors_percent(roofline, observed)["mape"],
    }
    return Transferred(kind, device.name, len(observed), errors)


def generation_spread(families: Sequence[Family], tables: Sequence[Rows]) -> float:
    """Spread of the logarithm that a transfer to another generation adds, of one kind.

    Every GPU of the tables is predicted by the ``families`` of the others; what its rows are off
    beyond their intervals, as squares of logarithms, is the transfer's. Of each GPU the spread that
    ``COVERED_SHARE`` of its rows need; of those the largest, since the next GPU may be like it.
    """
    unmoved = [replace(f, generation_spread=0.0) for f in families]
    needed: dict[str, list[NDArray[np.float64]]] = {}
    for rows in tables:
        family = family_elsewhere(rows, unmoved)
        if family is None:
            continue
        low, mid, high = family.time_s(load_hardware(rows.key.hardware), rows.shape, cold=False)
        off = np.log(rows.observed_s / mid)
        reach = np.log(np.where(off < 0.0, mid / low, high / mid))
        beyond = np.sqrt(np.maximum(off**2 - reach**2, 0.0))
        needed.setdefault(rows.key.hardware, []).append(np.broadcast_to(beyond, off.shape))
    by_gpu = [np.concatenate(parts) for parts in needed.values()]
    spreads = [np.quantile(x, COVERED_SHARE) for x in by_gpu if x.size >= LEAST_ROWS]
    return float(max([SISTER_SPREAD, *spreads])) if spreads else GENERATION_SPREAD

"""Figures of docs/accuracy.md: predicted against observed, and error against size."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from accuracy_judged import Judged
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

#: Colour-blind-safe (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
#: Axes that span less than this many times get ticks between powers of ten.
NARROW = 50.0
#: unit -> (factor, axis title)
UNITS = {"s": (1e3, "ms"), "bytes": (2.0**-30, "GiB"), "W": (1.0, "W")}


def draw(judged: Sequence[Judged], folder: Path) -> dict[str, str]:
    """One picture per operation; name of the operation -> file, relative to the page."""
    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    for operation in dict.fromkeys(j.operation for j in judged):
        members = [j for j in judged if j.operation == operation]
        if sum(j.observed.size for j in members) < 10:
            continue
        name = "".join(c if c.isalnum() else "-" for c in operation.lower()).strip("-")
        while "--" in name:
            name = name.replace("--", "-")
        _figure(operation, members, folder / f"{name}.png")
        out[operation] = f"img/accuracy/{name}.png"
    return out


def _figure(operation: str, members: Sequence[Judged], path: Path) -> None:
    factor, unit = UNITS[members[0].unit]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.7), constrained_layout=True)
    every = np.concatenate([np.median(j.predicted, axis=0) / j.observed for j in members])
    most = float(np.clip(np.percentile(np.abs(every - 1.0), 98) * 130.0, 2.0, 100.0))
    by_hardware: dict[str, list[Judged]] = {}
    for j in members:
        by_hardware.setdefault(j.group[0], []).append(j)
    for i, (hw, parts) in enumerate(sorted(by_hardware.items())):
        predicted = np.concatenate([np.median(j.predicted, axis=0) for j in parts]) * factor
        observed = np.concatenate([j.observed for j in parts]) * factor
        colour = COLOURS[i % len(COLOURS)]
        error = (predicted / observed - 1.0) * 100.0
        left.scatter(observed, predicted, s=9, alpha=0.55, color=colour, label=hw, linewidths=0)
        right.scatter(
            observed, np.clip(error, -most, most), s=9, alpha=0.35, color=colour, linewidths=0
        )
        if observed.size >= 40:
            centre, median = _running_median(observed, error)
            right.plot(centre, median, color=colour, linewidth=1.8)
    low, high = left.get_xlim()
    ends = [max(low, 1e-9), high]
    low = min(float(np.min(np.concatenate([j.observed for j in members]))) * factor, ends[1])
    ends = [low * 0.7, float(np.max(np.concatenate([j.observed for j in members]))) * factor * 1.4]
    left.plot(ends, ends, color="#444444", linewidth=1)
    left.plot(ends, [1.25 * e for e in ends], color="#999999", linewidth=0.7, linestyle="--")
    left.plot(ends, [0.8 * e for e in ends], color="#999999", linewidth=0.7, linestyle="--")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlim(*ends)
        axis.xaxis.set_major_formatter(_plain)
        axis.xaxis.set_minor_formatter(NullFormatter())
        if ends[1] / ends[0] < NARROW:
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_xlabel(f"observed, {unit}")
        axis.grid(visible=True, linewidth=0.4, alpha=0.4)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yscale("log")
    left.set_ylim(*ends)
    left.yaxis.set_major_formatter(_plain)
    left.yaxis.set_minor_formatter(NullFormatter())
    if ends[1] / ends[0] < NARROW:
        left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.set_ylabel(f"predicted, {unit}")
    left.legend(frameon=False, fontsize=8, markerscale=1.8)
    how = "Predicted by a fit that had not seen the row" if members[0].fitted else "Calculated"
    left.set_title(f"{how}; dashed: -20, +25 %", fontsize=9, loc="left")
    right.axhline(0.0, color="#444444", linewidth=1)
    right.set_ylim(-1.05 * most, 1.05 * most)
    right.set_ylabel("error, %")
    right.set_title("Error by size; lines: running median", fontsize=9, loc="left")
    figure.suptitle(operation[0].upper() + operation[1:], fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


@FuncFormatter
def _plain(value: float, position: int) -> str:
    """Ticks as plain numbers."""
    return f"{value:g}"


def _running_median(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Medians of equally many neighbours in x."""
    order = np.argsort(x)
    parts = np.array_split(order, max(4, min(14, x.size // 15)))
    centre = np.array([np.median(x[p]) for p in parts])
    return centre, np.array([np.median(y[p]) for p in parts])

"""Fit the few parameters of a kernel model to measured times.

    minimise  sum rho(log(predicted / observed)) + scatter^2 sum ((log x - log prior) / spread)^2

over the logarithms of the parameters x, with the soft-L1 loss rho (outliers count linearly) at a
scale of 8 %, the usual scatter of kernel times around a good model. The second term is the belief
before any row was read: it decides where the rows say nothing, and fades as rows come in. Fits
start at the prior and at seeded points around it and keep the best.

scipy is imported here only, when a fit runs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.calibration.tables import Rows
from costmodel.errors import MissingExtraError
from costmodel.hardware import HardwareProfile
from costmodel.kernels.kinds import KernelKind
from costmodel.kernels.physics import Prior

Floats = NDArray[np.float64]

#: Scatter of kernel times around a good model, in the logarithm: the scale of the robust loss.
SCATTER = 0.08
#: Relative steps of the finite differences: coarse first (waves are steps), then fine.
STEPS = (3e-2, 1e-2, 2e-3)
MAX_EVALUATIONS = 60
#: How far starting points scatter around the prior, in its logarithm.
START_SCATTER = 0.35


def _least_squares() -> Any:
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise MissingExtraError(
            "calibrating from a table needs scipy: pip install 'lccost[plan]'"
        ) from error
    return least_squares


def fit_parameters(
    kind: KernelKind,
    rows: list[tuple[Rows, HardwareProfile, Mapping[str, float]]],
    priors: Mapping[str, Prior],
    *,
    seed: int = 0,
    starts: int = 3,
) -> dict[str, float]:
    """Values of the parameters in ``priors`` that fit ``rows`` best.

    ``rows`` may hold several families, each with its device and its set (not fitted) parameters;
    they share the fitted ones. Families count by their rows.
    """
    priors = _with_host_time(priors, rows)
    names = list(priors)
    free = [n for n in names if priors[n].spread > 0]
    log_prior = np.log([priors[n].value for n in free])
    spread = np.array([priors[n].spread for n in free])
    low = np.log([priors[n].low for n in free])
    high = np.log([priors[n].high for n in free])
    fixed = {n: priors[n].value for n in names if priors[n].spread <= 0}
    log_observed = [np.log(r.observed_s) for r, _, _ in rows]

    def residuals(x: Floats) -> Floats:
        values = fixed | dict(zip(free, np.exp(x).tolist(), strict=True))
        parts = [
            np.log(kind.time_s(kind.build({**s, **values}), d, r.shape, r.key.variant, False)) - o
            for (r, d, s), o in zip(rows, log_observed, strict=True)
        ]
        return np.concatenate([*parts, SCATTER * (x - log_prior) / spread])

    least_squares = _least_squares()
    generator = np.random.default_rng(seed)
    best: Any = None
    for start in range(starts):
        shift = generator.normal(0.0, START_SCATTER, len(free)) if start else 0.0
        x = np.clip(log_prior + shift, low + 1e-9, high - 1e-9)
        for step in STEPS:
            result = least_squares(
                residuals,
                np.clip(x, low + 1e-9, high - 1e-9),
                bounds=(low, high),
                loss="soft_l1",
                f_scale=SCATTER,
                diff_step=step,
                max_nfev=MAX_EVALUATIONS,
            )
            x = result.x
        if best is None or result.cost < best.cost:
            best = result
    return fixed | dict(zip(free, np.exp(best.x).tolist(), strict=True))


def _with_host_time(
    priors: Mapping[str, Prior], rows: list[tuple[Rows, HardwareProfile, Mapping[str, float]]]
) -> dict[str, Prior]:
    """Start the host's time per call just under the fastest row, where a model has that parameter.

    Below the fastest row it changes nothing, so a fit from far below could never find it.
    """
    out = dict(priors)
    if "eager_s" in out and out["eager_s"].spread > 0:
        p = out["eager_s"]
        fastest = min(float(r.observed_s.min()) for r, _, _ in rows)
        value = float(np.clip(0.9 * fastest, p.low, p.high))
        out["eager_s"] = Prior(value, p.spread, p.low, p.high, p.meaning)
    return out


def narrowed(
    priors: Mapping[str, Prior], values: Mapping[str, float], share: float
) -> dict[str, Prior]:
    """Move priors to fitted ``values``, with ``share`` of their spread: what kin have taught."""
    return {
        n: Prior(values.get(n, p.value), p.spread * share, p.low, p.high, p.meaning)
        for n, p in priors.items()
    }


def halves(n: int, seed: int) -> NDArray[np.bool_]:
    """Pick a seeded half of n rows."""
    mask = np.zeros(n, dtype=np.bool_)
    mask[np.random.default_rng(seed).permutation(n)[: (n + 1) // 2]] = True
    return mask

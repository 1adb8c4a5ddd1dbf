"""Token lengths from a number, a table of cumulative probabilities or a named distribution.

    4096                                              every request alike
    "lengths.json", [[512, 0.5], [8192, 1.0]]         a CDF: [tokens, cumulative probability]
    {distribution = "lognormal", mean = 6000, p99 = 85000}
    {distribution = "exponential", mean = 343}
    {distribution = "pareto", minimum = 512, alpha = 1.4, maximum = 131072}
    {distribution = "uniform", minimum = 100, maximum = 4000}
    {distribution = "lognormal_pareto", mean = 1500, sigma = 0.9, tail_share = 0.05,
     minimum = 16384, alpha = 1.2, maximum = 131072}

Between two rows of a CDF lengths are uniform. Inputs of real services are near a lognormal body
with a Pareto tail and outputs near an exponential (ServeGen, arXiv 2505.09999).
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from costmodel.errors import ConfigError
from costmodel.planning.requests import Floats
from costmodel.planning.traces import MAX_TOKENS
from costmodel.tables import MAX_FILE_BYTES, Fields, short

#: distribution -> (required parameters, optional parameters)
PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lognormal": (("mean",), ("p99", "sigma", "minimum", "maximum")),
    "exponential": (("mean",), ("minimum", "maximum")),
    "pareto": (("minimum", "alpha"), ("maximum",)),
    "uniform": (("minimum", "maximum"), ()),
    "lognormal_pareto": (
        ("mean", "sigma", "tail_share", "minimum", "alpha"),
        ("maximum",),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long prompts (or answers) are. ``kind`` is "fixed", "cdf" or a distribution's name."""

    kind: str
    tokens: tuple[float, ...] = ()
    cumulative: tuple[float, ...] = ()
    parameters: Mapping[str, float] = field(default_factory=dict)

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        """``n`` whole lengths of at least 1."""
        if self.kind == "fixed":
            return np.full(n, self.tokens[0])
        p = self.parameters
        if self.kind == "cdf":
            drawn = np.interp(
                rng.random(n), (0.0, *self.cumulative), (self.tokens[0], *self.tokens)
            )
        elif self.kind == "lognormal":
            drawn = _lognormal(p["mean"], _sigma(p), n, rng)
        elif self.kind == "exponential":
            drawn = rng.exponential(p["mean"], n)
        elif self.kind == "pareto":
            drawn = _pareto(p, n, rng)
        elif self.kind == "uniform":
            drawn = rng.uniform(p["minimum"], p["maximum"], n)
        else:
            tail = rng.random(n) < p["tail_share"]
            drawn = np.where(tail, _pareto(p, n, rng), _lognormal(p["mean"], p["sigma"], n, rng))
        low = 1.0 if self.kind == "lognormal_pareto" else p.get("minimum", 1.0)
        high = p.get("maximum", float(MAX_TOKENS))
        return np.asarray(np.round(np.clip(drawn, max(1.0, low), high)), dtype=np.float64)


def _lognormal(mean: float, sigma: float, n: int, rng: np.random.Generator) -> Floats:
    return rng.lognormal(math.log(mean) - sigma * sigma / 2, sigma, n)


def _sigma(p: Mapping[str, float]) -> float:
    """Sigma given, or from p99 / mean = exp(z sigma - sigma^2 / 2), its smaller root."""
    if "sigma" in p:
        return p["sigma"]
    z = NormalDist().inv_cdf(0.99)
    return z - math.sqrt(max(0.0, z * z - 2 * math.log(p["p99"] / p["mean"])))


def _pareto(p: Mapping[str, float], n: int, rng: np.random.Generator) -> Floats:
    """Pareto from ``minimum`` up, truncated at ``maximum`` by the inverse of its CDF."""
    low, alpha = p["minimum"], p["alpha"]
    ratio = (low / p["maximum"]) ** alpha if "maximum" in p else 0.0
    drawn: Floats = low * (1.0 - rng.random(n) * (1.0 - ratio)) ** (-1.0 / alpha)
    return drawn


def read_lengths(value: object, key: str, folder: Path) -> Lengths:
    """From a TOML value; raises ``ConfigError``. Relative paths start at ``folder``."""
    if isinstance(value, bool) or value is None:
        raise ConfigError(f"{key}: expected tokens, a CDF or a distribution, got {short(value)}")
    if isinstance(value, int | float):
        if not 1 <= value <= MAX_TOKENS or value != int(value):
            form = f"a whole number of tokens from 1 to {MAX_TOKENS:,}"
            raise ConfigError(f"{key}: expected {form}, got {short(value)}")
        return Lengths(kind="fixed", tokens=(float(value),))
    if isinstance(value, str):
        return _cdf(_json(folder / Path(value).expanduser(), key), key)
    if isinstance(value, list):
        return _cdf(value, key)
    if isinstance(value, Mapping):
        return _named(value, key)
    raise ConfigError(f"{key}: expected tokens, a CDF or a distribution, got {short(value)}")


def _json(path: Path, key: str) -> object:
    if not path.is_file():
        raise ConfigError(f"{key}: {path}: there is no such file of [[tokens, cumulative], ...]")
    raw = path.read_bytes()[: MAX_FILE_BYTES + 1]
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{key}: {path}: expected at most {MAX_FILE_BYTES} bytes")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {path}: not valid JSON: {error}") from None


def _cdf(table: object, key: str) -> Lengths:
    form = "expected [[tokens, cumulative probability], ...] that rises to 1"
    if not isinstance(table, Sequence) or isinstance(table, str) or not table:
        raise ConfigError(f"{key}: {form}, got {short(table)}")
    tokens, cumulative = [], []
    for i, row in enumerate(table, start=1):
        good = isinstance(row, Sequence) and len(row) == 2 and not isinstance(row, str)
        if not good or not all(
            isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in row
        ):
            raise ConfigError(f"{key}: row {i}: {form}, got {short(row)}")
        tokens.append(float(row[0]))
        cumulative.append(float(row[1]))
    for name, xs in (("tokens", tokens), ("probabilities", cumulative)):
        for i, (a, b) in enumerate(itertools.pairwise(xs), start=2):
            if b < a:
                raise ConfigError(f"{key}: row {i}: {form}; the {name} fall from {a:g} to {b:g}")
    if tokens[0] < 1 or cumulative[0] < 0:
        raise ConfigError(f"{key}: row 1: {form}, of at least 1 token, got {short(table[0])}")
    if abs(cumulative[-1] - 1.0) > 1e-6:
        raise ConfigError(f"{key}: {form}; the last row says {cumulative[-1]:g}")
    return Lengths(kind="cdf", tokens=tuple(tokens), cumulative=tuple(cumulative))


def _named(table: Mapping[str, Any], key: str) -> Lengths:
    f = Fields(table, key)
    kind = f.text("distribution", required=True)
    if kind not in PARAMETERS:
        if not f.problems:
            f.problem("distribution", f"expected one of {', '.join(PARAMETERS)}, got {short(kind)}")
        f.finish()
    required, optional = PARAMETERS[kind]
    values: dict[str, float] = {}
    for name in (*required, *optional):
        low, high, unit = _RANGES.get(name, (1.0, float(MAX_TOKENS), "tokens"))
        value = f.number(name, unit=unit, low=low, high=high, required=name in required)
        if value is not None:
            values[name] = value
    f.unknown()
    if kind == "lognormal" and not f.problems:
        if ("p99" in values) == ("sigma" in values):
            f.problem("p99", "a lognormal needs exactly one of p99 and sigma beside its mean")
        elif "p99" in values and not 1.0 < values["p99"] / values["mean"] <= 14.9:
            f.problem("p99", "expected between 1 and 14.9 times the mean; no lognormal has another")
    if values.get("maximum", math.inf) < values.get("minimum", 0.0):
        f.problem("maximum", "expected at least the minimum")
    f.finish()
    return Lengths(kind=kind, parameters=values)


_RANGES = {
    "sigma": (1e-6, 10.0, "a number"),
    "alpha": (0.05, 100.0, "a number"),
    "tail_share": (0.0, 1.0, "a share"),
}

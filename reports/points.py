"""What the figures draw, as plain numbers: series of points by method, ready for any renderer.

The static figures and the interactive charts of the page draw the same series, so that a number
cannot differ between them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from costmodel.hardware import HardwareProfile
from reports.comparison import Pair
from reports.labels import point, safe_text, varying_fields

#: Lines and markers that a reader can still tell apart.
MOST_SERIES = 14
PHASES = ("prefill", "decode")
#: The time of one pass of a phase.
TIME_OF_PHASE = {"prefill": "ttft_s", "decode": "tpot_s"}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RooflinePoint:
    """One pass of one phase on the roofline, per GPU.

    intensity          useful FLOPs over HBM bytes of the pass
    predicted, low, high, observed    attained FLOP/s: useful FLOPs over time
    ceiling            most FLOP/s that the host link or the launches of the pass allow, whichever
                       is lower; None where neither is known or the roof is lower still
    """

    pair: Pair
    phase: str
    context_tokens: float
    intensity: float
    predicted: float | None
    low: float | None
    high: float | None
    observed: float | None
    ceiling: float | None
    bound: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RooflineSeries:
    """One method at one level and phase, as context grows.

    ``is_path``: whether the points are of one configuration, so that a line through them means
    something; else they are all points of the method.
    """

    name: str
    level: str
    phase: str
    points: tuple[RooflinePoint, ...]
    is_path: bool = True


def roofline_series(
    pairs: Sequence[Pair], hardware: HardwareProfile, most: int = MOST_SERIES
) -> tuple[RooflineSeries, ...]:
    """Series in order of first appearance; pairs without FLOPs, bytes or time are left out.

    More than ``most`` series cannot be told apart: then all points of a method are one.
    """
    namer = Namer.fitting(pairs, most)
    grouped: dict[tuple[str, str, str], list[RooflinePoint]] = defaultdict(list)
    for pair in pairs:
        for phase in PHASES:
            made = roofline_point(pair, phase, hardware)
            if made is not None:
                grouped[namer(pair), pair.key.text("level"), phase].append(made)
    return tuple(
        RooflineSeries(
            name=name,
            level=level,
            phase=phase,
            points=tuple(sorted(points, key=lambda p: p.context_tokens)),
            is_path=not namer.is_coarse,
        )
        for (name, level, phase), points in grouped.items()
    )


def roofline_point(pair: Pair, phase: str, hardware: HardwareProfile) -> RooflinePoint | None:
    """Where one pass lies, or None when its FLOPs, bytes or times are unknown.

    Useful FLOPs and bytes belong to the work, not to the clock: the observed dot takes them from
    the prediction of the same point where the record does not carry its own, so it lies straight
    below or above its ring.
    """
    flops = _first(pair, f"{phase}_flops")
    hbm_bytes = _first(pair, f"{phase}_hbm_bytes")
    context = pair.key.number("context_tokens")
    if not flops or not hbm_bytes or context is None:
        return None
    # FLOPs are of the whole model, bytes of one GPU: bring both to one GPU.
    flops /= pair.key.number("tp") or 1.0
    time = TIME_OF_PHASE[phase]
    stem = time.removesuffix("_s")
    predicted, observed = pair.value(time, "predicted"), pair.value(time, "observed")
    if not predicted and not observed:
        return None
    return RooflinePoint(
        pair=pair,
        phase=phase,
        context_tokens=context,
        intensity=flops / hbm_bytes,
        predicted=_rate(flops, predicted),
        low=_rate(flops, pair.value(f"{stem}_high_s")),
        high=_rate(flops, pair.value(f"{stem}_low_s")),
        observed=_rate(flops, observed),
        ceiling=_ceiling(pair, phase, flops, hbm_bytes, hardware),
        bound=("" if pair.predicted is None else pair.predicted.text(f"{phase}_bound")),
    )


class Namer:
    """Names series so that only what differs between them is said."""

    _FIELDS = ("model", "gpu", "batch", "output_tokens", "tp", "dtype", "weight_dtype", "layers")

    def __init__(self, pairs: Iterable[Pair], *, is_coarse: bool = False) -> None:
        pairs = list(pairs)
        self.is_coarse = is_coarse
        if is_coarse:
            self._fields, self._bases, self._models_only = [], False, False
            return
        keys = [p.key for p in pairs]
        varying = set(varying_fields(keys))
        self._fields = [f for f in self._FIELDS if f in varying]
        # Levels usually imply an engine; it is news only where one level ran on several.
        engines = {(k.text("level"), k.text("engine")) for k in keys}
        if len(engines) > len({level for level, _ in engines}):
            self._fields.append("engine")
        self._bases = len({p.basis for p in pairs if p.basis}) > 1
        # Models of one method are known by the model alone.
        self._models_only = "model" in varying and len({k.method_spec for k in keys}) == 1

    @classmethod
    def fitting(cls, pairs: Iterable[Pair], most: int = MOST_SERIES) -> "Namer":
        """A namer that makes at most ``most`` series where method names alone allow it."""
        pairs = list(pairs)
        fine = cls(pairs)
        if len({(fine(p), p.key.text("level")) for p in pairs}) <= most:
            return fine
        return cls(pairs, is_coarse=True)

    def __call__(self, pair: Pair) -> str:
        """Name of the series that a pair belongs to."""
        name = safe_text(pair.key.method_spec, 40)
        rest = point(pair.key, self._fields, 28)
        if rest:
            name = rest if self._models_only else f"{name}, {rest}"
        return f"{name} [{pair.basis}]" if self._bases and pair.basis else name


def _first(pair: Pair, metric: str) -> float | None:
    predicted = pair.value(metric, "predicted")
    return pair.value(metric, "observed") if predicted is None else predicted


def _ceiling(
    pair: Pair, phase: str, flops: float, hbm_bytes: float, hardware: HardwareProfile
) -> float | None:
    """FLOPs over the time that the host link, or starting the kernels, takes alone; None where
    the roof is lower: only what binds is worth a mark.
    """
    link_bytes, link = pair.value(f"{phase}_link_bytes"), hardware.host_link_bytes_per_s
    link_s = link_bytes / link if link_bytes and link else 0.0
    found = _rate(flops, max(link_s, pair.value(f"{phase}_launch_s") or 0.0))
    roof = min(
        max(hardware.peak_flops_per_s.values()), flops / hbm_bytes * hardware.hbm_bytes_per_s
    )
    return found if found is not None and found < roof else None


def _rate(flops: float, seconds: float | None) -> float | None:
    return flops / seconds if seconds else None

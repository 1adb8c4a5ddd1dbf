"""The fitted kernel families that ship, and which of them answers for a device and an engine.

``costmodel/data/families/<kind>.json`` holds one table per family: the kernel of one engine on one
GPU, its parameters with units in their names, the rows and shapes they were fitted on, and the
error on rows no fit had seen. A profile can carry families of its own (``calibrate`` writes them);
they go first, but for a kernel or an engine they are not of and that ships for this very GPU.

Nearest wins: the same GPU before the same generation before another one, then the kernel asked
for, its class of implementation, the engine. What is not a family of this GPU and engine is
*transferred*: its rates scale with the datasheet and the power there is for them, its fixed times
with the clock, and its interval widens.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from costmodel.errors import ConfigError
from costmodel.files import DATA
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.kernels.interval import Interval, disagreement
from costmodel.kernels.kinds import KernelKind, kernel_class, kernel_kind
from costmodel.kernels.moved import Place, built_as, moved, place_of
from costmodel.operation import Array

Basis = Literal["calibrated", "transferred", "prior"]
Within = tuple[tuple[str, float], ...]

#: Where generations stand beside one another. Others (other vendors) have no families near them.
#: GA10x (A10, A40, RTX A6000, RTX 30) has the SMs, the memory and the 100 KB of shared memory of
#: Ada rather than those of the A100: runs on an A6000 scatter by a fifth less about its kernels.
_PLACES = {
    "volta": 0.0,
    "turing": 1.0,
    "ampere": 2.0,
    "ampere-consumer": 2.8,
    "ada": 3.0,
    "blackwell-consumer": 3.5,
    "hopper": 4.5,
    "blackwell": 5.5,
    "blackwell-ultra": 6.5,
}
#: A transfer errs by itself, however well a family fits its own GPU: spreads that add to an
#: interval's logarithm as squares. Within a generation: published for H100 to H200, mean errors of
#: 7 to 15 %. To another one every kind has its own (``costmodel.calibration.transfer``); this one
#: stands where no GPU could be left out. Two engines' families of one kernel and GPU differ by a
#: median of 13.5 %.
SISTER_SPREAD = 0.15
GENERATION_SPREAD = 0.4
ENGINE_SPREAD = 0.2
#: A shape this many times outside the rows of a family that ships is extrapolation: fits of the
#: smaller half of the tables predict calls 4 to 64 times larger with the error of other small ones.
FAR = 4.0
#: The same for families of a user's own, of which nothing of the kind is known.
NOT_FAR = 1.0


#: Around families of a user's own that say nothing of it.
OWN_INTERVAL = {"low": 0.8, "high": 1.25}


@dataclass(frozen=True, slots=True)
class Family:
    """One fitted family, as asked for.

    basis       "calibrated" on this very GPU and engine, else "transferred"; "prior": never fitted
    distance    0 same GPU, 1 same generation, 2 another generation
    far         a shape this many times outside the ranges is extrapolation
    spread      of the logarithm, by which the interval was widened for that and for the engine
    ranges      shapes covered by the rows: column -> (least, most)
    held_out    error on unseen rows, in percent: mape, median, p90, bias, roofline_mape, n
    half_fits   fitted parameters of fits to halves of the rows: name -> one value per fit
    generation_spread   of the logarithm, that a transfer to another generation adds
    """

    kind: KernelKind
    variant: str
    kernel: str
    engine: str
    hardware: str
    generation: str
    parameters: Any
    interval: Interval
    n_rows: int
    ranges: Mapping[str, tuple[float, float]]
    held_out: Mapping[str, float]
    source: str
    basis: Basis = "calibrated"
    distance: int = 0
    spread: float = 0.0
    far: float = FAR
    half_fits: Mapping[str, Sequence[float]] = field(default_factory=dict)
    generation_spread: float = GENERATION_SPREAD

    def time_s(
        self, device: HardwareProfile, shape: Mapping[str, Array], *, cold: bool = True
    ) -> tuple[Array, Array, Array]:
        """(low, mid, high) seconds of one run; a cold low is never below the roofline."""

        def seconds(parameters: Any) -> Array:
            return self.kind.time_s(parameters, device, shape, self.variant, cold)

        mid = seconds(self.parameters)
        low, high = self.factors(seconds)
        least = mid * low
        if cold:
            least = np.maximum(least, self.kind.roofline_s(device, shape, self.variant))
        return np.minimum(least, mid), mid, mid * high

    def factors(self, seconds: Callable[[Any], Array]) -> tuple[Array, Array]:
        """(low, high) on a prediction, which ``seconds`` makes from the kind's parameters."""
        if not self.half_fits:
            return self.interval.factors()
        fits = [
            replace(self.parameters, **dict(zip(self.half_fits, values, strict=True)))
            for values in zip(*self.half_fits.values(), strict=True)
        ]
        return self.interval.factors(disagreement(np.stack([seconds(p) for p in fits])))

    def extrapolated(self, shape: Mapping[str, Array]) -> Array:
        """1.0 where a shape lies ``far`` times or more outside what the rows covered, else 0.0."""
        outside: Any = False
        for name, (least, most) in self.ranges.items():
            if name not in shape:
                continue
            value = np.asarray(shape[name], dtype=np.float64)
            if not value.size or (
                value.min() >= least / self.far and value.max() <= most * self.far
            ):
                continue
            outside = outside | (value < least / self.far) | (value > most * self.far)
        return np.where(outside, 1.0, 0.0) if np.any(outside) else 0.0


@functools.cache
def shipped_families(kind: str) -> tuple[Family, ...]:
    """All families of a kind that ship; none where there is no file."""
    file = DATA / f"families/{kind}.json"
    if not file.is_file():
        return ()
    document = json.loads(file.read_text("utf-8"))
    return tuple(family_from_table(kind, row) for row in document["family"])


def family_from_table(kind: str, row: Mapping[str, Any]) -> Family:
    """Build a family from its table."""
    model = kernel_kind(kind)
    interval = row["interval"]
    return Family(
        kind=model,
        variant=row["variant"],
        kernel=row["kernel"],
        engine=row["engine"],
        hardware=row["hardware"],
        generation=row["generation"],
        parameters=model.build(row["parameters"]),
        interval=Interval(interval["low"], interval["high"], interval["usual"]),
        n_rows=row["n_rows"],
        ranges={name: (ends[0], ends[1]) for name, ends in row["ranges"].items()},
        held_out=row["held_out_percent"],
        source=row["source"],
        half_fits=row["half_fits"],
        generation_spread=row["generation_spread"],
    )


def load_family(
    kind: str,
    engine: str,
    hardware: HardwareProfile,
    *,
    variant: str = "",
    kernel: str = "",
    within: Mapping[str, float] | None = None,
) -> Family | None:
    """The family nearest to a device and an engine; None where none of the kind is near.

    Parameters
    ----------
    kind
        Operation kind, such as ``gemm``.
    engine
        Engine name; "" takes any.
    variant
        Data type or phase the family must be of, as its kind names them.
    kernel
        Kernel name as a table writes it; "" takes the engine's most measured kernel.
    within
        Shape values the family should have been measured at, such as ``element_bytes: 1.0``.

    Returns
    -------
    Family
        With ``basis``, ``distance`` and an interval widened where it is transferred.
    """
    shape = tuple(sorted((within or {}).items()))
    asked = (place_of(hardware), engine.lower(), kernel.lower(), shape)
    own = [f for f in _own_families(kind, hardware) if f.variant == variant]
    if not own:
        return _nearest_shipped(kind, variant, *asked)
    named = (engine.lower(), kernel.lower())
    nearest = min(_apart(f, *named) for f in own)
    if any(nearest):
        # Rows of one kernel or engine say less of another than rows of its own on the same GPU.
        shipped = _nearest_shipped(kind, variant, *asked)
        if shipped and not shipped.distance and _apart(shipped, *named) < nearest:
            return shipped
    return _nearest(own, *asked)


def family_without(
    left_out: str,
    kind: str,
    engine: str,
    hardware: HardwareProfile,
    *,
    variant: str = "",
    kernel: str = "",
    within: Mapping[str, float] | None = None,
    families: Sequence[Family] | None = None,
) -> Family | None:
    """The family that would answer if none had been fitted on the GPU ``left_out``; of those that
    ship, or of ``families``.
    """
    known = shipped_families(kind) if families is None else families
    others = [f for f in known if f.variant == variant and f.hardware != left_out]
    shape = tuple(sorted((within or {}).items()))
    asked = (place_of(hardware), engine.lower(), kernel.lower(), shape)
    return _nearest(others, *asked) if others else None


@functools.lru_cache(maxsize=1024)
def _nearest_shipped(
    kind: str, variant: str, place: Place, engine: str, kernel: str, within: Within
) -> Family | None:
    families = [f for f in shipped_families(kind) if f.variant == variant]
    if not families:
        return None
    return _nearest(families, place, engine, kernel, within)


def _nearest(
    families: Sequence[Family], place: Place, engine: str, kernel: str, within: Within
) -> Family | None:
    def rank(f: Family) -> tuple[float, ...]:
        ends = [(f.ranges.get(name, (value, value)), value) for name, value in within]
        return (
            _distance(f, place),
            _generations_apart(f.generation, place.generation),
            _kernel_distance(f, kernel),
            sum(not least <= value <= most for (least, most), value in ends),
            engine not in ("", f.engine),
            -f.n_rows,
        )

    best = min(families, key=rank)
    if not np.isfinite(_generations_apart(best.generation, place.generation)):
        return None
    distance = _distance(best, place)
    same = engine in ("", best.engine) or not best.engine
    same = same and _is_like(best, kernel)
    own = (0.0, SISTER_SPREAD, best.generation_spread)[distance]
    spread = math.hypot(own, 0.0 if same else ENGINE_SPREAD)
    basis: Basis = "calibrated" if distance == 0 and same else "transferred"
    if distance == 0 and same:
        return replace(best, basis=basis, distance=distance)
    if distance:
        best = _moved(best, place)
    return replace(
        best,
        parameters=built_as(best.kind, best.variant, best.parameters, best.kernel, kernel),
        basis=basis,
        distance=distance,
        interval=best.interval.wider(spread),
        spread=spread,
    )


def _moved(family: Family, place: Place) -> Family:
    """A family with the parameters it has on another device."""
    own = place_of(load_hardware(family.hardware))
    p, fits = family.parameters, family.half_fits
    values = {f.name: getattr(p, f.name) for f in fields(p)}
    there = [
        moved(family.kind, dict(zip(fits, values, strict=True)), own, place)
        for values in zip(*fits.values(), strict=True)
    ]
    return replace(
        family,
        parameters=replace(p, **moved(family.kind, values, own, place)),
        half_fits={name: [fit[name] for fit in there] for name in fits},
    )


def _distance(family: Family, place: Place) -> int:
    if family.hardware == place.hardware:
        return 0
    return 1 if family.generation == place.generation else 2


def _generations_apart(a: str, b: str) -> float:
    if a in _PLACES and b in _PLACES:
        return abs(_PLACES[a] - _PLACES[b])
    return 0.0 if a == b else np.inf


def _kernel_distance(family: Family, kernel: str) -> int:
    if not kernel or not family.kernel or family.kernel == kernel:
        return 0
    return 1 if kernel_class(family.kernel) == kernel_class(kernel) else 2


def _apart(family: Family, engine: str, kernel: str) -> tuple[int, bool]:
    """How far a family is from a kernel and an engine."""
    of_another = bool(family.engine) and engine not in ("", family.engine)
    return _kernel_distance(family, kernel), of_another


def _is_like(family: Family, kernel: str) -> bool:
    """Whether a family is of a kernel or of its class. Names that say nothing may mean anything,
    but in products: cuBLAS is behind all of them.
    """
    apart = _kernel_distance(family, kernel)
    return not apart or (
        apart == 1 and (kernel_class(kernel) != "other" or family.kind.name == "gemm")
    )


#: What the keys of the least and the largest value of a shape start with.
ENDS = ("least_", "most_")


def own_engines(hardware: HardwareProfile) -> list[str]:
    """Engines whose kernels a profile's own families are."""
    named = (name.split("/", 3) for name in hardware.families)
    return sorted({parts[2] for parts in named if len(parts) > 2 and parts[2]})


def _own_families(kind: str, hardware: HardwareProfile) -> list[Family]:
    """Families a profile carries: ``[families."<kind>/<variant>[/<engine>[/<kernel>]]"]``, plain
    numbers.
    """
    out = []
    for name, numbers in hardware.families.items():
        own_kind, variant, engine, kernel = (*name.split("/", 3), "", "", "")[:4]
        if own_kind != kind:
            continue
        ranges = {
            key.removeprefix(ENDS[0]): (value, numbers[key.replace(*ENDS, 1)])
            for key, value in numbers.items()
            if key.startswith(ENDS[0]) and key.replace(*ENDS, 1) in numbers
        }
        model = kernel_kind(kind)
        parameters = model.build(numbers)
        model.check(numbers, kernel, variant)
        low, high = (numbers.get(f"interval_{end}", value) for end, value in OWN_INTERVAL.items())
        if not 0.0 < low <= 1.0 <= high:
            raise ConfigError(
                f"families.{name}: expected interval_low in (0, 1] and interval_high of at least "
                f"1, got {low:g} and {high:g}"
            )
        out.append(
            Family(
                kind=model,
                variant=variant,
                kernel=kernel,
                engine=engine,
                hardware=hardware.name,
                generation=hardware.generation,
                parameters=parameters,
                interval=Interval(low, high),
                n_rows=int(numbers.get("n_rows", 0)),
                ranges=ranges,
                held_out={
                    k.removeprefix("held_out_"): v
                    for k, v in numbers.items()
                    if k.startswith("held_out_")
                },
                source=hardware.calibration.get("table", "calibration of this profile"),
                far=NOT_FAR,
            )
        )
    return out

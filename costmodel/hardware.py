"""What a device can do: datasheet numbers, each with a source, and optional calibration.

Profiles are ``hardware_profiles/*.toml`` or a user's own file of the same form (the README there
names each field). Prices live apart, in a dated file. A calibrated profile adds ``[families.*]``
(physical kernel parameters, fitted from tables) or ``[curves.*]`` (efficiency measured on this very
device), with ``[calibration]`` saying when and from what.
"""

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from costmodel.errors import ConfigError, UnknownNameError
from costmodel.files import HARDWARE_PROFILES
from costmodel.prices import Price, bundled_prices, user_prices
from costmodel.tables import Fields, read_toml, short

#: Compute types a peak can be given for.
PEAK_DTYPES = frozenset(
    {"fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp6", "fp4", "int4"}
)
#: Longest text of a calibration's fact: the keys of a thousand records that anchor a profile.
_MAX_FACT = 18_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Measured cost of one operation class on one device.

    ``x`` grid of the size the class depends on (its unit is in the class name), ``y`` the measured
    seconds per unit of work at that size. Interpolated in log space; outside the grid the end
    value holds and the prediction is marked ``extrapolated``.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """One device. Rates are dense datasheet figures.

    peak_flops_per_s   by compute dtype (fp32, tf32, bf16, fp16, fp8, int8, fp4, ...); tensor-core
                       rates with fp32 accumulation
    hbm_bytes_per_s    memory bandwidth
    memory_bytes       capacity as the driver reports it
    memory_marketing_bytes  capacity on the box, for display only
    l2_bytes           last-level cache; n_units: SMs, CUs, cores
    clock_hz           clock that the compute peaks stand for
    link_bytes_per_s   GPU to GPU, one direction, per GPU; None without such a link
    host_link_bytes_per_s   to host memory, one direction
    tdp_w, price_usd_per_hour (low, mid, high), price_date
    sources, confidence     per field name
    curves             measured efficiency (only in a profile of the device it was measured on)
    families           fitted kernel-family parameters: kind -> parameter -> value
    anchors            "prefill", "decode": observed over predicted seconds of some run, one factor
                       for all times of the phase
    calibration        where curves and families come from: date, rows, source, ...
    """

    name: str
    title: str
    vendor: str
    generation: str
    n_units: int | None
    peak_flops_per_s: Mapping[str, float]
    hbm_bytes_per_s: float
    memory_bytes: float
    memory_marketing_bytes: float
    l2_bytes: float | None
    tdp_w: float | None
    link_bytes_per_s: float | None
    host_link_bytes_per_s: float | None
    clock_hz: float | None = None
    price_usd_per_hour: tuple[float, float, float] | None = None
    price_date: str = ""
    price_source: str = ""
    max_gpus_per_node: int = 8
    is_cpu: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)
    confidence: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    families: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    anchors: Mapping[str, float] = field(default_factory=dict)
    calibration: Mapping[str, str] = field(default_factory=dict)

    @property
    def anchored_by(self) -> list[str] | None:
        """Keys of the records that the anchors were taken from; None without anchors."""
        if not self.anchors:
            return None
        return [k for k in self.calibration.get("anchored_by", "").split(", ") if k]

    def peak(self, dtype: str) -> float:
        """Dense peak of a compute dtype; raises ``ConfigError`` where the device has none."""
        if dtype in self.peak_flops_per_s:
            return self.peak_flops_per_s[dtype]
        known = ", ".join(sorted(self.peak_flops_per_s))
        other = {"bf16": "fp16", "fp16": "bf16"}.get(dtype)
        hint = f" Use --dtype {other}." if other in self.peak_flops_per_s else ""
        raise ConfigError(f"{self.name} has no {dtype} peak; it has: {known}.{hint}")

    def ridge_flops_per_byte(self, dtype: str) -> float:
        """Arithmetic intensity at which compute and bandwidth take the same time."""
        return self.peak(dtype) / self.hbm_bytes_per_s


# Names ---------------------------------------------------------------------------------------


def _folder() -> Path:
    return HARDWARE_PROFILES


def _is_profile(file_name: str) -> bool:
    return file_name.endswith(".toml") and not file_name.startswith(("prices-", "aliases."))


def gpu_names() -> list[str]:
    """Names of all bundled profiles, from the file names alone."""
    return sorted(f.name[:-5] for f in _folder().iterdir() if _is_profile(f.name))


def normalised(name: str) -> str:
    """Lower case, with every run of spaces, underscores and hyphens as one hyphen."""
    return re.sub(r"[\s_-]+", "-", name.strip().lower())


@functools.cache
def _aliases() -> dict[str, str]:
    table = read_toml(_folder().joinpath("aliases.toml"))
    return {normalised(spelling): name for name, row in table.items() for spelling in row}


def resolve_gpu(name: str) -> str:
    """The bundled name behind any known spelling; raises ``UnknownNameError``.

    A bundled name costs one file lookup; only other spellings read the alias file.
    """
    key = normalised(name)
    plain = re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", key) is not None
    if plain and _is_profile(f"{key}.toml") and _folder().joinpath(f"{key}.toml").is_file():
        return key
    if key in _aliases():
        return _aliases()[key]
    raise UnknownNameError("GPU", name[:80], gpu_names(), "See: lccost gpus list")


# Loading -------------------------------------------------------------------------------------


def load_hardware(name_or_path: str | Path, *, prices: str | Path | None = None) -> HardwareProfile:
    """Read a bundled profile (by name or alias) or a user's TOML file (by path).

    Anything that ends in ``.toml`` or holds a path separator is a path. ``prices`` is a price file
    whose rows go before those of the profile and of the bundled file.

    Raises ``UnknownNameError`` with the near matches, ``ConfigError`` with every bad field.
    """
    path = profile_path(name_or_path)
    profile = profile_from_table(read_toml(path), str(path))
    return _priced(profile, prices)


def profile_path(name_or_path: str | Path) -> Path:
    """The file of a bundled profile (by name or alias), or the user's own; raises as
    ``load_hardware`` where there is none.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text or "\\" in text:
        return _file(text)
    return _folder().joinpath(f"{resolve_gpu(text)}.toml")


def _file(text: str) -> Path:
    try:
        path = Path(text).expanduser()
        found = path.is_file() or path.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a null character
        found = False
    if not found:
        raise ConfigError(f"{text[:200]}: there is no such profile file. See: lccost gpus list")
    return path


def _priced(profile: HardwareProfile, prices: str | Path | None) -> HardwareProfile:
    price: Price | None = None
    if prices is not None:
        price = known_prices(prices).get(profile.name)
    if price is None and profile.price_usd_per_hour is None:
        price = bundled_prices().get(profile.name)
    if price is None:
        return profile
    return replace(
        profile,
        price_usd_per_hour=(price.low, price.mid, price.high),
        price_date=price.date,
        price_source=price.source,
    )


def known_prices(path: str | Path) -> dict[str, Price]:
    """A user's price file by the names of the profiles."""
    return {_known(name): row for name, row in user_prices(path).items()}


def _known(name: str) -> str:
    """A price row may use any spelling, or the name of a user's own profile."""
    try:
        return resolve_gpu(name)
    except UnknownNameError:
        return name


def profile_from_table(table: Mapping[str, Any], where: str) -> HardwareProfile:
    """Check one profile's fields and build it; raises one ``ConfigError`` with all bad fields.

    The ranges are wide enough for a phone and for a wafer, and narrow enough to catch a wrong
    unit: 3350 is no bandwidth in bytes per second.
    """
    f = Fields(table, where)
    name = f.text("name", required=True)
    if not name.isprintable() or len(name) > 100:
        f.problem("name", f"expected up to 100 printable characters, got {short(name)}")
    memory_bytes = _size(f, "memory_bytes", 1e8, required=True) or 0.0
    profile = HardwareProfile(
        name=name,
        title=f.text("title", default=name),
        vendor=f.text("vendor"),
        generation=f.text("generation", required=True).strip().lower(),
        n_units=f.whole("n_units", unit="SMs, CUs or cores", low=1, high=1_000_000),
        peak_flops_per_s=_peaks(f),
        hbm_bytes_per_s=_rate(f, "hbm_bytes_per_s", required=True) or 0.0,
        memory_bytes=memory_bytes,
        memory_marketing_bytes=_size(f, "memory_marketing_bytes", 1e8) or memory_bytes,
        l2_bytes=_size(f, "l2_bytes", 1e4),
        clock_hz=f.number("clock_hz", unit="hertz (1.755e9, not 1755)", low=1e7, high=1e11),
        tdp_w=f.number("tdp_w", unit="watts (700, not 0.7 kW)", low=2.0, high=1e5),
        link_bytes_per_s=_rate(f, "link_bytes_per_s"),
        host_link_bytes_per_s=_rate(f, "host_link_bytes_per_s"),
        price_usd_per_hour=_price(f),
        price_date=f.text("price_date"),
        price_source=f.text("price_source"),
        max_gpus_per_node=f.whole("max_gpus_per_node", unit="GPUs", low=1, high=100_000) or 8,
        is_cpu=f.flag("is_cpu"),
        sources=f.texts("sources"),
        confidence=f.texts("confidence"),
        notes=_notes(f),
        curves=_curves(f),
        families=_families(f),
        anchors=_anchors(f),
        calibration={k: str(v)[:_MAX_FACT] for k, v in f.sub("calibration").items()},
    )
    f.unknown()
    f.finish()
    return profile


def _rate(f: Fields, key: str, *, required: bool = False) -> float | None:
    unit = "bytes per second (3.35e12, not 3350 GB/s)"
    return f.number(key, unit=unit, low=1e8, high=1e15, required=required)


def _size(f: Fields, key: str, low: float, *, required: bool = False) -> float | None:
    return f.number(key, unit="bytes (80e9, not 80 GB)", low=low, high=1e15, required=required)


def _peaks(f: Fields) -> dict[str, float]:
    key, out = "peak_flops_per_s", {}
    for dtype, value in f.sub(key, required=True).items():
        if dtype not in PEAK_DTYPES:
            f.problem(f"{key}.{dtype}", f"expected one of {', '.join(sorted(PEAK_DTYPES))}")
            continue
        unit = "FLOPs per second (989e12, not 989 TFLOP/s)"
        out[dtype] = f.check_number(f"{key}.{dtype}", value, unit, 1e8, 1e19)
    if not out and not f.problems:
        f.problem(key, "expected at least one dtype, such as bf16 = 989e12")
    return out


def _price(f: Fields) -> tuple[float, float, float] | None:
    key = "price_usd_per_hour"
    row = f.array(key)
    if not row:
        return None
    usd = [f.check_number(key, v, "US dollars per GPU-hour", 0.0, 1000.0) for v in row[:3]]
    if len(row) != 3 or not usd[0] <= usd[1] <= usd[2]:
        f.problem(key, f"expected [low, mid, high], got {short(str(row))}")
        return None
    return usd[0], usd[1], usd[2]


def _notes(f: Fields) -> tuple[str, ...]:
    notes = f.array("notes")
    if not all(isinstance(n, str) for n in notes):
        f.problem("notes", "expected a list of texts")
        return ()
    return tuple(notes)


def _curves(f: Fields) -> dict[str, Curve]:
    """``[curves.<class>]``: x increasing and positive, y positive, of one length."""
    out = {}
    for name, row in f.sub("curves").items():
        key = f"curves.{name}"
        if not isinstance(row, dict):
            f.problem(key, f"expected a table with x, y and spread, got {short(row)}")
            continue
        inner = Fields(row, f.where, f"{key}.")
        _check_curve_name(inner, name)
        x, y = (
            tuple(inner.check_number(a, v, "a number above 0", 1e-30, 1e30) for v in inner.array(a))
            for a in ("x", "y")
        )
        spread = inner.number("spread", unit="a fraction", low=0.0, high=10.0) or 0.0
        inner.unknown()
        if not x or len(x) != len(y):
            inner.problem(
                "y", f"expected one value per x (at least one), got {len(y)} for {len(x)}"
            )
        elif any(b <= a for a, b in itertools.pairwise(x)):
            inner.problem("x", "expected increasing values")
        f.problems += inner.problems
        out[name] = Curve(x=x, y=y, spread=spread)
    return out


def _check_curve_name(f: Fields, name: str) -> None:
    """``<class>/<dtype>[/<parameter>=<number above 0>]...``, as ``kernels.curves`` reads it."""
    for part in name.split("/"):
        _, equals, value = part.partition("=")
        try:
            ok = not equals or 0.0 < float(value) < 1e30
        except ValueError:
            ok = False
        if not ok or not part:
            f.problem("name", f"expected parameter=number in {short(name)}, got {short(part)}")


def _anchors(f: Fields) -> dict[str, float]:
    """``[anchors]``: prefill and decode, factors near one."""
    found = f.sub("anchors")
    for name in sorted(set(found) - {"prefill", "decode"}):
        f.problem(f"anchors.{name}", "expected only prefill and decode")
    return {
        k: f.check_number(f"anchors.{k}", v, "a factor", 0.01, 100.0)
        for k, v in found.items()
        if k in ("prefill", "decode")
    }


def _families(f: Fields) -> dict[str, dict[str, float]]:
    """``[families.<kind>]``: parameter = number."""
    out: dict[str, dict[str, float]] = {}
    for kind, row in f.sub("families").items():
        if not isinstance(row, dict):
            f.problem(f"families.{kind}", f"expected a table of numbers, got {short(row)}")
            continue
        out[kind] = {
            k: f.check_number(f"families.{kind}.{k}", v, "a number", -1e30, 1e30)
            for k, v in row.items()
        }
    return out

"""The ``[workload]`` table: exactly one kind of demand, and only the keys that go with it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from costmodel.errors import LccostError
from costmodel.methods.parse import parse_method
from costmodel.planning.arrivals import Arrivals, read_arrivals, read_prefix_cache
from costmodel.planning.demand import Demand
from costmodel.planning.lengths import Lengths, read_lengths
from costmodel.tables import Fields, short

T = TypeVar("T")
Kind = Literal["trace", "rate", "users", "concurrency"]
_KINDS: dict[str, Kind] = {
    "trace": "trace",
    "rate_per_s": "rate",
    "concurrency": "concurrency",
    "users": "users",
}
_MAX_RATE = 1e6


def read_demand(
    table: Mapping[str, Any], where: str, folder: Path, problems: list[str]
) -> Demand | None:
    """The demand, or None beside what was appended to ``problems``."""
    f = Fields(table, where, "workload.")
    given = [k for k in _KINDS if k in table]
    if len(given) != 1:
        f.problem(
            given[1] if given else "trace",
            f"expected exactly one of {', '.join(_KINDS)}; got {', '.join(given) or 'none'}",
        )
    kind = _KINDS[given[0]] if given else "trace"
    trace = f.text("trace")
    rate = f.number("rate_per_s", unit="requests per second", low=1e-6, high=_MAX_RATE)
    concurrency = f.whole("concurrency", unit="sessions", low=1, high=10_000_000)
    if kind == "users":
        rate = _users_rate(f)
    else:
        for key in ("active_fraction", "requests_per_minute", "peak_factor"):
            if key in table:
                f.problem(key, "goes with users, not with another kind of demand")
    scale = f.number("scale", unit="a factor", low=1e-6, high=1e6)
    growth = f.number("growth", unit="a factor", low=1e-3, high=1e3)
    arrivals = _arrivals(f, kind)
    off: float | None = 0.0
    prefix = _value(f, "prefix_cache", lambda x: read_prefix_cache(_text(x)), off)
    lengths = {k: _lengths(f, k, kind, folder) for k in ("input_tokens", "output_tokens")}
    factors = _factors(f)
    n_requests = f.whole("requests", unit="requests", low=10, high=20_000_000)
    seed = f.whole("seed", unit="a seed", low=0, high=2**63 - 1)
    if prefix is None and kind != "trace":
        f.problem("prefix_cache", "ideal needs the blocks of a trace; give hit=SHARE instead")
    if n_requests is not None and trace:
        f.problem("requests", "goes with a drawn workload; a trace has its own requests")
    f.unknown(("active_fraction", "requests_per_minute", "peak_factor", "users"))
    path = folder / Path(trace).expanduser() if trace else None
    if path is not None and not path.is_file():
        f.problem("trace", f"there is no such file: {path}")
    problems += f.problems
    if f.problems:
        return None
    return Demand(
        kind=kind,
        trace=path,
        rate_per_s=rate,
        concurrency=concurrency,
        scale=scale or 1.0,
        growth=growth or 1.0,
        arrivals=arrivals,
        prefix_share=prefix,
        input_tokens=lengths["input_tokens"],
        output_tokens=lengths["output_tokens"],
        output_factors=factors,
        n_requests=n_requests or 10_000,
        seed=seed or 0,
    )


def _users_rate(f: Fields) -> float:
    """Multiply users x active fraction x requests per user and minute / 60 x peak factor."""
    users = f.number("users", unit="users", low=1, high=1e10) or 1.0
    active = f.number("active_fraction", unit="a share", low=1e-9, high=1.0)
    per_minute = f.number(
        "requests_per_minute",
        unit="requests per active user and minute",
        low=1e-9,
        high=1e4,
        required=True,
    )
    peak = f.number("peak_factor", unit="a factor", low=1.0, high=1e3)
    return users * (active or 1.0) * (per_minute or 1.0) / 60.0 * (peak or 1.0)


def _arrivals(f: Fields, kind: Kind) -> Arrivals:
    default = Arrivals(kind="trace" if kind in ("trace", "concurrency") else "poisson")
    arrivals = _value(f, "arrivals", lambda x: read_arrivals(_text(x)), default)
    if kind == "concurrency" and "arrivals" in f.table:
        f.problem("arrivals", "a concurrency has none: each answer brings the next request")
    elif kind in ("rate", "users") and arrivals.kind == "trace":
        f.problem("arrivals", "there is no trace to take them from; expected poisson or gamma:CV")
    return arrivals


def _lengths(f: Fields, key: str, kind: Kind, folder: Path) -> Lengths | None:
    value = f.raw(key)
    if kind == "trace":
        if value is not None and "trace" in f.table:
            f.problem(key, "a trace has its own lengths; use rate_per_s with this key")
        return None
    if value is None:
        f.problem(key, "missing; expected tokens, a CDF or a distribution")
        return None
    return _value(f, key, lambda x: read_lengths(x, key, folder), None)


def _factors(f: Fields) -> dict[str, float]:
    """One factor for every method but full, or a table by method."""
    key = "output_tokens_factor"
    value = f.raw(key)
    if value is None:
        return {}
    rows = value if isinstance(value, dict) else {"*": value}
    named = isinstance(value, dict)
    for name in rows if named else ():
        try:
            parse_method(str(name))
        except LccostError as error:
            f.problem(f"{key}.{name}", str(error))
    return {
        str(k): f.check_number(f"{key}.{k}" if named else key, v, "a factor", 0.1, 100.0)
        for k, v in rows.items()
    }


def _value(f: Fields, key: str, read: Callable[[Any], T], default: T) -> T:
    value = f.raw(key)
    if value is None:
        return default
    try:
        return read(value)
    except LccostError as error:
        f.problem(key, str(error).removeprefix(f"{key}: "))
        return default


def _text(value: object) -> str:
    return value if isinstance(value, str) else short(value)

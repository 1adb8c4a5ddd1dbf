"""``plan.toml``: every key checked, every problem reported at once, with its line.

``read_plan`` returns a :class:`PlanSpec`; ``PlanSpec.table`` is what was read, so that a result can
be run again from its own output.
"""

import contextlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from costmodel.errors import ConfigError, LccostError, UnknownNameError
from costmodel.hardware import load_hardware, resolve_gpu
from costmodel.methods.parse import parse_methods
from costmodel.planning.demand import Demand
from costmodel.planning.slo import Slo, read_slo
from costmodel.planning.workload_spec import read_demand
from costmodel.prices import user_prices
from costmodel.quality import task_families
from costmodel.tables import MAX_FILE_BYTES, Fields, parse_toml, short

SECTIONS = ("workload", "slo", "candidates", "accuracy", "prices")
#: 400 Gbit/s per GPU, as InfiniBand NDR or RoCE nodes have.
TRANSFER_BYTES_PER_S = 50e9
ROUTERS = ("least_requests", "round_robin", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What may be chosen: the product of these is the list of candidates.

    chunk_tokens   most tokens of one engine iteration; None: the engine's own
    max_batch      most sequences decoding together on one replica
    router         how requests are spread over replicas
    transfer_bytes_per_s  network rate per GPU between prefill and decode pools
    """

    models: tuple[str, ...]
    methods: tuple[str, ...]
    levels: tuple[str, ...]
    gpus: tuple[str, ...]
    tp: tuple[int, ...]
    pp: tuple[int, ...]
    ep: tuple[int, ...]
    cp: tuple[int, ...]
    engines: tuple[str, ...]
    disaggregated: bool
    mixed_fleets: bool
    max_gpus: int
    memory_fraction: float
    weight_dtype: str
    dtype: str | None
    chunk_tokens: int | None
    max_batch: int
    router: str
    transfer_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyFloor:
    """Largest drop in points against the same model uncompressed; None: any."""

    max_drop_points: float | None = None
    task_family: str | None = None
    allow_unknown: bool = False
    allow_analogy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Money:
    """The price file, and power where it is paid apart from the rent."""

    file: Path | None = None
    power_usd_per_kwh: float | None = None
    pue: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """A checked plan file. ``own_workload``: its workload is that of the file at ``where``."""

    demand: Demand
    slo: Slo
    grid: Grid
    accuracy: AccuracyFloor
    money: Money
    table: Mapping[str, Any]
    where: str
    own_workload: bool = False

    @property
    def size(self) -> int:
        """Combinations before any is ruled out."""
        g = self.grid
        n = 1
        for part in (g.models, g.methods, g.levels, g.gpus, g.tp, g.pp, g.ep, g.cp, g.engines):
            n *= max(1, len(part))
        return n


def read_plan(path: Path | None, overrides: Sequence[tuple[str, Any]] = ()) -> PlanSpec:
    """Read a file (or start from nothing) and lay ``section.key`` overrides over it (None takes a
    key out).

    Raises one ``ConfigError`` with every problem and, where the key stands in the file, its line.
    """
    table: dict[str, Any] = {}
    raw = b""
    where, folder = "plan", Path()
    if path is not None:
        path = path.expanduser()
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such plan file. Make one: lccost init")
        raw = path.read_bytes()[: MAX_FILE_BYTES + 1]
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: expected at most {MAX_FILE_BYTES} bytes of TOML, got more")
        where, folder = str(path), path.parent
        table = parse_toml(raw, where)
    for key, value in overrides:
        section, _, name = key.partition(".")
        rows = table.setdefault(section, {})
        if not isinstance(rows, dict):
            raise ConfigError(f"{where}: {section}: expected a table, got {short(rows)}")
        if value is None:
            rows.pop(name, None)
        else:
            rows[name] = value
    found = plan_from_table(table, where, folder, raw)
    return replace(found, own_workload=path is not None and not _of_workload(overrides))


def _of_workload(overrides: Sequence[tuple[str, Any]]) -> bool:
    return any(key.startswith("workload.") for key, _ in overrides)


def plan_from_table(
    table: Mapping[str, Any], where: str, folder: Path, raw: bytes = b""
) -> PlanSpec:
    """Check a parsed plan; ``folder`` is where relative paths start."""
    top = Fields(table, where)
    parts = {name: top.sub(name) for name in SECTIONS}
    top.unknown()
    problems = top.problems
    demand = read_demand(parts["workload"], where, folder, problems)
    slo = read_slo(parts["slo"], where, problems)
    if slo.is_empty and not any(p.startswith("slo.") for p in problems):
        problems.append("slo: expected at least one limit, such as ttft_p99_s = 30")
    grid = _grid(parts["candidates"], where, problems)
    accuracy = _accuracy(parts["accuracy"], where, problems)
    money = _money(parts["prices"], where, folder, grid.gpus, problems)
    if problems:
        last = Fields({}, where)
        last.problems = [_with_line(p, raw) for p in problems]
        last.finish()
    assert demand is not None
    return PlanSpec(
        demand=demand, slo=slo, grid=grid, accuracy=accuracy, money=money, table=table, where=where
    )


def _with_line(problem: str, raw: bytes) -> str:
    """``slo.ttft_p99_s: ...`` with the line on which the key stands."""
    key = problem.partition(":")[0]
    section, _, name = key.partition(".")
    current = ""
    pattern = rf"\s*{re.escape(name.split('.')[0])}\s*[.=]"
    for number, line in enumerate(raw.decode("utf-8", "replace").splitlines(), start=1):
        if head := re.match(r"\s*\[\s*([A-Za-z_]+)", line):
            current = head[1]
            if current == section and not name:
                return f"line {number}: {problem}"
        elif name and current == section and re.match(pattern, line):
            return f"line {number}: {problem}"
    return problem


def _names(f: Fields, key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
    value = f.raw(key)
    if value is None:
        return tuple(default)
    rows = [value] if isinstance(value, str) else value
    if not isinstance(rows, list) or not rows or not all(isinstance(x, str) and x for x in rows):
        f.problem(key, f"expected a list of names, got {short(value)}")
        return tuple(default)
    return tuple(dict.fromkeys(rows))


def _degrees(f: Fields, key: str) -> tuple[int, ...]:
    value = f.raw(key)
    rows = value if isinstance(value, list) else [1 if value is None else value]
    good = [x for x in rows if isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= 1024]
    if len(good) != len(rows) or not rows:
        bad = next((x for x in rows if x not in good), value)
        f.problem(key, f"expected whole numbers of 1 to 1024, got {short(bad)}")
        return (1,)
    return tuple(dict.fromkeys(good))


def _grid(table: Mapping[str, Any], where: str, problems: list[str]) -> Grid:
    from costmodel.engines import load_engine
    from costmodel.registry import load_architecture

    f = Fields(table, where, "candidates.")
    grid = Grid(
        models=_names(f, "models"),
        methods=_names(f, "methods", ("full",)),
        levels=_names(f, "levels", ("ideal",)),
        gpus=_names(f, "gpus"),
        tp=_degrees(f, "tp"),
        pp=_degrees(f, "pp"),
        ep=_degrees(f, "ep"),
        cp=_degrees(f, "cp"),
        engines=_names(f, "engines"),
        disaggregated=f.flag("disaggregated"),
        mixed_fleets=f.flag("mixed_fleets"),
        max_gpus=f.whole("max_gpus", unit="GPUs", low=1, high=100_000) or 64,
        memory_fraction=f.number("memory_fraction", unit="a share", low=0.05, high=1.0) or 0.9,
        weight_dtype=f.text("weight_dtype", default="checkpoint"),
        dtype=f.text("dtype") or None,
        chunk_tokens=f.whole("chunk_tokens", unit="tokens", low=16, high=1 << 22),
        max_batch=f.whole("max_batch", unit="sequences", low=1, high=4096) or 256,
        router=f.text("router", default=ROUTERS[0]),
        transfer_bytes_per_s=f.number(
            "transfer_bytes_per_s", unit="bytes per second", low=1e6, high=1e13
        )
        or TRANSFER_BYTES_PER_S,
    )
    f.unknown()
    for key, loader, names in (
        ("models", load_architecture, grid.models),
        ("gpus", load_hardware, grid.gpus),
        ("engines", load_engine, grid.engines),
    ):
        if not names and key != "engines" and key not in table:
            f.problem(key, f"missing; expected at least one of the {key}")
        for name in names:
            _try(f, key, loader, name)
    _try(f, "methods", parse_methods, grid.methods)
    for level in grid.levels:
        if level not in ("ideal", "reference"):
            f.problem("levels", f"expected ideal or reference, got {short(level)}")
    if grid.router not in ROUTERS:
        f.problem("router", f"expected one of {', '.join(ROUTERS)}, got {short(grid.router)}")
    problems += f.problems
    return grid


def _try(f: Fields, key: str, load: Any, argument: Any) -> None:
    try:
        load(argument)
    except LccostError as error:
        f.problem(key, str(error))


def _accuracy(table: Mapping[str, Any], where: str, problems: list[str]) -> AccuracyFloor:
    f = Fields(table, where, "accuracy.")
    family = f.text("task_family") or None
    if family is not None and not any(x.startswith(family) for x in task_families()):
        f.problem("task_family", str(UnknownNameError("task family", family, task_families())))
    floor = AccuracyFloor(
        max_drop_points=f.number("max_drop_points", unit="points", low=0.0, high=100.0),
        task_family=family,
        allow_unknown=f.flag("allow_unknown"),
        allow_analogy=f.flag("allow_analogy"),
    )
    f.unknown()
    problems += f.problems
    return floor


def _money(
    table: Mapping[str, Any], where: str, folder: Path, gpus: Sequence[str], problems: list[str]
) -> Money:
    f = Fields(table, where, "prices.")
    name = f.text("file")
    power = f.number("power_usd_per_kwh", unit="US dollars per kWh", low=0.0, high=100.0)
    pue = f.number("pue", unit="a factor", low=1.0, high=5.0)
    f.unknown()
    file = folder / Path(name).expanduser() if name else None
    if file is not None:
        _try(f, "file", partial(_check_prices, gpus=gpus), file)
    problems += f.problems
    return Money(file=file, power_usd_per_kwh=power, pue=pue or 1.0)


def _check_prices(file: Path, gpus: Sequence[str]) -> None:
    """Every line must be of a known GPU, or of a candidate's own profile, and dated."""
    own = set()
    for gpu in gpus:
        with contextlib.suppress(LccostError):  # reported with the candidates
            own.add(load_hardware(gpu).name)
    for name, price in user_prices(file).items():
        if name not in own:
            resolve_gpu(name)
        if not price.date:
            raise ConfigError(f'{file}: {name} has no date: put date = "2026-11-21" on top')


def parse_override(text: str) -> tuple[str, Any]:
    """``section.key=value`` with a TOML value; a bare word is text."""
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or key.count(".") != 1 or key.partition(".")[0] not in SECTIONS:
        raise ConfigError(
            f"expected SECTION.KEY=VALUE with a section of {', '.join(SECTIONS)}, got {short(text)}"
        )
    try:
        return key, tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return key, value

"""What a GPU-hour costs: a dated file of ranges, apart from the profiles and easily replaced.

Prices move weekly and spread 2.5 to 4 times for the same part, so a price is (low, mid, high) with
its source and date. ``hardware_profiles/prices-*.toml`` is the bundled file (the latest counts); a
user's own file of the same form, even of one line, goes before it:

    date = "2026-11-21"
    h100-sxm = 2.49
    l40s = { low = 0.8, mid = 1.0, high = 1.8, source = "our contract" }
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from costmodel.files import HARDWARE_PROFILES
from costmodel.tables import Fields, read_toml, short

_DATE = re.compile(r"^\d{4}-\d{2}(-\d{2})?$")
#: A GPU-hour outside this range is a slip of unit (cents, or a whole node's purchase price).
_LOW_USD, _HIGH_USD = 0.0, 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """US dollars for one GPU-hour, with the date and source of the figures."""

    low: float
    mid: float
    high: float
    date: str
    source: str
    note: str = ""


def read_prices(path: Path) -> dict[str, Price]:
    """Every price of a file by the name it stands under; raises ``ConfigError``."""
    table = read_toml(path)
    where = str(path)
    fields = Fields(table, where)
    date = _date(fields, "date", "")
    fields.text("about")
    out: dict[str, Price] = {}
    for name, row in table.items():
        if name in ("date", "about"):
            continue
        if not isinstance(row, dict):
            usd = fields.check_number(name, row, "US dollars per GPU-hour", _LOW_USD, _HIGH_USD)
            out[name] = Price(low=usd, mid=usd, high=usd, date=date, source=where)
            continue
        out[name] = _row(row, name, date, where, fields.problems)
    fields.finish()
    return out


def _row(
    row: Mapping[str, Any], name: str, file_date: str, where: str, problems: list[str]
) -> Price:
    fields = Fields(row, where, f"{name}.")

    def usd(key: str) -> float:
        value = fields.number(
            key, unit="US dollars per GPU-hour", low=_LOW_USD, high=_HIGH_USD, required=True
        )
        return value or 0.0

    price = Price(
        low=usd("low"),
        mid=usd("mid"),
        high=usd("high"),
        date=_date(fields, "date", file_date),
        source=fields.text("source", default=where),
        note=fields.text("note"),
    )
    fields.unknown()
    if not fields.problems and not price.low <= price.mid <= price.high:
        fields.problem(
            "mid", f"expected low <= mid <= high, got {price.low}, {price.mid}, {price.high}"
        )
    problems += fields.problems
    return price


def _date(fields: Fields, key: str, default: str) -> str:
    text = fields.text(key, default=default)
    if text and not _DATE.match(text):
        fields.problem(key, f'expected a date such as "2026-11-21", got {short(text)}')
    return text


@functools.cache
def bundled_prices() -> dict[str, Price]:
    """The latest bundled price file."""
    files = sorted(HARDWARE_PROFILES.glob("prices-*"))
    return read_prices(files[-1]) if files else {}


def user_prices(path: str | Path) -> dict[str, Price]:
    """A user's own price file."""
    return read_prices(Path(path))

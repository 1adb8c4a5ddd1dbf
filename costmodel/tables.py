"""Reading a user's TOML safely: size limits, typed fields, every problem reported at once.

A file may be broken, truncated, enormous or hostile; what comes out is either plain checked values
or one ``ConfigError`` that names the file and each bad key.
"""

import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from costmodel.errors import ConfigError

#: No profile, price or alias file is near this; reading stops here, whatever the file is.
MAX_FILE_BYTES = 1_000_000


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a regular file of at most ``MAX_FILE_BYTES``; raises ``ConfigError``."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise ConfigError(f"{path}: expected a TOML file, found {what}")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: expected at most {MAX_FILE_BYTES} bytes of TOML, got more")
    return parse_toml(raw, str(path))


def parse_toml(raw: bytes, where: str) -> dict[str, Any]:
    """Parse bytes; ``where`` names them in the error."""
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: expected UTF-8 text, byte {error.start} is not") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply to be read") from None
    except ValueError as error:  # TOMLDecodeError, and integers beyond Python's digit limit
        raise ConfigError(f"{where}: not valid TOML: {error}") from None


class Fields:
    """Typed access to one table that remembers problems instead of stopping at the first.

    Read every field, then call :meth:`finish`. Values returned beside a problem are placeholders.
    """

    def __init__(self, table: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.table = table
        self.where = where
        self.prefix = prefix
        self.problems: list[str] = []
        self._read: set[str] = set()

    def problem(self, key: str, text: str) -> None:
        """Remember that a key is wrong."""
        self.problems.append(f"{self.prefix}{key}: {text}")

    def _take(self, key: str, required: bool, expected: str) -> Any:
        self._read.add(key)
        value = self.table.get(key)
        if value is None and required:
            self.problem(key, f"missing; expected {expected}")
        return value

    def raw(self, key: str) -> Any:
        """The value as it stands, None where absent; the caller checks it."""
        return self._take(key, False, "")

    def number(
        self, key: str, *, unit: str, low: float, high: float, required: bool = False
    ) -> float | None:
        """A finite number from ``low`` to ``high``; the range is what catches a wrong unit."""
        value = self._take(key, required, unit)
        return None if value is None else self.check_number(key, value, unit, low, high)

    def check_number(self, key: str, value: object, unit: str, low: float, high: float) -> float:
        """The same for a value already in hand."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problem(key, f"expected {unit}, got {short(value)}")
            return low
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or not low <= number <= high:
            self.problem(key, f"expected {unit} between {low:g} and {high:g}, got {short(value)}")
            return low
        return number

    def whole(self, key: str, *, unit: str, low: int, high: int) -> int | None:
        """A whole number."""
        value = self._take(key, False, unit)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.problem(
                key, f"expected {unit}, a whole number of {low} to {high}, got {short(value)}"
            )
            return low
        return value

    def text(self, key: str, *, required: bool = False, default: str = "") -> str:
        """A string of at most 2,000 characters."""
        value = self._take(key, required, "text")
        if value is None:
            return default
        if not isinstance(value, str) or len(value) > 2000:
            self.problem(key, f"expected text, got {short(value)}")
            return default
        return value

    def flag(self, key: str) -> bool:
        """True or false; absent is false."""
        value = self._take(key, False, "true or false")
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problem(key, f"expected true or false, got {short(value)}")
        return False

    def sub(self, key: str, *, required: bool = False) -> Mapping[str, Any]:
        """A table; absent is empty."""
        value = self._take(key, required, "a table")
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problem(key, f"expected a table, got {short(value)}")
            return {}
        return value

    def array(self, key: str, *, required: bool = False) -> list[Any]:
        """A list; absent is empty."""
        value = self._take(key, required, "a list")
        if value is None:
            return []
        if not isinstance(value, list):
            self.problem(key, f"expected a list, got {short(value)}")
            return []
        return value

    def texts(self, key: str) -> dict[str, str]:
        """A table of strings."""
        out = {}
        for name, value in self.sub(key).items():
            if isinstance(value, str):
                out[name] = value
            else:
                self.problem(f"{key}.{name}", f"expected text, got {short(value)}")
        return out

    def unknown(self, also: Iterable[str] = ()) -> None:
        """Report keys nobody read: a misspelt key must not pass for an absent one."""
        known = self._read | set(also)
        for key in self.table:
            if key not in known:
                from difflib import get_close_matches  # only for the user's mistakes

                near = get_close_matches(key, sorted(known), n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                self.problem(key, f"not a key of this form{hint}")

    def finish(self) -> None:
        """Raise one ``ConfigError`` with everything that was wrong."""
        if self.problems:
            shown = self.problems[:20]
            more = len(self.problems) - len(shown)
            lines = "".join(f"\n  {p}" for p in shown) + (f"\n  and {more} more" if more else "")
            raise ConfigError(f"{self.where}:{lines}")


def short(value: object) -> str:
    """A value as the user wrote it, shortened: hostile files hold very long ones."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

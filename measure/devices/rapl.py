"""Energy counters of a CPU: RAPL packages as Linux shows them under ``/sys/class/powercap``.

Counters are microjoules that wrap at ``max_energy_range_uj``. Since 2020 kernels let only root
read them; elsewhere than on Linux, and in most virtual machines, there are none.
"""

from pathlib import Path

from measure.devices.energy import CounterError, Unavailable

ROOT = Path("/sys/class/powercap")


class Rapl:
    """The sum over packages; parts of a package (cores, memory) are not counted again."""

    method = "rapl"
    scope = "package"

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._ranges = [_number(z / "max_energy_range_uj") for z in zones]
        self._last = [_number(z / "energy_uj") for z in zones]
        self._total = 0

    def joules(self) -> float:
        """Energy since this object was made."""
        for i, zone in enumerate(self._zones):
            now = _number(zone / "energy_uj")
            step = now - self._last[i]
            # The counter starts over at its range; a window is far shorter than one round.
            self._total += step if step >= 0 else step + self._ranges[i]
            self._last[i] = now
        return self._total / 1e6

    def watts(self) -> None:
        """There is no second sensor."""


def open_rapl(root: Path = ROOT) -> Rapl | Unavailable:
    """Return the machine's counter, or why there is none."""
    zones = [z for z in sorted(root.glob("*-rapl:*")) if z.name.count(":") == 1]
    if not zones:
        return Unavailable("this machine shows no RAPL energy counters")
    try:
        return Rapl(zones)
    except PermissionError:
        return Unavailable("no permission to read the RAPL energy counters")
    except (OSError, CounterError) as error:
        return Unavailable(f"RAPL energy counters cannot be read: {error}")


def _number(path: Path) -> int:
    text = path.read_text("ascii").strip()
    if not text.isdigit():
        raise CounterError(f"{path}: expected a number, got {text[:40]!r}")
    return int(text)

"""How much memory can be had now, and what limits it; importing this loads no torch.

The kernel estimates what can be had without swapping. In a container its control group may allow
less: then the least headroom of the group and its parents counts, file caches given back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Available:
    """Bytes that can be had, and the limit they come from."""

    bytes: int
    limit: str


def available_memory(proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> Available | None:
    """The tightest limit of this process; None where the system names none."""
    found = [*_system(proc), *_groups(proc, cgroups)]
    return min(found, key=lambda a: a.bytes, default=None)


def available_memory_bytes() -> int | None:
    """Bytes of ``available_memory``."""
    found = available_memory()
    return None if found is None else found.bytes


def _system(proc: Path) -> Iterator[Available]:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield Available(int(line.split()[1]) * 1024, "MemAvailable of /proc/meminfo")


def _groups(proc: Path, cgroups: Path) -> Iterator[Available]:
    """Headroom of this process's control group and its parents (version 2, then 1)."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            root, names = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / path.strip().lstrip("/")
        # inside a container the path may be the host's, and only the root be mounted
        for folder in [f for f in (own, *own.parents) if f == root or root in f.parents]:
            most, used = (_whole(_read(folder / name)) for name in names)
            if most is None or used is None:
                continue
            headroom = max(0, most - used + _file_cache(folder))
            yield Available(headroom, f"{names[0]} of the control group")


def _file_cache(folder: Path) -> int:
    """Bytes of file contents that the kernel drops before it refuses memory."""
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return _whole(value) or 0
    return 0


def _whole(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdigit() else None  # "max": no limit


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""

"""Measures this device into a hardware profile of its own, which ``--gpu my.toml`` accepts.

The profile has the same form as ``hardware_profiles/*.toml`` with ``[curves]`` and
``[calibration]`` on top. A CPU's peaks are the best rates seen, so that its roofline is what it has
been observed to reach; a GPU keeps the datasheet of its bundled profile. It is written whole or not
at all.
"""

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w

from costmodel.calibration.profile import device_fields
from costmodel.errors import (
    ConfigError,
    MeasurementError,
    MissingExtraError,
    NotApplicableError,
    UnknownNameError,
)
from costmodel.files import write_atomic
from costmodel.hardware import HardwareProfile, load_hardware
from measure.available_memory import available_memory_bytes
from measure.devices.names import cuda_index, is_device_name
from measure.environment import fingerprint, worker_variables
from measure.isolation import Worker, run_isolated

#: Memory a calibration must find free: the rotating pool, twice while it is made, and libraries.
_MIN_FREE_BYTES = 3 * 2**30
_PROBE_S = 120.0


def calibrate(
    device: str = "cpu",
    *,
    quick: bool = False,
    output: str | os.PathLike[str],
    threads: int = 1,
    gpu: str | None = None,
    timeout_s: float = 900.0,
) -> Path:
    """Measure the device and write its profile.

    Parameters
    ----------
    device
        ``cpu`` or ``cuda:N``.
    quick
        About 20 seconds instead of about two minutes; fewer shapes and sizes.
    threads
        Compute threads; points to be predicted must be run with as many.
    gpu
        The profile that a GPU's datasheet figures come from; None: the one of its name.

    Raises ``MeasurementError`` when it could not be done, ``MissingExtraError`` without such a GPU,
    ``NotApplicableError`` for other devices, ``ConfigError`` for a GPU without a profile,
    ``UnknownNameError`` for a ``gpu`` there is not: all but the first before anything is measured.
    """
    if not is_device_name(device):
        raise NotApplicableError(f"device: calibration runs on cpu or cuda:N, got {device!r}")
    base = None if device == "cpu" else _datasheet(device, gpu)
    free = available_memory_bytes()
    if free is not None and free < _MIN_FREE_BYTES:
        raise MeasurementError(
            f"calibration needs {_MIN_FREE_BYTES / 2**30:.0f} GiB of free memory, there are "
            f"{free / 2**30:.1f}"
        )
    variables = worker_variables(threads)
    outcome = run_isolated(
        "measure.microbenchmarks:run",
        (quick, threads, device),
        timeout_s=timeout_s,
        variables=variables,
        limit_memory=device == "cpu",  # a GPU's driver reserves address space beyond all memory
        show_stderr=True,
    )
    if outcome.status != "ok":
        raise MeasurementError(f"calibration ended with {outcome.status}: {outcome.message}")
    path = Path(output)
    today = datetime.now(UTC).date().isoformat()
    environment = fingerprint(variables, device)
    if base is None:
        table = profile_table(
            outcome.value,
            environment,
            name=_profile_name(path),
            quick=quick,
            threads=threads,
            date=today,
        )
    else:
        table = gpu_profile_table(
            outcome.value, environment, base, name=_profile_name(path), quick=quick, date=today
        )
    write_atomically(path, tomli_w.dumps(table))
    return path


def profile_table(
    found: dict[str, Any],
    environment: dict[str, Any],
    *,
    name: str,
    quick: bool,
    threads: int,
    date: str,
) -> dict[str, Any]:
    """Lay out a profile from what ``microbenchmarks.run`` returned."""
    how = f"measured {date} by lccost calibrate ({'quick' if quick else 'full'}, {threads} threads)"
    measured = ("peak_flops_per_s", "hbm_bytes_per_s", "curves")
    system = ("memory_bytes", "l2_bytes", "n_units")
    memory = environment["memory_bytes"] or 1e9
    table = {
        "name": name,
        "title": f"{environment['cpu'] or platform.machine()}, {threads} threads (calibrated)",
        "vendor": environment["cpu_vendor"] or "",
        "generation": "cpu",
        "is_cpu": True,
        "n_units": threads,
        "hbm_bytes_per_s": float(f"{found['cold_bytes_per_s']:.6g}"),
        "memory_bytes": memory,
        "l2_bytes": environment["last_level_cache_bytes"],
        "max_gpus_per_node": 1,
        "peak_flops_per_s": {k: float(f"{v:.6g}") for k, v in found["flops_per_s"].items()},
        "sources": {
            **dict.fromkeys(measured, how),
            **dict.fromkeys(system, "reported by the operating system"),
        },
        "confidence": dict.fromkeys((*measured, *system), "measured"),
        "calibration": {**_facts(found, environment, quick, date), "threads": str(threads)},
        "curves": found["curves"],
    }
    return {k: v for k, v in table.items() if v is not None}


def gpu_profile_table(
    found: dict[str, Any],
    environment: dict[str, Any],
    base: HardwareProfile,
    *,
    name: str,
    quick: bool,
    date: str,
) -> dict[str, Any]:
    """Lay out a GPU's profile: the datasheet of ``base``, the curves, the host link as measured."""
    kind = "quick" if quick else "full"
    how = f"measured {date} by lccost calibrate ({kind}) on {found['device_title']}"
    table = {**device_fields(base), "name": name, "title": f"{base.title} (calibrated)"}
    sources, confidence = dict(base.sources), dict(base.confidence)
    measured = ["curves"]
    if found["host_link_bytes_per_s"] is not None:
        table["host_link_bytes_per_s"] = float(f"{found['host_link_bytes_per_s']:.6g}")
        measured.append("host_link_bytes_per_s")
    return {
        **table,
        "peak_flops_per_s": dict(base.peak_flops_per_s),
        "sources": {**sources, **dict.fromkeys(measured, how)},
        "confidence": {**confidence, **dict.fromkeys(measured, "measured")},
        "calibration": _facts(found, environment, quick, date),
        "curves": found["curves"],
    }


def _facts(
    found: dict[str, Any], environment: dict[str, Any], quick: bool, date: str
) -> dict[str, str]:
    return {
        "date": date,
        "kind": "quick" if quick else "full",
        "timer": found["timer"],
        "environment": environment["id"],
        "torch": environment["versions"].get("torch", ""),
        "canary_s": f"{found['canary_before_s']:.6g}",
        "canary_after_s": f"{found['canary_after_s']:.6g}",
    }


def _datasheet(device: str, gpu: str | None) -> HardwareProfile:
    """The profile that describes ``device``, asked for before minutes of it are used."""
    base = None if gpu is None else load_hardware(gpu)
    if base is not None and base.is_cpu:
        raise ConfigError(f"--gpu: expected a profile of a GPU for {device}, got {base.name}")
    index = cuda_index(device)
    with Worker(limit_memory=False) as probe:
        found = probe.call("measure.devices.probe:missing", (1, index), timeout_s=_PROBE_S)
        reason = found.value if found.status == "ok" else found.message
        if reason:
            raise MissingExtraError(f"device {device}: {reason}")
        if base is not None:
            return base
        title = probe.call("measure.devices.probe:title", (index,), timeout_s=_PROBE_S)
    if title.status != "ok":
        raise MeasurementError(f"device {device}: {title.message}")
    try:
        return load_hardware(title.value)
    except UnknownNameError as error:
        raise ConfigError(
            f"{device} has no profile: {error} The one that is nearest can be named: --gpu PROFILE"
        ) from None


def write_atomically(path: Path, text: str) -> None:
    """Write beside the target, sync, and rename: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)


def _profile_name(path: Path) -> str:
    """Name the profile after its file, in the form profile names have."""
    return re.sub(r"[^a-z0-9.]+", "-", path.stem.lower()).strip("-") or "cpu"

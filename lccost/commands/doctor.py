"""``lccost doctor``."""

from pathlib import Path
from typing import Any

import click

from lccost.commands.common import EXIT_MISSING, CommandError, emit, handle_errors, to_json

EXAMPLES = """
\b
Examples:
  lccost doctor
  lccost doctor --device cuda:0 --format json
"""


@click.command(epilog=EXAMPLES)
@click.option(
    "--device",
    default=None,
    help="Ask for one device: exit code 4 where nothing can be measured on it.",
)
@click.option(
    "--format", "form", type=click.Choice(("table", "json")), default="table", show_default=True
)
@click.option("--output", type=click.Path(path_type=Path), default=None, help="Write here.")
@handle_errors
def doctor(device: str | None, form: str, output: Path | None) -> None:
    """What this machine is, what can be measured on it, and what cannot and why.

    Driver, versions, clocks and who else uses the GPU; nothing is changed.
    """
    from costmodel.errors import ConfigError
    from lccost import __version__
    from lccost.doctor import examine
    from measure.devices.names import cuda_index, is_device_name

    if device is not None and not is_device_name(device):
        raise ConfigError(f"device: expected cpu or cuda:N, got {device!r}")
    index = None if device is None else cuda_index(device)
    name = None if index is None else f"cuda:{index}"
    found = examine(name)
    if form == "json":
        text = to_json(
            {
                "schema_version": "1",
                "lccost_version": __version__,
                "command": "doctor",
                "inputs": {"device": device},
                "assumptions": [],
                "results": [found],
            }
        )
    else:
        text = table(found)
    emit(text, output)
    known = [d["device"] for d in found["cuda"]["devices"]]
    if name is not None and name not in known:
        reason = found["cuda"]["reason"] or f"there are {len(known)} CUDA devices"
        raise CommandError(f"device {name}: {reason}", EXIT_MISSING)
    if found["cuda"]["torch"] is None:
        raise CommandError(str(found["cuda"]["reason"]), EXIT_MISSING)


def table(found: dict[str, Any]) -> str:
    """Lines for people: machine, GPUs, packages, limits."""
    machine, cuda = found["machine"], found["cuda"]
    lines = [
        f"machine    {machine['cpu']}, {machine['cores']} cores, "
        f"{_gib(machine['available_memory_bytes'])} free of {_gib(machine['memory_bytes'])}",
        f"           {machine['system']} {machine['kernel']}, Python {machine['python']}; "
        f"others use {found['load']['foreign_cores']:.2f} cores now",
    ]
    if cuda["torch"]:
        lines.append(f"torch      {cuda['torch']}, CUDA {cuda['torch_cuda'] or 'none'}")
    for gpu in found["gpus"]:
        lines += _gpu_lines(gpu)
    have = [f"{p['name']} {p['version']}" for p in found["packages"] if p["version"]]
    lines.append(f"packages   {', '.join(have) or 'none'}")
    if found["limits"]:
        lines.append("cannot be measured here:")
    for limit in found["limits"]:
        remedy = f"; {limit['remedy']}" if limit["remedy"] else ""
        lines.append(f"  {limit['what']}: {limit['why']}{remedy}")
    return "\n".join(lines)


def _gpu_lines(gpu: dict[str, Any]) -> list[str]:
    memory = gpu["memory"] or {}
    energy = "energy counter" if gpu["energy"]["available"] else "no energy counter"
    reasons = ", ".join(gpu["event_reasons"] or ()) or "none"
    users = "unknown" if gpu["processes"] is None else str(len(gpu["processes"]))
    return [
        f"{gpu['device'] or 'GPU':<10} {gpu['name']}, driver {gpu['driver']} "
        f"(CUDA {gpu['cuda_driver']}), {_gib(memory.get('free'))} free of "
        f"{_gib(memory.get('total'))}",
        f"           SM clock {_unit(gpu['sm_clock_mhz'], 'MHz')} of "
        f"{_unit(gpu['max_sm_clock_mhz'], 'MHz')}, {_unit(gpu['temperature_c'], 'C')}, power "
        f"{_unit(gpu['power_w'], 'W')} of {_unit(gpu['power_limit_w'], 'W')}, {energy}",
        f"           clocks limited by: {reasons}; processes on it: {users}; "
        f"MIG {_switch(gpu['mig'])}, ECC {_switch(gpu['ecc'])}",
    ]


def _gib(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 2**30:.1f} GiB"


def _unit(value: float | None, unit: str) -> str:
    return "unknown" if value is None else f"{value:.0f} {unit}"


def _switch(value: bool | None) -> str:
    return "unknown" if value is None else "on" if value else "off"

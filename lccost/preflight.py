"""What ``lccost measure`` finds out before any point starts, so that it fails with one sentence.

Packages and names are looked up here; what needs PyTorch is asked in a process of its own.
"""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from costmodel.architecture import Architecture
from costmodel.errors import ConfigError, LccostError, MissingExtraError
from costmodel.hardware import HardwareProfile, load_hardware, resolve_gpu
from costmodel.methods.llmlingua2 import ENCODER
from costmodel.methods.parse import parse_methods
from measure.devices.names import cuda_index
from measure.encoder_files import PACKAGE, checked_encoder, split_encoder
from measure.environment import fingerprint
from measure.isolation import run_isolated
from measure.kernels import check_usable
from measure.points import MeasurePoint
from measure.runnable import installed, missing_package

if TYPE_CHECKING:
    from lccost.measuring import Request

#: Seconds in which PyTorch must say what it finds.
_PROBE_S = 120.0


def require_torch() -> None:
    """Raise ``MissingExtraError`` where PyTorch is not installed; nothing is imported."""
    if not installed("torch"):
        raise MissingExtraError("measuring needs PyTorch: pip install 'lccost[measure]'")


def require_threads(threads: int) -> None:
    """Raise ``ConfigError`` where this machine has fewer processors: threads would wait in turn."""
    own = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    if threads > len(own):
        raise ConfigError(
            f"--threads: expected at most {len(own)}, the processors here, got {threads}"
        )


def require_engine(request: "Request") -> None:
    """Raise ``MissingExtraError`` where the engine's packages are not installed, its kernels cannot
    run, or every method asked for lacks a package.
    """
    if request.engine == "transformers" and not installed("transformers"):
        raise MissingExtraError(
            "--engine transformers needs transformers: pip install 'lccost[transformers]'"
        )
    if request.engine == "lccost":
        check_usable(request.device)
    stacks = parse_methods(request.methods)
    lacking = [missing_package(stack, engine=request.engine) for stack in stacks]
    if stacks and all(lacking):
        raise MissingExtraError(lacking[0])


def require_encoder(request: "Request") -> None:
    """Raise ``ConfigError`` for a local encoder that cannot be used or that no method would use,
    ``MissingExtraError`` where its package is missing; only headers are read. Says once where it
    has other sizes than the one that is priced.
    """
    if request.encoder is None:
        return
    if not any(stack.prompt_weights_bytes() for stack in parse_methods(request.methods)):
        raise ConfigError("--encoder goes with a method that shortens the prompt: llmlingua2")
    by_package, folder = split_encoder(request.encoder)
    found = checked_encoder(folder)
    if by_package and not installed(PACKAGE):
        raise MissingExtraError(
            "--encoder llmlingua:FOLDER needs the package llmlingua: pip install llmlingua"
        )
    if found != ENCODER:
        click.echo(
            f"the encoder in {folder} has {found.n_parameters:,} parameters; predictions are of "
            f"XLM-RoBERTa-large with {ENCODER.n_parameters:,}",
            err=True,
        )


def require_weights(todo: Iterable[MeasurePoint]) -> None:
    """Raise ``ConfigError`` where a local checkpoint does not hold the model's tensors; only the
    headers of its files are read.
    """
    checked: set[tuple[str, Architecture]] = set()
    for point in todo:
        if point.weights is None or (point.weights, point.executed) in checked:
            continue
        checked.add((point.weights, point.executed))
        outcome = run_isolated(
            "measure.checkpoint_check:check", (point,), timeout_s=_PROBE_S, limit_memory=False
        )
        if outcome.status != "ok":
            is_missing = isinstance(outcome.value, dict) and outcome.value.get("is_missing")
            raise (MissingExtraError if is_missing else ConfigError)(outcome.message)


def require_device(request: "Request") -> None:
    """Raise ``MissingExtraError`` where the device is not here, before any point is tried."""
    index = cuda_index(request.device)
    if index is None:
        return
    outcome = run_isolated(
        "measure.devices.probe:missing", (request.tp, index), timeout_s=_PROBE_S,
        limit_memory=False,
    )  # fmt: skip
    reason = outcome.value if outcome.status == "ok" else outcome.message
    if reason:
        raise MissingExtraError(f"device {request.device}: {reason}")


def other_device(hardware: HardwareProfile, device: str, threads: int = 1) -> str:
    """Say so where a profile is not of the device that runs the points, or of as many threads;
    empty: it is, or nobody can tell.
    """
    runs_on, title = "a CPU", hardware.title
    if cuda_index(device) is not None:
        gpu = fingerprint(device=device)["gpu"] or {}
        runs_on = str(gpu.get("name") or "a GPU")
        title = title.removesuffix(" (calibrated)")
        if not hardware.is_cpu and _same_gpu(runs_on, hardware.name, title):
            return ""
    elif hardware.is_cpu:
        own = fingerprint(device=device)["cpu"]
        runs_on = own or runs_on
        if own is None or title.startswith(own):
            return _other_threads(hardware, threads)
    return (
        f"--gpu {hardware.name} is not the device that runs: predictions are of {hardware.title}, "
        f"measurements of {runs_on}, and their errors say nothing. lccost calibrate --device "
        f"{device} --output my.toml makes a profile of this one."
    )


def _other_threads(hardware: HardwareProfile, threads: int) -> str:
    calibrated = hardware.calibration.get("threads", str(threads))
    if calibrated == str(threads):
        return ""
    return (
        f"--gpu {hardware.name} was calibrated with --threads {calibrated}, points run with "
        f"{threads}: their errors say nothing. lccost calibrate --device cpu --threads {threads} "
        "--output my.toml makes a profile that fits."
    )


def _same_gpu(driver_name: str, *profile_names: str) -> bool:
    """Whether a name of a profile, or a calibration's base, is what the driver calls the GPU;
    a GPU that no alias names cannot be told apart.
    """
    try:
        known = load_hardware(resolve_gpu(driver_name))
    except LccostError:
        return True
    return bool({known.name, known.title} & set(profile_names))

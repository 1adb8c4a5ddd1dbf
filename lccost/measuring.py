"""From the options of ``lccost measure`` to points, and each point's own prediction."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from costmodel.architecture import Architecture
from costmodel.errors import ConfigError, MissingExtraError, NotApplicableError
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.methods.parse import parse_methods
from costmodel.options import default_dtype
from costmodel.registry import load_architecture
from lccost.joins import predict_record
from measure.points import MeasurePoint
from measure.runner import run_sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for; names as the options."""

    models: tuple[str, ...]
    methods: tuple[str, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    layers: int | None
    output_tokens: int
    device: str
    engine: str
    realisation: str
    dtype: str | None
    threads: int
    gpu: str | None
    seed: int


def require_torch() -> None:
    """Raise ``MissingExtraError`` where PyTorch is not installed; nothing is imported."""
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("measuring needs PyTorch: pip install 'lccost[measure]'")


def points(request: Request, gpu: str) -> list[MeasurePoint]:
    """The product in option order, for the profile named ``gpu``; combinations that
    cannot run are said on stderr and left out, unless none can.
    """
    architectures = [load_architecture(m) for m in request.models]
    stacks = parse_methods(request.methods)
    found: list[MeasurePoint] = []
    refused: list[str] = []
    for architecture in architectures:
        for stack in stacks:
            try:
                refusal = stack.refusal(architecture)
                if refusal:
                    raise NotApplicableError(refusal)
                found += [
                    MeasurePoint(
                        architecture=architecture,
                        stack=stack,
                        context_tokens=context,
                        batch=batch,
                        output_tokens=request.output_tokens,
                        dtype=request.dtype or default_dtype(architecture),
                        layers=request.layers,
                        device=request.device,
                        engine=request.engine,
                        realisation=request.realisation,  # type: ignore[arg-type]
                        threads=request.threads,
                        seed=request.seed,
                        gpu=gpu,
                    )
                    for context in request.contexts
                    for batch in request.batches
                ]
            except NotApplicableError as error:
                refused.append(str(error))
    if not found:
        raise NotApplicableError(refused[0])
    for reason in refused:
        click.echo(f"left out: {reason}", err=True)
    return found


def run(
    request: Request, *, output: Path, resume: bool, timeout_s: float, force: bool
) -> list[dict[str, Any]]:
    """Measure everything; each record carries the prediction of its own point."""
    require_torch()
    if not output.parent.is_dir():
        raise ConfigError(f"the folder {output.parent} does not exist")
    hardware = load_hardware(request.gpu) if request.gpu else None
    todo = points(request, hardware.name if hardware else request.device)
    by_name = {p.architecture.name: p.architecture for p in todo}
    if hardware is None:
        click.echo(
            "no --gpu: records carry no prediction. Calibrate once (lccost calibrate --device "
            f"{request.device} --output my.toml) and give --gpu my.toml.",
            err=True,
        )
    return run_sweep(
        todo,
        output=output,
        predict_point=None if hardware is None else _predictor(hardware, by_name),
        resume=resume,
        timeout_s=timeout_s,
        force=force,
    )


def _predictor(hardware: HardwareProfile, architectures: Mapping[str, Architecture]) -> Any:
    def predicted(fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return predict_record(fields, hardware, architectures.get(str(fields["model"])))

    return predicted

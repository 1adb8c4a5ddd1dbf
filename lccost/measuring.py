"""From the options of ``lccost measure`` to points, and each point's own prediction."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from costmodel.architecture import Architecture
from costmodel.errors import ConfigError, MeasurementError, NotApplicableError
from costmodel.executors import check_executor
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.methods.parse import parse_methods
from costmodel.methods.stack import MethodStack
from costmodel.options import default_dtype
from costmodel.registry import load_architecture
from costmodel.results import key_fields
from lccost.joins import predict_record
from lccost.preflight import (
    other_device,
    require_device,
    require_encoder,
    require_engine,
    require_threads,
    require_torch,
    require_weights,
)
from measure.devices.names import cuda_index
from measure.points import LEVEL_OF_REALISATION, MeasurePoint
from measure.runnable import refusal
from measure.runner import Predict, Refusal, Rules, run_sweep


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
    realisation: str | None
    dtype: str | None
    threads: int
    gpu: str | None
    seed: int
    tp: int = 1
    weights: str | None = None
    weight_dtype: str = "checkpoint"
    encoder: str | None = None

    @property
    def form(self) -> str:
        """The realisation asked for; by default what the engine's users run."""
        return self.realisation or ("reference" if self.engine == "transformers" else "best")


def points(request: Request, gpu: str) -> tuple[list[MeasurePoint], list[Refusal]]:
    """The product in option order, for the profile named ``gpu``, and the combinations in it that
    do not exist. Raises ``NotApplicableError`` where none does.
    """
    found: list[MeasurePoint] = []
    refused: list[Refusal] = []
    stacks = parse_methods(request.methods)
    loaded = [(name, load_architecture(name)) for name in request.models]
    _require_one_name_each(loaded)
    for (source, architecture), stack, context, batch in itertools.product(
        loaded, stacks, request.contexts, request.batches
    ):
        try:
            found.append(_point(request, gpu, source, architecture, stack, context, batch))
        except NotApplicableError as error:
            fields = _fields(request, gpu, architecture, stack, context, batch)
            refused.append(Refusal(fields=fields, reason=str(error)))
    if not found:
        raise NotApplicableError(refused[0].reason)
    return found, refused


def _require_one_name_each(loaded: Sequence[tuple[str, Architecture]]) -> None:
    """Raise ``ConfigError`` where two models have one name: records would not tell them apart."""
    found: dict[str, tuple[str, Architecture]] = {}
    for source, architecture in loaded:
        first, known = found.setdefault(architecture.name, (source, architecture))
        if replace(known, hub_id="") != replace(architecture, hub_id=""):
            raise ConfigError(
                f"{first} and {source} are different models with one name, {architecture.name}: "
                "rename a file, or measure them into files of their own"
            )


def _point(
    request: Request,
    gpu: str,
    source: str,
    architecture: Architecture,
    stack: MethodStack,
    context: int,
    batch: int,
) -> MeasurePoint:
    reason = stack.refusal(architecture) or refusal(
        stack, engine=request.engine, device=request.device
    )
    if reason:
        raise NotApplicableError(reason)
    return MeasurePoint(
        architecture=architecture,
        stack=stack,
        context_tokens=context,
        batch=batch,
        output_tokens=request.output_tokens,
        dtype=request.dtype or default_dtype(architecture),
        layers=request.layers,
        device=request.device,
        engine=request.engine,
        realisation=request.form,  # type: ignore[arg-type]
        threads=request.threads,
        tp=request.tp,
        seed=request.seed,
        gpu=gpu,
        model_source=source,
        weights=request.weights,
        weight_dtype=request.weight_dtype,
        encoder=request.encoder if stack.prompt_weights_bytes() else None,
    )


def _fields(
    request: Request,
    gpu: str,
    architecture: Architecture,
    stack: MethodStack,
    context: int,
    batch: int,
) -> dict[str, Any]:
    """Key fields of a combination that cannot be a point."""
    return {
        **key_fields(
            architecture=architecture,
            method=stack,
            gpu=gpu,
            level=LEVEL_OF_REALISATION[request.form],
            engine=request.engine,
            tp=request.tp,
            dtype=request.dtype or default_dtype(architecture),
            weight_dtype=request.weight_dtype,
            batch=batch,
            context_tokens=context,
            output_tokens=request.output_tokens,
        ),
        "layers": request.layers or architecture.n_layers,
        "device": request.device,
        "realisation": request.form,
        "threads": request.threads,
        "seed": request.seed,
        "weights": "random" if request.weights is None else "checkpoint",
    }


def run(
    request: Request, *, output: Path, resume: bool, rules: Rules, executor: str = "local"
) -> list[dict[str, Any]]:
    """Measure everything; each record carries the prediction of its own point."""
    require_torch()
    check_executor(executor)
    if rules.how.max_prefill_s is not None and not request.gpu:
        raise ConfigError("--max-prefill compares a prediction: give --gpu PROFILE, which makes it")
    if executor == "local":  # otherwise the nodes have the devices and packages
        require_device(request)
        require_threads(request.threads)
        require_engine(request)
    if not output.parent.is_dir():
        raise ConfigError(f"the folder {output.parent} does not exist")
    hardware = load_hardware(request.gpu) if request.gpu else None
    todo, refused = points(request, hardware.name if hardware else request.device)
    for reason in dict.fromkeys(r.reason for r in refused):
        click.echo(f"not applicable: {reason}", err=True)
    require_weights(todo)
    require_encoder(request)
    by_name = {p.architecture.name: p.architecture for p in todo}
    note = (
        _no_profile(request)
        if hardware is None
        else other_device(hardware, request.device, request.threads)
    )
    if note:
        click.echo(note, err=True)
    try:
        return run_sweep(
            todo,
            output=output,
            predict_point=None if hardware is None else predictor(hardware, by_name),
            predict_memory=memory_predictor(request.device, by_name),
            resume=resume,
            rules=rules,
            refused=refused,
            executor=executor,
        )
    except KeyboardInterrupt:
        raise MeasurementError(
            f"stopped; finished points are in {output}: the same command with --resume runs the "
            "others"
        ) from None


def _no_profile(request: Request) -> str:
    return (
        "no --gpu: records carry no prediction. Calibrate once (lccost calibrate --device "
        f"{request.device} --output my.toml) and give --gpu my.toml."
    )


def memory_predictor(device: str, architectures: Mapping[str, Architecture]) -> Predict:
    """Predict the peaks of memory without a profile: bytes do not depend on how fast the device
    is, only on whether it keeps a context (a GPU does).
    """
    base = load_hardware("xeon-8480plus" if cuda_index(device) is None else "h100-sxm")
    peaks = dict.fromkeys(("fp32", "bf16", "fp16"), base.peak("bf16"))
    hardware = replace(base, peak_flops_per_s=peaks)

    def predicted(fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return predict_record(fields, hardware, architectures.get(str(fields["model"])))

    return predicted


def predictor(hardware: HardwareProfile, architectures: Mapping[str, Architecture]) -> Predict:
    """What predicts the points of a sweep: the row of ``predict``, the peaks it was made with, and
    of a cut model the whole one's figures.
    """

    def predicted(fields: Mapping[str, Any]) -> Mapping[str, Any]:
        architecture = architectures.get(str(fields["model"]))
        row = predict_record(fields, hardware, architecture)
        tp = int(fields.get("tp") or 1)
        row["peak_flops_per_s"] = hardware.peak(str(fields["dtype"])) * tp
        row["hbm_bytes_per_s"] = hardware.hbm_bytes_per_s
        if architecture is not None and fields.get("layers") != architecture.n_layers:
            whole = predict_record({**fields, "layers": None}, hardware, architecture)
            row["whole_model"] = {name: whole[name] for name in _WHOLE}
        return row

    return predicted


#: Figures that a run of some layers is extrapolated to.
_WHOLE = ("weights_bytes", "state_bytes", "ttft_s", "tpot_s")

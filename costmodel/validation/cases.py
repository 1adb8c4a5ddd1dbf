"""End-to-end rows as cases: what rows that are predicted together share, and each one's load."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from costmodel.architecture import Architecture
from costmodel.registry import architecture_from_config
from costmodel.serving import Deployment, EngineTimes, Load, Served
from costmodel.validation.devices import Devices
from costmodel.validation.names import model_named
from costmodel.workload import Level


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What rows that are predicted together share.

    system     the GPU as the table spells it
    engine     whose parameters answer
    shown      the engine as groups show it
    precision  of the weights; "" is the checkpoint's
    fp8_cache  None: as the engine does it
    own_form   the engine's own form of the method without the factor fitted to runs of it: a packed
               token is attended in the time of a 16-bit one
    shape      dimensions of a model that is not bundled: (name, value) pairs of its config
    """

    model: str
    system: str
    engine: str
    shown: str = ""
    precision: str = ""
    deployment: Deployment = field(default_factory=Deployment)
    method: str = "full"
    level: Level = "ideal"
    dtype: str = "bf16"
    fp8_cache: bool | None = None
    own_form: bool = False
    shape: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: the metric it measured (see ``serving.metrics``) and its load.

    label    metric as groups name it; primary: counts in the overall figures
    parts    parts of the table the row belongs to besides
    scale    observed cell -> seconds: ``value * scale``, or ``scale / value`` for a rate
    """

    index: int
    metric: str
    label: str
    concurrency: float
    input_tokens: float
    output_tokens: float
    primary: bool = True
    parts: tuple[str, ...] = ()


def architecture_of(case: Case) -> Architecture:
    """The model of a case: bundled, or a Llama of the dimensions that the table gives."""
    if not case.shape:
        return model_named(case.model)
    return architecture_from_config(
        {"model_type": "llama", **dict(case.shape)}, case.model.strip().lower()[:60]
    )


def served_case(case: Case, devices: Devices, times: EngineTimes) -> Served:
    """The replica a case describes."""
    hardware = devices.profile(devices.name({"hw": case.system}, ("hw",)))
    fp8 = case.fp8_cache
    if fp8 is None:
        fp8 = times.facts.fp8_cache and case.precision in ("fp8", "fp4")
    return Served.of(
        architecture_of(case),
        hardware,
        times.facts.rules,
        deployment=case.deployment,
        precision=case.precision,
        fp8_cache=fp8,
        method=case.method,
        level=case.level,
        dtype=case.dtype,
    )


def load_of(rows: Sequence[Row]) -> Load:
    """Rows as arrays."""
    return Load(
        concurrency=np.array([r.concurrency for r in rows]),
        input_tokens=np.array([r.input_tokens for r in rows]),
        output_tokens=np.array([r.output_tokens for r in rows]),
    )


Grouped = dict[Case, list[Row]]

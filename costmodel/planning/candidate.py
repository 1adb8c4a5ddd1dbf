"""One way to serve the workload, checked: does it fit, what is its best case, what does it cost?"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from costmodel.architecture import Architecture
from costmodel.errors import LccostError
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.methods.parse import parse_method, parse_methods
from costmodel.methods.stack import MethodStack
from costmodel.model import Model
from costmodel.options import Options
from costmodel.planning.bound import Bound, Miss, Unloaded, bound_of, unloaded
from costmodel.planning.evidence import GivenUp, given_up
from costmodel.planning.load import Load, load_of, pool_bytes
from costmodel.planning.parallel import Parallel
from costmodel.planning.pricing import Estimate, StepBuilder
from costmodel.planning.requests import Requests
from costmodel.planning.spec import Grid, PlanSpec
from costmodel.planning.steps import StepTable, build_steps
from costmodel.registry import load_architecture
from costmodel.units import GIB, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Names and degrees only, so that it travels to another process."""

    model: str
    method: str
    level: str
    gpu: str
    engine: str | None
    tp: int
    pp: int = 1
    ep: int = 1
    cp: int = 1

    @property
    def parallel(self) -> Parallel:
        """Degrees besides tp."""
        return Parallel(pp=self.pp, ep=self.ep, cp=self.cp)

    @property
    def engines_per_replica(self) -> int:
        """Engines with a queue of their own in one replica: expert ranks have one each."""
        return self.ep

    @property
    def gpus_per_replica(self) -> int:
        """GPUs of one replica."""
        return self.tp * self.parallel.groups


def candidates(grid: Grid) -> list[Candidate]:
    """The product of everything that may be chosen, in file order."""
    specs = [stack.spec for stack in dict.fromkeys(parse_methods(grid.methods))]
    engines: tuple[str | None, ...] = grid.engines or (None,)
    parts = (
        grid.models, grid.gpus, specs, grid.levels, engines, grid.tp, grid.pp, grid.ep, grid.cp,
    )  # fmt: skip
    return [
        Candidate(model=m, gpu=g, method=x, level=level, engine=e, tp=tp, pp=pp, ep=ep, cp=cp)
        for m, g, x, level, e, tp, pp, ep, cp in itertools.product(*parts)
    ]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Parts:
    """Everything a simulation of one candidate needs."""

    candidate: Candidate
    architecture: Architecture
    stack: MethodStack
    hardware: HardwareProfile
    model: Model
    load: Load
    steps: StepTable
    pool: float
    bound: Bound
    alone: Unloaded


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Screened:
    """The answer before any simulation. ``reason`` says why it is out; ``parts`` is None then,
    unless it is out for its accuracy or the number of GPUs alone. ``miss``: how many times over
    the limit it is that puts it out, where that is a number.
    """

    candidate: Candidate
    names: Mapping[str, str]
    reason: str | None
    given_up: GivenUp | None = None
    parts: Parts | None = None
    miss: float | None = None

    @property
    def bound_replicas(self) -> int | None:
        """Fewest replicas in closed form."""
        if self.parts is None:
            return None
        rate = _offered(self.parts.load)
        if not np.isfinite(rate):
            return 1
        return -(-self.parts.bound.replicas(rate) // self.candidate.engines_per_replica)


def _offered(load: Load) -> float:
    """Requests per second; infinite when all arrive at once (a closed loop)."""
    span = float(load.arrival_s[-1])
    return (load.size - 1) / span if span > 0 else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attained:
    """Factors on the shares of its peaks that a device attains, as a device with other peaks."""

    mfu: float = 1.0
    mbu: float = 1.0

    def of(self, hardware: HardwareProfile) -> HardwareProfile:
        """The device whose kernels attain so much more or less."""
        if self.mfu == self.mbu == 1.0:
            return hardware
        peaks = {dtype: peak * self.mfu for dtype, peak in hardware.peak_flops_per_s.items()}
        bandwidth = hardware.hbm_bytes_per_s * self.mbu
        return replace(hardware, peak_flops_per_s=peaks, hbm_bytes_per_s=bandwidth)


def screen(
    candidate: Candidate,
    spec: PlanSpec,
    requests: Requests,
    estimate: Estimate = "mid",
    device: Attained | None = None,
) -> Screened:
    """Everything that can be said without simulating."""
    try:
        stack = parse_method(candidate.method)
        architecture = load_architecture(candidate.model)
        hardware = load_hardware(candidate.gpu, prices=spec.money.file)
        hardware = hardware if device is None else device.of(hardware)
    except LccostError as error:
        return Screened(candidate=candidate, names={}, reason=str(error))
    names = {
        "model": architecture.name,
        "method": stack.name,
        "method_spec": stack.spec,
        "gpu": hardware.name,
        "engine": candidate.engine or "",
    }
    mine = requests.with_outputs(spec.demand.output_factor(stack.name, stack.spec))
    try:
        lost = given_up(architecture, stack, mine.input_tokens, spec.accuracy)
        model = _model(candidate, architecture, stack, hardware, spec.grid)
        parts = _parts(candidate, architecture, stack, hardware, model, mine, spec.grid, estimate)
    except LccostError as error:
        return Screened(candidate=candidate, names=names, reason=str(error))
    names["engine"] = model.engine.name
    if isinstance(parts, Miss):
        return Screened(
            candidate=candidate, names=names, reason=parts.reason, given_up=lost, miss=parts.factor
        )
    out = Screened(candidate=candidate, names=names, reason=None, given_up=lost, parts=parts)
    needed = out.bound_replicas or 1
    gpus = needed * candidate.gpus_per_replica
    if lost.refusal is not None:
        return replace(out, reason=lost.refusal)
    miss = parts.alone.broken(spec.slo, mine.input_tokens, mine.output_tokens)
    if miss is None and gpus > spec.grid.max_gpus:
        reason = f"needs at least {gpus} GPUs, more than the {spec.grid.max_gpus} allowed"
        miss = Miss(reason=reason, factor=gpus / spec.grid.max_gpus)
    return out if miss is None else replace(out, reason=miss.reason, miss=miss.factor)


def _model(
    candidate: Candidate,
    architecture: Architecture,
    stack: MethodStack,
    hardware: HardwareProfile,
    grid: Grid,
) -> Model:
    options = Options(
        dtype=grid.dtype,
        weight_dtype=grid.weight_dtype,
        level="reference" if candidate.level == "reference" else "ideal",
        tp=candidate.tp,
        engine=candidate.engine,
        memory_fraction=grid.memory_fraction,
    )
    model = Model.of(architecture, stack, hardware, options)
    if grid.chunk_tokens is not None:
        engine = replace(model.engine, prefill_chunk_tokens=grid.chunk_tokens)
        model = replace(model, engine=engine)
    return model


def _parts(
    candidate: Candidate,
    architecture: Architecture,
    stack: MethodStack,
    hardware: HardwareProfile,
    model: Model,
    requests: Requests,
    grid: Grid,
    estimate: Estimate,
) -> Parts | Miss:
    """Tables, loads and bound; or why it does not fit."""
    parallel = replace(candidate.parallel, network_bytes_per_s=grid.transfer_bytes_per_s)
    parallel.check(model)
    per_node = hardware.max_gpus_per_node
    if candidate.tp > per_node:
        return Miss(
            reason=f"tp = {candidate.tp} is more than the {per_node} GPUs of a node",
            factor=candidate.tp / per_node,
        )
    total = requests.input_tokens + requests.output_tokens
    longest = int(np.argmax(total))
    limit = architecture.max_context_tokens
    if limit is not None and total[longest] > limit:
        return Miss(
            reason=f"the longest request has {int(total[longest]):,} tokens and "
            f"{architecture.name} takes {limit:,}",
            factor=float(total[longest]) / limit,
        )
    weights = parallel.weights_bytes(model)
    pool = pool_bytes(
        model,
        float(requests.input_tokens.max()),
        float(requests.output_tokens[longest]),
        grid.max_batch,
    )
    pool = parallel.pool_bytes(pool, model)
    usable = hardware.memory_bytes * grid.memory_fraction
    if pool <= 0:
        return Miss(
            reason=f"no room for state: {format_bytes(weights)} of weights and "
            f"{format_bytes(-pool)} too much in transients on {format_bytes(hardware.memory_bytes)}"
            if weights < usable
            else f"weights of {format_bytes(weights)} per GPU do not fit in "
            f"{grid.memory_fraction:.0%} of {format_bytes(hardware.memory_bytes)}",
            factor=(usable - pool) / usable,
        )
    make = StepBuilder(model, parallel, estimate)
    load = load_of(model, requests, make)
    worst = int(np.argmax(load.peak_bytes))
    if load.peak_bytes[worst] > pool:
        return Miss(
            reason=f"the longest request ({int(load.input_tokens[worst]):,} + "
            f"{int(load.output_tokens[worst]):,} tokens) needs "
            f"{load.peak_bytes[worst] / GIB:.2f} GiB of state per GPU, the pool holds "
            f"{pool / GIB:.2f} GiB",
            factor=float(load.peak_bytes[worst]) / pool,
        )
    chunk = model.engine.prefill_chunk_tokens or int(load.prompt_tokens.max())
    steps = build_steps(
        model,
        chunk_tokens=chunk,
        max_batch=min(grid.max_batch, chunk),
        max_tokens=int((load.prompt_tokens + load.output_tokens).max()),
        max_output=int(load.output_tokens.max()),
        parallel=parallel,
        estimate=estimate,
    )
    if parallel.pp > 1:
        drain = parallel.drain_s(steps, load.prompt_tokens, load.cached_tokens)
        load = replace(load, drain_s=drain)
    return Parts(
        candidate=candidate, architecture=architecture, stack=stack, hardware=hardware,
        model=model, load=load, steps=steps, pool=pool,
        bound=bound_of(load, steps, pool), alone=unloaded(load, steps),
    )  # fmt: skip

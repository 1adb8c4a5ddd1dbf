"""A Cartesian product of models, GPUs, methods, contexts and batches, as rows in option order.

Everything that varies within one (model, GPU, method) is one vectorised call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from costmodel.architecture import Architecture
from costmodel.engines import engine_of
from costmodel.errors import ConfigError, LccostError, NotApplicableError
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.kernels.families import own_engines
from costmodel.methods.parse import parse_methods
from costmodel.methods.stack import MethodStack
from costmodel.mlps import MoE
from costmodel.options import Options, default_dtype, default_engine
from costmodel.predict import predict
from costmodel.quality import scores
from costmodel.registry import load_architecture
from costmodel.results import SCHEMA_VERSION as SCHEMA_VERSION
from costmodel.results import Prediction, inapplicable_row, key_fields
from costmodel.workload import Workload

_Named = TypeVar("_Named", Architecture, HardwareProfile)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What ``lccost predict`` was asked for, resolved; ``asked`` keeps models and GPUs as typed."""

    architectures: tuple[Architecture, ...]
    hardware: tuple[HardwareProfile, ...]
    stacks: tuple[MethodStack, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    output_tokens: int
    options: Options
    assume: str | None
    asked: dict[str, list[str]]

    @classmethod
    def of(
        cls,
        *,
        models: Sequence[str],
        gpus: Sequence[str],
        methods: Sequence[str],
        contexts: Sequence[int],
        batches: Sequence[int],
        output_tokens: int,
        options: dict[str, Any],
        assume: str | None = None,
    ) -> "Sweep":
        """Load everything by name; raises ``LccostError`` for what does not exist."""
        hardware = _distinct("GPU", [load_hardware(g) for g in gpus])
        if options.get("engine") is not None:
            own = {name for h in hardware for name in own_engines(h)}
            options = {**options, "engine": engine_of(options["engine"], own).name}
        return cls(
            architectures=_distinct("model", [load_architecture(m, assume=assume) for m in models]),
            hardware=hardware,
            stacks=tuple(dict.fromkeys(parse_methods(methods))),
            contexts=tuple(contexts),
            batches=tuple(batches),
            output_tokens=output_tokens,
            options=Options(**options),
            assume=assume,
            asked={"model": list(models), "gpu": list(gpus)},
        )

    def inputs(self) -> dict[str, Any]:
        """The request, so that it can be repeated from a result."""
        return {
            **self.asked,
            "method": [s.spec for s in self.stacks],
            "context": list(self.contexts),
            "batch": list(self.batches),
            "output_tokens": self.output_tokens,
            "dtype": self.options.dtype,
            "weight_dtype": self.options.weight_dtype,
            "level": self.options.level,
            "tp": self.options.tp,
            "engine": self.options.engine,
            "memory_fraction": self.options.memory_fraction,
            "assume": self.assume,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Every combination, in option order. An impossible one is a row with the reason, unless it
        is the only one: then its ``NotApplicableError`` is raised.
        """
        workload = Workload.of(
            np.array(self.batches)[None, :], np.array(self.contexts)[:, None], self.output_tokens
        )
        axes = (self.architectures, self.hardware, self.stacks, self.contexts, self.batches)
        alone = all(len(axis) == 1 for axis in axes)
        out: list[dict[str, Any]] = []
        for architecture in self.architectures:
            for hardware in self.hardware:
                per_method: list[list[dict[str, Any]]] = []
                for stack in self.stacks:
                    try:
                        per_method.append(
                            self.predict(architecture, stack, hardware, workload).rows()
                        )
                    except LccostError as error:
                        if alone or not isinstance(error, NotApplicableError):
                            raise
                        per_method.append(self._refused(architecture, stack, hardware, error))
                # --method stands before --context and --batch
                out += [row for rows in per_method for row in rows]
        return out

    def predict(
        self,
        architecture: Architecture,
        stack: MethodStack,
        hardware: HardwareProfile,
        workload: Workload,
    ) -> Prediction:
        """One vectorised call."""
        o = self.options
        return predict(
            architecture,
            stack,
            workload,
            hardware,
            dtype=o.dtype,
            weight_dtype=o.weight_dtype,
            level=o.level,
            tp=o.tp,
            engine=o.engine,
            memory_fraction=o.memory_fraction,
        )

    def _refused(
        self,
        architecture: Architecture,
        stack: MethodStack,
        hardware: HardwareProfile,
        error: LccostError,
    ) -> list[dict[str, Any]]:
        return [
            inapplicable_row(
                key_fields(
                    architecture=architecture,
                    method=stack,
                    gpu=hardware.name,
                    level=self.options.level,
                    engine=self.options.engine or default_engine(hardware, self.options.level),
                    tp=self.options.tp,
                    dtype=self.options.dtype or default_dtype(architecture),
                    weight_dtype=self.options.weight_dtype,
                    batch=batch,
                    context_tokens=context,
                    output_tokens=self.output_tokens,
                ),
                str(error),
            )
            for context in self.contexts
            for batch in self.batches
        ]


def _distinct(kind: str, found: Sequence[_Named]) -> tuple[_Named, ...]:
    """Without doubles (aliases of one thing); two things of one name cannot be told apart."""
    out: dict[str, _Named] = {}
    for item in found:
        if out.setdefault(item.name, item) != item:
            raise ConfigError(
                f"two different {kind}s are called {item.name}: give one of the files another name"
            )
    return tuple(out.values())


def solvable(row: dict[str, Any], solve: str) -> bool:
    """Whether the asked question has an answer in this row. An unlimited context is an answer."""
    if solve == "max-batch":
        return bool(row["max_batch"])
    if solve == "min-gpus":
        return row["min_gpus"] is not None
    return row["max_context_tokens"] is None or row["max_context_tokens"] > 0


#: What a reader must know about the basis of a time.
BASIS_NOTES = {
    "prior": "prior: a tenth of the time or more, or a method's own kernels, were never fitted on "
    "this GPU; they rest on a prior made from published whole passes: read low-high as the answer",
    "transferred": "transferred: kernels fitted on the nearest GPU or another engine, scaled with "
    "the datasheet, low-high widened for it",
    "calibrated": "calibrated: kernels fitted on tables measured on this GPU with this engine, "
    "slowed down to what published whole passes of all engines show",
}


def assumptions(rows: Sequence[dict[str, Any]], run: Sweep) -> list[str]:
    """What a reader must know before trusting the numbers."""
    engines = sorted({str(r["engine"]) for r in rows if r["applicable"]})
    bases = sorted({str(r["basis"]) for r in rows if r["applicable"]})
    if not engines:
        return ["no combination applies: every row says why"]
    out = [
        f"engine {', '.join(engines)}; basis of times: {', '.join(bases)}",
        "TTFT is unloaded (no queue); TPOT is the step that reads the given context",
        f"fits means the peak within {run.options.memory_fraction:.0%} of the memory the driver "
        f"reports, with context + {run.output_tokens} output tokens",
    ]
    out += [BASIS_NOTES[b] for b in bases if b in BASIS_NOTES]
    out += sorted({n for r in rows for n in r["notes"] or () if n.startswith("prior: ")})
    for a in run.architectures:
        beyond = [c for c in run.contexts if a.max_context_tokens and c > a.max_context_tokens]
        if beyond:
            out.append(
                f"{a.name}: {max(beyond):,} tokens are more than the {a.max_context_tokens:,} its "
                "config allows; costs hold, answers may not"
            )
        if a.assumed:
            out.append(f"{a.name}: read as family {a.family} because --assume says so")
        if any(isinstance(m, MoE) for layer in a.layers for m in layer.mlps):
            out.append(f"{a.name}: experts are assumed to be chosen uniformly")
    out += _scores(run)
    for h in run.hardware:
        if run.options.tp > h.max_gpus_per_node:
            out.append(
                f"{h.name}: tp {run.options.tp} spans nodes of {h.max_gpus_per_node}; collectives "
                "are priced at the speed of the link within a node"
            )
        if h.price_usd_per_hour:
            low, mid, high = h.price_usd_per_hour
            out.append(
                f"{h.name}: {mid:.2f} USD per GPU-hour ({low:.2f}-{high:.2f}), {h.price_date}"
            )
    return out


def _scores(run: Sweep) -> list[str]:
    """Different architectures beside each other: by score, never by a drop."""
    if len(run.architectures) == 1:
        return []
    out = []
    for a in run.architectures:
        known = [s for s in scores(a.name) if "average" in s["task"].lower()]
        text = "; ".join(
            f"{s['task']} {s['value']:g} ({s['source'].partition(',')[0]})" for s in known[:3]
        )
        out.append(f"{a.name}: uncompressed score {text or 'unknown'}")
    return out


def plot(rows: Sequence[dict[str, Any]], run: Sweep, path: Path) -> None:
    """The roofline of the predictions on the first GPU."""
    from reports.figures import roofline, save_figure

    hardware = run.hardware[0]
    save_figure(roofline([r for r in rows if r["gpu"] == hardware.name], hardware), path)

"""Records of this project's own kernels as rows of their families.

One JSON object a line, as ``benchmarks/kernels_gpu.py`` and ``prompt_kernels_gpu.py`` write them.
What a call did is not read from the record but built again: the operation that the cost model has
at the record's method, mixer and sizes, so that rows and predictions speak of the same amounts.
Only calls of the kernels count; the other forms in the same files are there to compare with.

    kernel          name in ``costmodel.fused_kernels``
    form            "fused": ran by the kernels; "kept": plain decode of what a method keeps
    method_spec, phase, mixer, dtype, context_tokens, reserved_tokens, batch     the point
    tokens          what is cached where it is not the context
    seconds         one call in a replayed graph, with cold caches
    gpu, device_name, engine
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.calibration.schemas import Record, Row, Schema, count, hardware_of, number, text
from costmodel.engines import load_engine
from costmodel.errors import ConfigError, LccostError
from costmodel.fused_kernels import KERNELS, work_of
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.kernels.fused_time import ENGINE
from costmodel.methods.parse import parse_method
from costmodel.mixers import AbstractMixer, Attention
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.rglru import RGLRU
from costmodel.operation import Operation
from costmodel.workload import Point

#: Mixers that kernels run, by their kind.
MIXERS: Mapping[str, type[AbstractMixer]] = {
    "attention": Attention,
    "mamba2": Mamba2,
    "rglru": RGLRU,
}
#: A layer behind those that a method leaves dense.
_LAYER, _LAYERS = 2, 3


@dataclass(frozen=True, slots=True)
class KernelRecords(Schema):
    """The form of these records; ``shape_of`` is not used."""

    def read(self, record: Record, profile: HardwareProfile | None = None) -> Row:
        """Return one record as (family, shape, seconds)."""
        if text(record, "form") not in ("fused", "kept"):
            raise ConfigError(f"form {text(record, 'form')[:40]!r} is no kernel of this project")
        seconds = number(record, "seconds")
        if seconds <= 0:
            raise ConfigError(f"seconds: expected a time above 0, got {seconds:g}")
        name = hardware_of(record, profile)
        device = profile or load_hardware(name)
        operation = operation_of(record)
        shape = {
            column: float(value)
            for column, value in work_of(operation, float(device.n_units or 100)).items()
        }
        return ("fused", operation.kernel, name, ENGINE, ""), shape, seconds


def operation_of(record: Record) -> Operation:
    """The operation whose time a record holds."""
    kernel, phase = text(record, "kernel"), text(record, "phase")
    if kernel not in KERNELS:
        raise ConfigError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel[:40]!r}")
    if phase not in ("prefill", "decode"):
        raise ConfigError(f"phase: expected prefill or decode, got {phase[:40]!r}")
    tokens = count(record, "tokens", count(record, "context_tokens"))
    point = Point(
        batch=count(record, "batch"),
        prompt_tokens=tokens,
        cached_tokens=tokens,
        reserved_tokens=count(record, "reserved_tokens", tokens),
        dtype=text(record, "dtype") or "bf16",
        kv_dtype=text(record, "dtype") or "bf16",
        level="ideal",
        engine=load_engine(ENGINE),
    )
    if point.dtype not in ("bf16", "fp16"):
        raise ConfigError(f"dtype: the kernels are for bf16 and fp16, got {point.dtype[:40]!r}")
    group = MixerGroup(_mixer(record), 1, (_LAYER,), _LAYERS)
    try:
        stack = parse_method(text(record, "method_spec") or "full").resolved(int(tokens))
        if stack.conflict is not None:
            raise ConfigError(stack.conflict)
        hook = stack.decode if phase == "decode" else stack.prefill
        with np.errstate(all="raise"):
            operations = hook(group, point)
    except (LccostError, ArithmeticError, AssertionError) as error:
        raise ConfigError(f"method_spec: {error}") from None
    found = [op for op in operations if op.kernel == kernel and np.all(op.count > 0)]
    if len(found) != 1:
        raise ConfigError(
            f"{text(record, 'method_spec')[:80]!r} does not run {kernel} in {phase} at these sizes"
        )
    return found[0]


def _mixer(record: Record) -> AbstractMixer:
    """The mixer of a record: its kind and its fields."""
    try:
        fields = msgspec.json.decode(text(record, "mixer"), type=dict[str, Any])
        kind = MIXERS[fields.pop("kind")]
        mixer: AbstractMixer = msgspec.convert(fields, type=kind)
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        raise ConfigError(
            f"mixer: expected kind ({', '.join(MIXERS)}) and sizes: {error}"
        ) from None
    fields.pop("extra_parameters", None)  # the only number that may be none
    sizes = [v for v in fields.values() if isinstance(v, int) and not isinstance(v, bool)]
    if not sizes or min(sizes) < 1 or max(sizes) > 2**24:
        raise ConfigError("mixer: expected sizes of at least 1")
    return mixer


def json_lines(path: Path) -> tuple[list[str], list[tuple[int, Record]]]:
    """(columns, records with their line) of a file of JSON objects; those that hold no time are
    notes about others and left out.
    """
    columns: dict[str, None] = {}
    records: list[tuple[int, Record]] = []
    try:
        for line, written in enumerate(path.read_text("utf-8").splitlines(), start=1):
            if not written.strip():
                continue
            value = json.loads(written)
            if not isinstance(value, dict):
                raise ValueError(f"line {line}: expected an object")
            if "seconds" not in value:
                continue
            record = {k: v if isinstance(v, str) else json.dumps(v) for k, v in value.items()}
            names = {"hw": record.get("gpu", ""), "device": record.get("device_name", "")}
            records.append((line, record | names))
            columns |= dict.fromkeys(record)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON lines: {error}") from error
    if not records:
        raise ConfigError(f"{path}: no record holds a time")
    return list(columns), records


SCHEMA = KernelRecords(
    "kernel_records",
    ("fused",),
    frozenset({"kernel", "form", "method_spec", "phase", "mixer", "context_tokens", "seconds"}),
    lambda record: ("fused", "", {}),
)

"""Where the numbers of a prediction come from: memory by part, and every operation."""

from typing import Any

import numpy as np

from costmodel.engines import Engine
from costmodel.errors import NotApplicableError
from costmodel.fused_room import alive_bytes, room_bytes
from costmodel.hardware import HardwareProfile
from costmodel.kernels import time_operation
from costmodel.layout import decode_operations
from costmodel.memory import state_of
from costmodel.mixers import Attention
from costmodel.model import Model
from costmodel.operation import Operation, Operations
from lccost.sweep import Sweep


def explain(run: Sweep) -> list[dict[str, Any]]:
    """Memory and operations of the first context and batch of each combination that applies."""
    out = []
    for architecture in run.architectures:
        for hardware in run.hardware:
            for stack in run.stacks:
                try:
                    model = Model.of(architecture, stack, hardware, run.options)
                except NotApplicableError:
                    continue
                out.append(_block(model, run))
    return out


def _block(model: Model, run: Sweep) -> dict[str, Any]:
    context, batch = run.contexts[0], run.batches[0]
    phases = model.operations(float(batch), float(context), float(run.output_tokens))
    # the peak of decode is that of the last step
    point = model.point(np.float64(batch), np.float64(context), np.float64(run.output_tokens))
    last = point.at(point.prompt_tokens + run.output_tokens)
    states = [state_of(model.run, p) for p in (point, last)]
    allocated = [float(np.max(state[2])) for state in states]
    hardware = model.run.hardware
    return {
        "model": model.architecture.name,
        "gpu": hardware.name,
        "method_spec": model.run.stack.spec,
        "context_tokens": context,
        "batch": batch,
        "state": {
            "bytes": round(float(np.max(states[0][0]))),
            "host_bytes": round(float(np.max(states[0][1]))),
            **_symbols(model, context, batch),
        },
        "memory": {
            "capacity_bytes": round(hardware.memory_bytes * run.options.memory_fraction),
            "reported_bytes": round(hardware.memory_bytes),
            "prefill": _parts(model, allocated[0], phases["prefill"]),
            "decode": _parts(model, max(allocated), decode_operations(model.run, last)),
        },
        "operations": [
            _operation(op, phase, hardware, model.engine)
            for phase, operations in phases.items()
            for op in operations
            if np.max(op.count) > 0
        ],
    }


def _symbols(model: Model, context: int, batch: int) -> dict[str, Any]:
    """Formulas of the methods with the symbols of the model's first attention layers."""
    symbols: dict[str, Any] = {"B": batch, "T": context}
    group = next((g for g in model.run.mixer_groups if isinstance(g.mixer, Attention)), None)
    if group is not None and isinstance(group.mixer, Attention):
        m = group.mixer
        symbols |= {
            "L": group.n_layers, "N": m.n_heads, "K": m.n_kv_heads, "Hk": m.head_dim,
            "Hv": m.v_head_dim,
        }  # fmt: skip
    resolved = model.run.stack.resolved(context)
    return {
        "formula": "; ".join(m.STATE_FORMULA for m in resolved.methods),
        "symbols": symbols,
        "parameters": resolved.parameters,
    }


def _parts(model: Model, allocated: float, operations: Operations) -> dict[str, Any]:
    """Terms of a peak, in bytes of one GPU."""
    sms = float(model.run.hardware.n_units or 100)
    widest = max(operations, key=lambda op: float(np.max(alive_bytes(op, sms))))
    engine, one = model.engine, model.run.tp == 1
    parts = {
        "weights_bytes": round(float(model.run.weights_bytes)),
        "state_allocated_bytes": round(allocated),
        "transient_bytes": round(float(np.max(alive_bytes(widest, sms)))),
        "kernel_room_bytes": round(float(np.max(room_bytes(operations, sms)))),
        "engine_bytes": round(engine.reserved_bytes[0 if one else 1]),
    }
    return {"peak_bytes": sum(parts.values()), **parts, "transient_of": widest.name}


def _operation(
    op: Operation, phase: str, hardware: HardwareProfile, engine: Engine
) -> dict[str, Any]:
    t = time_operation(op, hardware, engine.kernels, engine.in_situ)
    shape = {name: float(np.max(value)) for name, value in op.shape.items()}
    amounts = {
        "count": op.count,
        "flops": op.flops,
        "executed_flops": op.counted_flops,
        "weight_bytes": op.weight_bytes,
        "state_bytes": op.state_bytes,
        "workspace_bytes": op.workspace_bytes,
        "activation_bytes": op.activation_bytes,
        "transient_bytes": op.transient_bytes,
        "link_bytes": op.link_bytes,
        "launches": op.launches,
        "time_s": op.count * t.mid_s,
    }
    return {
        "phase": phase,
        "name": op.name,
        "kind": op.kind,
        **{name: float(np.max(value)) for name, value in amounts.items()},
        "shape": {name: value for name, value in shape.items() if np.isfinite(value)},
        "dtype": op.dtype,
        "basis": t.basis,
        "formula": op.formula,
        "source": op.source,
    }

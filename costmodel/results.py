"""What comes out: a Prediction, and its rows as JSON-ready dictionaries.

The keys of a row are the contract with whoever scripts lccost. Unknown numbers are None, never NaN
or Infinity. A result never prints, saves or plots itself.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.architecture import Architecture
from costmodel.hardware import HardwareProfile
from costmodel.methods.stack import MethodStack
from costmodel.power import power_basis
from costmodel.quality import accuracy
from costmodel.workload import Level, Workload

SCHEMA_VERSION = "1"

#: Array-valued results, one float64 array each, in the shape of the workload.
METRICS = (
    "weights_bytes",
    "state_bytes",
    "state_host_bytes",
    "state_allocated_bytes",
    "peak_prefill_bytes",
    "peak_decode_bytes",
    "prefill_flops",
    "decode_flops",
    "executed_prefill_flops",
    "executed_decode_flops",
    "prefill_hbm_bytes",
    "decode_hbm_bytes",
    "prefill_link_bytes",
    "decode_link_bytes",
    "prefill_collective_bytes",
    "decode_collective_bytes",
    "ttft_s",
    "ttft_low_s",
    "ttft_high_s",
    "tpot_s",
    "tpot_low_s",
    "tpot_high_s",
    "roofline_ttft_s",
    "roofline_tpot_s",
    "prefill_launch_s",
    "decode_launch_s",
    "fits",
    "max_batch",
    "max_context_tokens",
    "min_gpus",
    "tokens_per_s",
    "energy_j_per_token",
    "usd_per_million_output_tokens",
    "extrapolated",
)

#: Keys of a row, in order.
KEYS = (
    "model",
    "method",
    "method_parameters",
    "method_spec",
    "level",
    "engine",
    "gpu",
    "tp",
    "gpus",
    "dtype",
    "weight_dtype",
    "kv_dtype",
    "batch",
    "context_tokens",
    "output_tokens",
    "applicable",
    "reason",
    "n_parameters",
    "n_active_parameters",
    "weights_bytes",
    "state_bytes",
    "state_host_bytes",
    "state_allocated_bytes",
    "peak_prefill_bytes",
    "peak_decode_bytes",
    "prefill_flops",
    "decode_flops",
    "executed_prefill_flops",
    "executed_decode_flops",
    "prefill_hbm_bytes",
    "decode_hbm_bytes",
    "prefill_link_bytes",
    "decode_link_bytes",
    "prefill_collective_bytes",
    "decode_collective_bytes",
    "ttft_s",
    "ttft_low_s",
    "ttft_high_s",
    "tpot_s",
    "tpot_low_s",
    "tpot_high_s",
    "roofline_ttft_s",
    "roofline_tpot_s",
    "prefill_launch_s",
    "decode_launch_s",
    "prefill_bound",
    "decode_bound",
    "fits",
    "max_batch",
    "max_context_tokens",
    "min_gpus",
    "tokens_per_s",
    "energy_j_per_token",
    "energy_basis",
    "usd_per_million_output_tokens",
    "accuracy_drop_points",
    "accuracy_source",
    "basis",
    "anchored_by",
    "extrapolated",
    "equals_full",
    "assumed_family",
    "notes",
)

_BOOLEANS = frozenset({"fits", "extrapolated"})
_WHOLE = frozenset(
    {
        k
        for k in METRICS
        if k.endswith(("_bytes", "_flops")) or k in ("max_batch", "max_context_tokens", "min_gpus")
    }
)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Prediction:
    """Every metric of one (model, method, device, options) over a workload.

    ``metrics`` maps each name of ``METRICS`` to a float64 array of the workload's shape (booleans
    as 0 and 1, unknown as NaN, unlimited as infinity); ``prefill_bound`` and ``decode_bound`` are
    arrays of names. ``prediction["ttft_s"]`` reads one. ``unfitted`` says why parts of the time
    rest on a prior that no larger share hides.
    """

    architecture: Architecture
    method: MethodStack
    workload: Workload
    hardware: HardwareProfile
    level: Level
    engine: str
    dtype: str
    weight_dtype: str
    tp: int
    memory_fraction: float
    metrics: dict[str, NDArray[np.float64]]
    prefill_bound: NDArray[np.str_]
    decode_bound: NDArray[np.str_]
    basis: str
    unfitted: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.metrics[name]

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per point with the keys of ``KEYS``, in C order of the workload."""
        shape = self.workload.shape
        batch, context, output = (
            np.broadcast_to(a, shape).ravel()
            for a in (
                self.workload.batch,
                self.workload.context_tokens,
                self.workload.output_tokens,
            )
        )
        flat = {k: v.ravel() for k, v in self.metrics.items()}
        prefill_bound, decode_bound = self.prefill_bound.ravel(), self.decode_bound.ravel()
        rows = []
        for i in range(batch.size):
            row = key_fields(
                architecture=self.architecture,
                method=self.method,
                gpu=self.hardware.name,
                level=self.level,
                engine=self.engine,
                tp=self.tp,
                dtype=self.dtype,
                weight_dtype=self.weight_dtype,
                batch=int(batch[i]),
                context_tokens=int(context[i]),
                output_tokens=int(output[i]),
            )
            row.update({k: _json_number(k, float(v[i])) for k, v in flat.items()})
            row["prefill_bound"] = str(prefill_bound[i])
            row["decode_bound"] = str(decode_bound[i])
            row["applicable"] = True
            row["basis"] = self.basis
            row["anchored_by"] = self.hardware.anchored_by
            row["energy_basis"] = power_basis(self.hardware)
            row["equals_full"] = bool(
                np.all(self.method.equals_full(float(context[i]), self.architecture))
            )
            row["accuracy_drop_points"], row["accuracy_source"] = (
                (0.0, "the budget holds the whole context")
                if row["equals_full"] and self.method.name != "full"
                else accuracy(
                    self.architecture.name,
                    self.method.name,
                    row["method_parameters"],
                    int(context[i]),
                )
            )
            row["notes"] = [*self.architecture.notes, *(f"prior: {why}" for why in self.unfitted)]
            rows.append({k: row.get(k) for k in KEYS})
        return rows


def key_fields(
    *,
    architecture: Architecture,
    method: MethodStack,
    gpu: str,
    level: str,
    engine: str | None,
    tp: int,
    dtype: str | None,
    weight_dtype: str,
    batch: int,
    context_tokens: int,
    output_tokens: int,
) -> dict[str, Any]:
    """The fields that say which point a row is, under the names that measurements use too."""
    resolved = method.resolved(context_tokens)
    return {
        "model": architecture.name,
        "method": method.name,
        "method_parameters": resolved.parameters,
        "method_spec": method.spec,
        "level": level,
        "engine": engine,
        "gpu": gpu,
        "tp": tp,
        "gpus": tp,
        "dtype": dtype,
        "weight_dtype": weight_dtype,
        "kv_dtype": method.kv_dtype(dtype) if dtype else None,
        "batch": batch,
        "context_tokens": context_tokens,
        "output_tokens": output_tokens,
        "n_parameters": architecture.n_parameters,
        "n_active_parameters": architecture.n_active_parameters,
        "assumed_family": architecture.family if architecture.assumed else None,
    }


def inapplicable_row(fields: dict[str, Any], reason: str) -> dict[str, Any]:
    """A row of a combination that does not exist: nulls and the reason."""
    row = dict(fields, applicable=False, reason=reason)
    return {k: row.get(k) for k in KEYS}


def _json_number(name: str, value: float) -> Any:
    if not math.isfinite(value):
        return None
    if name in _BOOLEANS:
        return bool(value)
    if name in _WHOLE:
        return round(value)
    return value


def document(
    command: str,
    inputs: dict[str, Any],
    assumptions: list[str],
    results: list[dict[str, Any]],
    version: str,
) -> dict[str, Any]:
    """The envelope of every JSON document."""
    return {
        "schema_version": SCHEMA_VERSION,
        "lccost_version": version,
        "command": command,
        "inputs": inputs,
        "assumptions": assumptions,
        "results": results,
    }

"""Rows of kernels for whose data type or device no family is fitted: the prior, flagged as such.

int8, int4 and fp4 products have no published rows to fit: they are priced by the prior of their
operation kind, with the bytes their weights are stored in. So is any row of a device too unlike the
fitted ones (another maker's) for their families to answer.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from costmodel.calibration.schemas import Read, Schema, count, text
from costmodel.hardware import HardwareProfile
from costmodel.kernels.kinds import Work, kernel_kind
from costmodel.kernels.prior import (
    COLLECTIVE_FRACTION,
    COLLECTIVE_LATENCY_S,
    PRIORS,
    prior_time,
)
from costmodel.operation import Array, Operation
from costmodel.validation.result import Block
from costmodel.validation.table import Record

#: Column of a schema that holds the type of the weights.
_FORM_COLUMNS = {"gemm": "dtype", "moe": "moe_dtype"}
#: spelling -> (bytes of a stored weight, bytes of an activation, types it may be multiplied in)
_FORMATS: Mapping[str, tuple[float, float, tuple[str, ...]]] = {
    "int8": (1.0, 1.0, ("int8", "fp8")),
    "int8_wo": (1.0, 2.0, ()),
    "sq": (1.0, 1.0, ("int8", "fp8")),
    "w8a8": (1.0, 1.0, ("int8", "fp8")),
    "w8a16": (1.0, 2.0, ()),
    "int4": (0.5 + 2.5 / 128, 2.0, ()),
    "w4a16": (0.5 + 2.5 / 128, 2.0, ()),
    "w4afp8": (0.5 + 2.5 / 128, 1.0, ("fp8",)),
    "int4_wo": (0.5 + 2.5 / 128, 2.0, ()),
    "awq": (0.5 + 2.5 / 128, 2.0, ()),
    "gptq": (0.5 + 2.5 / 128, 2.0, ()),
    "mxfp4": (0.5 + 1 / 32, 2.0, ()),
    "w4a16_mxfp4": (0.5 + 1 / 32, 2.0, ()),
    "w4a8_mxfp4_mxfp8": (0.5 + 1 / 32, 1.0, ("fp8",)),
    "w4a8_nvfp4_fp8": (0.5 + 1 / 16, 1.0, ("fp8",)),
    "nvfp4": (0.5 + 1 / 16, 0.5 + 1 / 16, ("fp4", "fp8")),
    "fp4": (0.5 + 1 / 16, 0.5 + 1 / 16, ("fp4", "fp8")),
    "tf32": (4.0, 4.0, ("tf32", "fp32")),
    "fp32": (4.0, 4.0, ("fp32",)),
    "float32": (4.0, 4.0, ("fp32",)),
}


#: Bytes of a cached element in types without families of attention.
_CACHES: Mapping[str, float] = {
    "int8": 1.0,
    "int4": 0.5 + 4.0 / 64,
    "fp4": 0.5 + 1 / 16,
    "nvfp4": 0.5 + 1 / 16,
    "mxfp4": 0.5 + 1 / 32,
    "fp32": 4.0,
    "float32": 4.0,
}
#: Columns of a schema that hold the type of a cache.
_CACHE_COLUMNS = {"attention": "kv_dtype", "mla": "kv_cache_dtype"}


def prior_row(schema: Schema, record: Record) -> Read | None:
    """(kind, format, shape) of a row in a type without families; None for any other row."""
    column = _CACHE_COLUMNS.get(schema.name, "")
    cache = text(record, column).lower().removeprefix("torch.")
    if cache in _CACHES:
        kind, _, shape = schema.shape_of({**record, column: "bf16"})
        return f"prior:{kind}", cache, shape | {"element_bytes": _CACHES[cache]}
    form = text(record, _FORM_COLUMNS.get(schema.name, "")).lower().removeprefix("torch.")
    if form not in _FORMATS:
        return None
    if schema.name == "gemm":
        return "prior:gemm", form, {name: count(record, name) for name in ("m", "n", "k")}
    _, _, shape = schema.shape_of({**record, _FORM_COLUMNS[schema.name]: "bf16"})
    return "prior:moe_gemm", form, shape


def prior_block(
    kind: str,
    form: str,
    group: Mapping[str, str],
    rows: NDArray[np.intp],
    shape: Mapping[str, NDArray[np.float64]],
    device: HardwareProfile,
    datasheet: bool,
) -> Block:
    """Predictions from the prior (or the roofline) of rows of one format."""
    name = kind.removeprefix("prior:")
    if name in ("gemm", "moe_gemm"):
        operation = _operation(name, form, shape, device)
        t = prior_time(operation, device)
        times: tuple[Array, ...] = (t.low_s, t.mid_s, t.high_s)
        work = Work(operation.flops, device.peak(operation.dtype), operation.moved_bytes)
    else:
        work = kernel_kind(name).work(device, shape, "bf16")
        times = work_interval(name, "", work, device, rows.shape)
    basis = "prior"
    if datasheet:
        compute = np.asarray(work.flops) / work.peak_flops_per_s
        roofline = np.maximum(compute, np.asarray(work.n_bytes) / device.hbm_bytes_per_s)
        times, basis = (np.nan, roofline, np.nan), "datasheet"
    low, mid, high = (np.broadcast_to(np.asarray(t, dtype=np.float64), rows.shape) for t in times)
    return Block(group=group, rows=rows, low=low, mid=mid, high=high, basis=basis)


def _operation(
    kind: str, form: str, shape: Mapping[str, NDArray[np.float64]], device: HardwareProfile
) -> Operation:
    """A product of weights in a format, in the first of its types that the device multiplies in."""
    weight, activation, types = _FORMATS[form]
    dtype = next((t for t in (*types, "bf16") if t in device.peak_flops_per_s), "fp16")
    build = _gemm if kind == "gemm" else _moe
    return build(shape, weight, activation, dtype)


#: Kind of family -> kind of prior, by the start of the variant where one kind has several.
_KINDS = {"scan/scan_step": "scan_step", "scan/conv_step": "scan_step", "scan": "scan_prefill"}


def work_interval(
    kind: str, variant: str, work: Work, device: HardwareProfile, shape: tuple[int, ...]
) -> tuple[NDArray[np.float64], ...]:
    """(low, mid, high) seconds of rows from their work alone, by the prior of their kind."""
    compute = np.broadcast_to(np.asarray(work.flops) / work.peak_flops_per_s, shape)
    n_bytes = np.broadcast_to(np.asarray(work.n_bytes, dtype=np.float64), shape)
    if kind == "collective":
        wire = np.maximum(compute, n_bytes / device.hbm_bytes_per_s)
        low, mid, high = (
            wire / fraction + latency
            for fraction, latency in zip(COLLECTIVE_FRACTION, COLLECTIVE_LATENCY_S, strict=True)
        )
        return low, mid, high
    prior = PRIORS[_KINDS.get(f"{kind}/{variant}", _KINDS.get(kind, kind))]
    memory = n_bytes / device.hbm_bytes_per_s
    c, m, floor = prior.compute_fraction, prior.bandwidth_fraction, prior.floor_s
    return (
        np.maximum(compute / c[0], memory / m[0]) + floor[0],
        np.hypot(compute / c[1], memory / m[1]) + floor[1],
        compute / c[2] + memory / m[2] + floor[2],
    )


def _gemm(
    shape: Mapping[str, NDArray[np.float64]], weight: float, activation: float, dtype: str
) -> Operation:
    m, n, k = shape["m"], shape["n"], shape["k"]
    return Operation(
        name="gemm",
        kind="gemm",
        flops=2.0 * m * n * k,
        weight_bytes=n * k * weight,
        activation_bytes=m * (k * activation + n * 2.0),
        launches=1.0 if activation >= 2.0 else 2.0,
        dtype=dtype,
    )


def _moe(
    shape: Mapping[str, NDArray[np.float64]], weight: float, activation: float, dtype: str
) -> Operation:
    """Both grouped products: 3 H I elements of weights per expert hit, and its share of rows."""
    share = shape["local_experts"] / shape["n_experts"]
    rows = shape["tokens"] * shape["top_k"] * share
    per_expert = 3.0 * shape["hidden"] * shape["inner"]
    chance = np.minimum(shape["top_k"] / shape["n_experts"], 1.0 - 1e-12)
    hit = shape["local_experts"] * -np.expm1(shape["tokens"] * np.log1p(-chance))
    moved = rows * (shape["hidden"] * (activation + 2.0) + shape["inner"] * (4.0 + activation))
    return Operation(
        name="experts",
        kind="moe_gemm",
        flops=2.0 * rows * per_expert,
        weight_bytes=hit * per_expert * weight,
        activation_bytes=moved,
        launches=2.0,
        dtype=dtype,
    )

"""What an operation asks of a fitted kernel family: an operation carries counts, a family's model
wants a shape.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from costmodel.operation import Array, Operation, causal_pairs, some
from costmodel.units import DTYPE_BYTES

#: Which points something holds for.
Mask = NDArray[np.bool_] | np.bool_ | bool
#: Two amounts that should be one and the same may differ by this much.
SAME = 0.02


@dataclass(frozen=True, slots=True)
class Asked:
    """What an operation asks a family: its kind, variant, shape, and where it should be at home.

    ``mask``: the points it describes (a packed cache is a plain one while all of it is residual).
    """

    kind: str
    variant: str
    shape: Mapping[str, Array]
    kernel: str = ""
    within: Mapping[str, float] | None = None
    mask: Mask = True


def asked_of(operation: Operation) -> Asked | None:
    """What a family would have to answer; None where none was fitted for such an operation."""
    reader = _READERS.get(operation.kind)
    return None if reader is None or operation.unfitted else reader(operation)


def _close(a: Array, b: Array) -> Mask:
    if a is b:
        return True
    near: Mask = np.abs(np.asarray(a) - b) <= SAME * np.abs(np.asarray(b)) + 1e-9
    return near


def _first(amount: Array) -> float:
    return float(np.asarray(amount).flat[0])


def _variant(operation: Operation, elements: Array) -> str | None:
    """bf16 or fp8 where the weights are stored as they are multiplied; else None."""
    stored = np.asarray(operation.weight_bytes) / np.maximum(elements, 1.0)
    if operation.dtype in ("bf16", "fp16") and np.all(_close(stored, 2.0)):
        return "bf16"
    if operation.dtype == "fp8" and np.all((stored >= 0.98) & (stored <= 1.1)):
        return "fp8"
    return None


def _gemm(operation: Operation) -> Asked | None:
    shape = operation.shape
    if not {"m", "n", "k"} <= shape.keys() or some(operation.workspace_bytes):
        return None
    m, n, k = shape["m"], shape["n"], shape["k"]
    # A product in all points or in none: both sides are proportional to the rows.
    if not _close(_first(operation.flops), 2.0 * _first(m) * n * k):
        return None
    variant = _variant(operation, np.asarray(n) * k)
    if variant is None:
        return None
    return Asked("gemm", variant, {"m": m, "n": n, "k": k})


def _moe(operation: Operation) -> Asked | None:
    shape = operation.shape
    if not {"m", "n", "k", "experts", "active_experts", "top_k"} <= shape.keys():
        return None
    variant = _variant(operation, np.asarray(shape["n"]) * shape["k"] * shape["active_experts"])
    if variant is None:
        return None
    inner = shape["k"] if operation.name.endswith("down") else shape["n"]
    if "gate" in operation.name:
        inner = np.asarray(inner) / 2.0
    more = {"tokens": shape["m"], "n_experts": shape["experts"], "inner": inner}
    # Published fp8 experts carry scales per block of 128 x 128.
    return Asked("moe_gemm", "fp8_block" if variant == "fp8" else variant, {**shape, **more})


def _decode(operation: Operation) -> Asked | None:
    shape = operation.shape
    needed = {"batch", "kv_len", "n_heads", "n_kv_heads", "head_dim", "v_head_dim", "kv_bytes"}
    if not needed <= shape.keys():
        return None
    # Scores, copies: no fitted kernel writes them.
    plain = (
        np.asarray(operation.workspace_bytes) == 0.0 if some(operation.workspace_bytes) else True
    )
    width = np.asarray(shape["head_dim"]) + shape["v_head_dim"]
    elements = np.asarray(shape["batch"]) * shape["kv_len"] * (shape["n_kv_heads"] * width)
    stored = np.asarray(shape["kv_bytes"]) / np.maximum(elements, 1.0)
    names = ("batch", "kv_len", "n_heads", "n_kv_heads", "head_dim", "v_head_dim")
    for element_bytes in (2.0, 1.0):
        mask = _close(stored, element_bytes) & plain
        if np.any(mask):
            break
    else:
        return None
    asked = {name: shape[name] for name in names} | {"element_bytes": element_bytes, "window": 0.0}
    within = {"element_bytes": element_bytes}
    return Asked("decode_attention", "", asked, within=within, mask=mask)


def _prefill(operation: Operation) -> Asked | None:
    shape = operation.shape
    needed = {
        "batch",
        "q_len",
        "kv_len",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "v_head_dim",
        "pairs",
    }
    if not needed <= shape.keys():
        return None
    q, window = np.asarray(shape["q_len"]), np.asarray(shape.get("window_tokens", np.inf))
    unbounded = bool(np.all(np.isinf(window)))
    expected = causal_pairs(q, None if unbounded else window)
    mask = _close(shape["kv_len"], shape["q_len"]) & _close(shape["pairs"], expected)
    if some(operation.workspace_bytes):
        # K and V that are not cached as they are: the kernel reads them all the same. Anything
        # more is scores, which no fitted kernel writes.
        width = np.asarray(shape["n_kv_heads"]) * (shape["head_dim"] + shape["v_head_dim"])
        kv_bytes = shape["batch"] * shape["kv_len"] * width * DTYPE_BYTES[operation.dtype]
        mask = mask & (operation.workspace_bytes <= kv_bytes * (1 + SAME))
    if not np.any(mask):
        return None
    names = ("batch", "q_len", "n_heads", "n_kv_heads", "head_dim", "v_head_dim")
    more: dict[str, Array] = {
        "element_bytes": 2.0,
        "window": 0.0 if unbounded else np.where(window >= q, 0.0, window),
        "causal": 1.0,
    }
    asked = {**{name: shape[name] for name in names}, **more}
    return Asked("prefill_attention", "", asked, within={"causal": 1.0}, mask=mask)


def _mla_decode(operation: Operation) -> Asked | None:
    shape = operation.shape
    if not {"batch", "kv_len", "n_heads", "latent_dim", "rope_dim", "kv_bytes"} <= shape.keys():
        return None
    if shape["latent_dim"] != 512 or shape["rope_dim"] != 64:
        return None
    elements = np.asarray(shape["batch"]) * shape["kv_len"] * 576.0
    stored = np.asarray(shape["kv_bytes"]) / np.maximum(elements, 1.0)
    is_fp8 = float(np.min(stored)) < 1.5
    mask = (stored >= 0.98) & (stored <= 1.2) if is_fp8 else _close(stored, 2.0)
    if not np.any(mask):
        return None
    asked = {name: shape[name] for name in ("batch", "kv_len", "n_heads")}
    more = {"element_bytes": 1.0 if is_fp8 else 2.0}
    return Asked("mla_decode_attention", "", asked | more, within=more, mask=mask)


def _mla_prefill(operation: Operation) -> Asked | None:
    shape = operation.shape
    if not {"batch", "q_len", "pairs", "n_heads", "head_dim", "v_head_dim"} <= shape.keys():
        return None
    if shape["head_dim"] != 192 or shape["v_head_dim"] != 128:
        return None
    mask = _close(shape["pairs"], causal_pairs(shape["q_len"]))
    if not np.any(mask):
        return None
    asked = {name: shape[name] for name in ("batch", "q_len", "n_heads")}
    asked |= {"element_bytes": 2.0, "absorbed": 0.0}
    return Asked("mla_prefill_attention", "", asked, mask=mask)


def _scan(operation: Operation) -> Asked | None:
    """Gated DeltaNet and KDA; other recurrences have no family."""
    name = operation.name
    if "delta_rule" not in name and "kda" not in name:
        return None
    shape = operation.shape
    batch, q_len = shape["batch"], shape["q_len"]
    tokens = np.maximum(np.asarray(batch, dtype=np.float64) * q_len, 1.0)
    step = operation.kind == "scan_step"
    # A table's step and prompt both read a state and write one.
    asked = {
        "batch": batch,
        "seq_len": q_len,
        "token_bytes": operation.activation_bytes / tokens,
        "state_bytes": 2.0 * np.asarray(shape["state_bytes"]) / batch,
    }
    return Asked("scan", "scan_step" if step else "scan_prefill", asked, kernel="")


def _collective(operation: Operation) -> Asked | None:
    shape = operation.shape
    if not {"message_bytes", "n_gpus"} <= shape.keys():
        return None
    variant = "all_reduce" if operation.name == "all_reduce" else "all_gather"
    asked = {"message_bytes": shape["message_bytes"], "n_gpus": shape["n_gpus"]}
    return Asked("collective", variant, asked)


_READERS: dict[str, Callable[[Operation], Asked | None]] = {
    "gemm": _gemm,
    "moe_gemm": _moe,
    "decode_attention": _decode,
    "prefill_attention": _prefill,
    "mla_decode_attention": _mla_decode,
    "mla_prefill_attention": _mla_prefill,
    "scan_prefill": _scan,
    "scan_step": _scan,
    "collective": _collective,
}

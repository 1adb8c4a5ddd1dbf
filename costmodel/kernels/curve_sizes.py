"""What the measured curve of an operation class is read at: its size, unit of work, parameters.

One rule per class, found by an operation's name and by its kind: a curve of its own name goes
before one of its kind. The table of classes is in ``costmodel.kernels.curves``.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from costmodel.kernels.prior import timed_flops
from costmodel.operation import Array, Operation, blocked_pairs, causal_pairs

#: Keys a block of the CPU flash-attention kernel covers (PyTorch,
#: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp: kv_split_size 512).
CPU_KEY_BLOCK_TOKENS = 512.0
#: Queries the torch engine masks together in a windowed prompt (``measure.parts``).
MASKED_QUERY_TOKENS = 256.0


class Measured(NamedTuple):
    """Where to read a curve (``size``), what to multiply (``work``), and which variant."""

    kind: str
    size: Array
    work: Array
    parameters: Mapping[str, Array]


Rule = Callable[[Operation], Measured]


def tiled_causal_pairs(n_queries: Array) -> Array:
    """Query-key pairs a CPU flash kernel works on: keys in whole blocks of 512, or all S of fewer.

    With f = floor(S / 512) full blocks: 512^2 f (f + 1) / 2 + (S - 512 f) S.
    """
    s = np.asarray(n_queries, dtype=np.float64)
    block = CPU_KEY_BLOCK_TOKENS
    full: Array = np.floor(s / block)
    pairs: Array = block * block * full * (full + 1) / 2 + (s - block * full) * s
    return pairs


def windowed(operation: Operation) -> Measured | None:
    """The masked blocks of a prompt longer than its window; None where no window cuts it.

    Every block of 256 queries meets the window before its first query and itself.
    """
    shape = operation.shape
    window, s = shape.get("window_tokens", np.inf), shape["q_len"]
    if operation.name != "attention" or not np.any(s > window):
        return None
    pairs = blocked_pairs(s, window, MASKED_QUERY_TOKENS)
    per_pair = 2.0 * (shape["head_dim"] + shape["v_head_dim"]) * shape["n_heads"]
    keys = np.minimum(s, window + MASKED_QUERY_TOKENS - 1)
    parameters = {"head_dim": shape["head_dim"]}
    return Measured("windowed_attention", keys, shape["batch"] * pairs * per_pair, parameters)


def measured(operation: Operation) -> Iterator[Measured]:
    """Where to read the curves of the operation's own name, then those of its kind.

    What runs between matmuls has curves of its own where the MLPs' activation is tanh-GELU.
    """
    own = _RULES.get(operation.name, _plain)(operation)
    if operation.shape.get("gelu"):
        yield own._replace(kind=f"{operation.name}_gelu")
    yield own._replace(kind=operation.name)
    yield _RULES.get(operation.kind, _plain)(operation)


def _gemm(op: Operation) -> Measured:
    m, n, k = op.shape["m"], op.shape["n"], op.shape["k"]
    return Measured("gemm", m, 2.0 * m * n * k, {"n": n, "k": k})


def _experts(op: Operation) -> Measured:
    """One expert after another, each a matmul over the rows that chose it."""
    n, k = op.shape["n"], op.shape["k"]
    rows = op.shape["m"] * op.shape["top_k"]
    each = rows / np.maximum(op.shape["active_experts"], 1.0)
    return Measured("gemm", each, 2.0 * rows * n * k, {"n": n, "k": k})


def _gates(op: Operation) -> Measured:
    parameters = {name: op.shape[name] for name in ("k", "groups")}
    return Measured("", op.shape["m"], op.flops, parameters)


def _between(op: Operation) -> Measured:
    """Without weights: those of convolutions and gates are read where these are timed."""
    moved = op.activation_bytes
    return Measured("", moved, moved, {"blocks": op.shape["blocks"]})


def _prompt(op: Operation) -> Measured:
    s = op.shape["q_len"]
    tiles = tiled_causal_pairs(s) / np.maximum(causal_pairs(s), 1.0)
    parameters = {"head_dim": op.shape["head_dim"]}
    return Measured("prefill_attention", s, timed_flops(op) * tiles, parameters)


def _scored_prompt(op: Operation) -> Measured:
    """Score blocks that are written and read: their size decides, not the prompt's."""
    shape = op.shape
    rows = shape["batch"] * shape["n_heads"]
    keys = np.minimum(shape["kv_len"], shape["window_tokens"])
    return Measured("", rows * keys, op.counted_flops, {"head_dim": shape["head_dim"]})


def _cached(op: Operation) -> Measured:
    heads = op.shape["n_kv_heads"]
    parameters = {"head_dim": op.shape["head_dim"], "group": op.shape["n_heads"] / heads}
    return Measured("decode_attention", op.shape["kv_bytes"], op.shape["kv_bytes"], parameters)


def _copied(op: Operation) -> Measured:
    tokens = op.shape["batch"] * op.shape["kv_len"]
    width = op.shape["head_dim"] + op.shape["v_head_dim"]
    elements = tokens * op.shape["n_kv_heads"] * width
    return _cached(op)._replace(size=elements, work=elements)


def _scan(op: Operation) -> Measured:
    shape = op.shape
    channels = shape["batch"] * shape["n_heads"] * shape["head_dim"]
    elements = channels * np.ceil(shape["q_len"] / shape["chunk"]) * shape["chunk"]
    parameters = {name: shape[name] for name in ("head_dim", "d_state", "chunk")}
    return Measured("", elements, elements, parameters)


def _scan_step(op: Operation) -> Measured:
    elements = op.shape["state_bytes"] / 4.0
    parameters = {name: op.shape[name] for name in ("head_dim", "d_state")}
    return Measured("", elements, elements, parameters)


def _convolution(op: Operation) -> Measured:
    elements = op.shape["batch"] * op.shape["q_len"] * op.shape["channels"]
    return Measured("", elements, elements, {"kernel": op.shape["kernel"]})


def _select(op: Operation) -> Measured:
    scores = op.shape["rows"] * op.shape["length"]
    return Measured("select", scores, scores, {})


def _plain(op: Operation) -> Measured:
    """Elements where the operation counts them, else bytes."""
    if "elements" in op.shape:
        bits = {"bits": op.shape["bits"]} if "bits" in op.shape else {}
        return Measured(op.kind, op.shape["elements"], op.shape["elements"], bits)
    return Measured(op.kind, op.moved_bytes, op.moved_bytes, {})


_RULES: Mapping[str, Rule] = {
    # kinds
    "gemm": _gemm,
    "moe_gemm": _experts,
    "prefill_attention": _prompt,
    "decode_attention": _cached,
    "select": _select,
    # names
    "norm_rope_activation": _between,
    "rglru_gates": _gates,
    "score_pass": _scored_prompt,
    "banded_attention": _scored_prompt,
    "window_scores": _scored_prompt,
    "dequantised_attention": _copied,
    "scored_attention": _cached,
    "sink_attention": _cached,
    "update_and_evict": _select,
    "causal_conv1d": _convolution,
    "ssd_chunk_scan": _scan,
    "selective_scan": _scan,
    "rglru_scan": _scan,
    "wkv5": _scan,
    "selective_state_update": _scan_step,
    "rglru_step": _scan_step,
    "wkv5_step": _scan_step,
}

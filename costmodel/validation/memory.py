"""Memory of published runs: weights, caches, peaks, pools. Overall figures are of peaks and caches.

Which engine ran, how much of a cache a press kept, and what share of the device was used stand in
the rows' notes; formats of caches in ``kv_prec``.
"""

import re
from collections.abc import Sequence

from costmodel.errors import NotApplicableError
from costmodel.validation.cells import number, observed_value, whole
from costmodel.validation.kinds import Options
from costmodel.validation.memory_blocks import MemoryCase, MemoryRow, memory_blocks
from costmodel.validation.names import engine_named
from costmodel.validation.result import Block, Predictions
from costmodel.validation.table import Record
from costmodel.workload import Level

_GIB = 2.0**30
#: metric column -> (quantity, unit of the observed value in the unit of the prediction).
_METRICS = {
    "weights_gib": ("weights", _GIB),
    "peak_memory_gib": ("peak_torch", _GIB),
    "peak_memory_gb": ("peak_torch", 1e9),
    "kv_cache_size_gib": ("state", _GIB),
    "peak_torch_gib": ("peak_profile", _GIB),
    "activation_peak_gib": ("activations", _GIB),
    "non_torch_gib": ("non_torch", _GIB),
    "kv_pool_gib": ("kv_pool", _GIB),
    "kv_pool_tokens": ("pool_tokens", 1.0),
    "time_100_tokens_s": ("decode_time", 1.0),
}
#: quantity -> part of the table; only these are in the overall figures.
_PARTS = {"peak_torch": "peak", "peak_profile": "peak", "state": "state"}
#: Quantities of engines that serve, where a row does not say which; others are of published code.
_SERVED = frozenset({"kv_pool", "pool_tokens", "peak_profile", "activations", "non_torch"})
#: Tokens generated in rows that measure a generation.
_GENERATED = 100.0
_WEIGHTS = {"fp8": "fp8", "int8": "int8", "int4": "int4"}


def predict(records: Sequence[Record], options: Options) -> Predictions:
    """Bytes (tokens, seconds) of every row's metric."""
    blocks, unsupported = memory_blocks(list(enumerate(records)), read_row, options)
    return Predictions(
        blocks=tuple(blocks),
        unsupported=tuple(unsupported),
        assumptions=(
            "peaks are those of the tensor allocator: what an engine reserves beside tensors is "
            "left out of them",
        ),
    )


def read_row(record: Record) -> tuple[MemoryCase, MemoryRow]:
    """The case and the row."""
    name = record.get("metric", "").lower()
    if name not in _METRICS:
        raise NotApplicableError(
            f"metric {name[:60]!r} has no model here; known: {', '.join(_METRICS)}"
        )
    quantity = _METRICS[name][0]
    engine = _engine(record)
    cache = record.get("kv_prec", "").lower()
    method, level = _method(cache, record, engine)
    tp = max(whole(record, "n_gpu", 1), 1)
    context = number(record, "context_tokens", 2048.0)
    part = _PARTS.get(quantity)
    case = MemoryCase(
        model=record.get("model", ""),
        system=record.get("hw", ""),
        engine=engine,
        method=method,
        level=level,
        quantity=quantity,
        tp=tp,
        dtype="fp16" if record.get("weight_prec", "").lower().startswith("fp16") else "bf16",
        weight_dtype=_weight_dtype(record),
        memory_fraction=_noted(record, r"(?:util|mem-fraction)\s+(0?\.\d+)", 0.9),
        reserved_bytes=_reserved(record),
        primary=part is not None,
        parts=(part,) if part else (),
    )
    # gpt-fast builds a causal mask of bytes for the longest sequence.
    masked = engine == "gpt-fast" and "linear" not in cache
    row = MemoryRow(
        context_tokens=context,
        output_tokens=_GENERATED if engine == "transformers" else 1.0,
        extra_bytes=context**2 if masked else 0.0,
        reading_bytes=_noted(record, r"\+-\s*(\d+(?:\.\d+)?)\s*gib", 0.0) * _GIB,
        n_steps=_GENERATED,
    )
    return case, row


def _engine(record: Record) -> str:
    for column in ("note", "source"):
        text = record.get(column, "").lower()
        for pattern in ("sglang", "vllm", "kvpress", "gpt-fast", "pytorch/ao"):
            if pattern in text:
                return engine_named("torchao" if pattern == "pytorch/ao" else pattern)
    quantity = _METRICS[record.get("metric", "").lower()][0]
    return "vllm" if quantity in _SERVED else "transformers"


def _method(cache: str, record: Record, engine: str) -> tuple[str, Level]:
    parts = []
    removed = _noted(record, r"compression_ratio=(\d(?:\.\d+)?)", 0.0)
    if removed > 0.0:
        parts.append(f"knorm:kept_fraction={1.0 - removed:.6g}")
    bits = re.match(r"int(\d)", cache)
    if bits and engine == "transformers":
        parts.append(f"hf_quanto:bits={bits.group(1)}")
    elif bits and bits.group(1) == "8":
        parts.append("fp8_kv")  # one byte per element and a scale
    elif bits or cache.partition("-")[0] not in ("bf16", "fp16", "fp8", ""):
        raise NotApplicableError(f"kv_prec {cache[:40]!r}: no such cache in {engine}")
    elif cache.startswith("fp8"):
        parts.append("fp8_kv")
    level: Level = "reference" if engine == "transformers" else "ideal"
    return "+".join(parts) or "full", level


def _weight_dtype(record: Record) -> str:
    given = record.get("weight_prec", "").lower()
    model_is_stored_so = given.startswith("fp8") and "fp8" in record.get("model", "").lower()
    return (
        "checkpoint" if model_is_stored_so else _WEIGHTS.get(given.partition(" ")[0], "checkpoint")
    )


def _reserved(record: Record) -> float | None:
    given = _noted(record, r"non_torch\s+(\d+(?:\.\d+)?)\s*gib", 0.0)
    return given * _GIB if given else None


def _noted(record: Record, pattern: str, default: float) -> float:
    """A number from the row's note."""
    found = re.search(pattern, record.get("note", "").lower())
    return float(found.group(1)) if found else default


def observed(record: Record, block: Block) -> float:
    """The value in the unit of the prediction."""
    return observed_value(record, "value") * _METRICS[record.get("metric", "").lower()][1]

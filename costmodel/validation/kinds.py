"""The kinds of tables, and which of them a table is.

Each kind has a module with two functions: ``predict(records, options)``, which sees shape columns
only, and ``observed(record, metric)``, the measured value in the unit of the prediction.
"""

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from costmodel.errors import ConfigError, UnknownNameError
from costmodel.hardware import HardwareProfile
from costmodel.validation.result import Block, Predictions
from costmodel.validation.table import Record, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a table is predicted.

    kind       name of the kind; some modules serve several
    datasheet  the datasheet roofline instead of the model
    hardware   a profile that replaces the GPU of every row, such as a calibrated one
    """

    kind: str
    datasheet: bool = False
    hardware: HardwareProfile | None = None


class Module(Protocol):
    """What a kind's module offers."""

    def predict(self, records: Sequence[Record], options: Options) -> Predictions:
        """Predict rows from their shape columns."""

    def observed(self, record: Record, block: Block) -> float:
        """Read a row's measured value in the unit of its prediction; raises ``ConfigError``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of table.

    required   columns without which it is another kind
    observed   columns of which at least one holds what was measured
    selects    column -> values that its rows have there; tells kinds with the same columns apart
    """

    name: str
    module: str
    required: frozenset[str]
    observed: frozenset[str]
    selects: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def load(self) -> Module:
        """Import the kind's module."""
        module: Module = importlib.import_module(f"costmodel.validation.{self.module}")
        return module

    def takes(self, record: Record) -> bool:
        """Whether a row is of this kind, in a table that has its columns."""
        return all(record.get(c, "").lower() in values for c, values in self.selects.items())


def _kind(name: str, module: str, required: str, observed: str, **selects: str) -> tuple[str, Kind]:
    chosen = {column: frozenset(values.split()) for column, values in selects.items()}
    return name, Kind(
        name=name,
        module=module,
        required=frozenset(required.split()),
        observed=frozenset(observed.split()),
        selects=chosen,
    )


_ATTENTION = "op batch q_len kv_len Hq Hkv D"
KINDS: Mapping[str, Kind] = dict(
    (
        _kind("decode_attention", "kernels", _ATTENTION, "latency_us", op="decode_attn"),
        _kind(
            "prefill_attention",
            "kernels",
            _ATTENTION,
            "latency_us",
            op="prefill_attn encoder_attn",
        ),
        _kind("gemm", "kernels", "m n k dtype", "latency_us"),
        _kind(
            "mla",
            "kernels",
            "phase mla_dtype kv_cache_dtype num_heads batch_size kv_len",
            "latency_us",
        ),
        _kind(
            "linear_attention",
            "kernels",
            "phase num_k_heads head_k_dim num_v_heads head_v_dim seq_len batch_size",
            "latency_us",
        ),
        _kind(
            "sparse_attention",
            "kernels",
            "op_name architecture num_heads batch_size isl gemm_type",
            "latency_us",
        ),
        _kind(
            "moe",
            "kernels",
            "moe_dtype num_tokens hidden_size inter_size topk num_experts moe_tp_size moe_ep_size",
            "latency_us",
        ),
        _kind("collectives", "kernels", "op_name num_gpus message_size", "latency_us"),
        _kind(
            "power",
            "power",
            "phase batch_size isl kv_len num_heads num_key_value_heads head_dim kv_cache_dtype",
            "latency_us power energy_mj_per_call",
        ),
        _kind(
            "serving",
            "serving",
            "backend model_path system isl osl concurrency tp_size",
            "silicon_ttft_ms silicon_tpot_ms",
        ),
        _kind(
            "latency_throughput",
            "latency_throughput",
            "hw tp model weight_prec kv_prec batch isl osl metric unit engine",
            "value",
        ),
        _kind(
            "memory", "memory", "hw model weight_prec kv_prec context_tokens metric unit", "value"
        ),
        _kind(
            "kv_methods",
            "kv_methods",
            "hardware model method stage batch prompt_len metric",
            "value",
        ),
    )
)
KIND_NAMES = tuple(KINDS)


def kind_named(name: str) -> Kind:
    """The kind of that name; raises ``UnknownNameError``."""
    key = name.strip().lower()
    if key not in KINDS:
        raise UnknownNameError("kind of table", name[:60], KIND_NAMES)
    return KINDS[key]


def infer_kind(table: Table) -> Kind:
    """The kind whose columns a table has; rows decide where columns coincide."""
    fitting = [k for k in KINDS.values() if k.required <= table.columns]
    if not fitting:
        nearest = min(
            KINDS.values(), key=lambda k: len(k.required - table.columns) / len(k.required)
        )
        missing = ", ".join(sorted(nearest.required - table.columns))
        raise ConfigError(
            f"{table.path}: its columns are those of no known table; nearest is {nearest.name}, "
            f"which lacks: {missing}. Kinds: {', '.join(KIND_NAMES)}"
        )
    widest = max(len(k.required) for k in fitting)
    fitting = [k for k in fitting if len(k.required) == widest]
    rows = Counter(k.name for r in table.records for k in fitting if k.takes(r))
    return max(fitting, key=lambda k: rows[k.name])


def check_columns(table: Table, kind: Kind) -> None:
    """Raise ``ConfigError`` where a kind's columns are missing."""
    missing = sorted(kind.required - table.columns)
    if not kind.observed & table.columns:
        missing.append(" or ".join(sorted(kind.observed)))
    if missing:
        raise ConfigError(
            f"{table.path}: a table of kind {kind.name} needs the columns {', '.join(missing)}"
        )

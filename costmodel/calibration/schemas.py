"""Columns of the tables of measured kernels, and how a row becomes a shape.

One schema per table form. ``read`` turns one record (texts by column) into the family it belongs
to, the shape its kind's model reads, and seconds; it raises ``ConfigError`` with the reason when
the row cannot be used.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from costmodel.errors import ConfigError, UnknownNameError
from costmodel.hardware import HardwareProfile, normalised, resolve_gpu

Record = Mapping[str, str]
#: Longest name of an engine or kernel.
MAX_NAME = 100
#: Most of anything that a row can count, of experts, and the steepest power law of routing.
MOST_COUNT = 1e12
MOST_EXPERTS = 65_536
MOST_SKEW = 10.0
#: (kind, variant, hardware, engine, kernel), shape, seconds
Row = tuple[tuple[str, str, str, str, str], dict[str, float], float]
#: (kind, variant), shape
Read = tuple[str, str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Schema:
    """One table form.

    required   columns without which it is another form
    kinds      operation kinds its rows become
    shape_of   record -> (kind, variant, shape)
    kernel     column that names the kernel
    """

    name: str
    kinds: tuple[str, ...]
    required: frozenset[str]
    shape_of: Callable[[Record], Read]
    kernel: str = "kernel"

    def read(self, record: Record, profile: HardwareProfile | None = None) -> Row:
        """Return one record as (family, shape, seconds); ``profile``: the device it is asked of."""
        kind, variant, shape = self.shape_of(record)
        microseconds = number(record, "latency_us")
        if microseconds <= 0:
            raise ConfigError(f"latency_us: expected a time above 0, got {microseconds:g}")
        hardware = hardware_of(record, profile)
        engine = name(record, "framework")  # "": a library any engine calls, such as NCCL
        kernel = name(record, self.kernel)
        if "/" in engine:
            raise ConfigError(f"framework: expected a name without '/', got {engine!r}")
        return (kind, variant, hardware, engine, kernel), shape, microseconds * 1e-6


def text(record: Record, column: str) -> str:
    """Return a cell, stripped; "" where the column is absent."""
    return (record.get(column) or "").strip()


def name(record: Record, column: str) -> str:
    """Read a name in lower case: printable, of moderate length."""
    cell = text(record, column).lower()
    if not cell.isprintable() or len(cell) > MAX_NAME:
        shown = ascii(cell[:40])
        raise ConfigError(f"{column}: expected up to {MAX_NAME} printable characters, got {shown}")
    return cell


def number(record: Record, column: str, default: float | None = None) -> float:
    """Read a finite number; ``default`` where the cell is empty; else ``ConfigError``."""
    cell = text(record, column)
    if not cell and default is not None:
        return default
    try:
        value = float(cell)
    except ValueError:
        raise ConfigError(f"{column}: expected a number, got {cell[:40]!r}") from None
    if not math.isfinite(value):
        raise ConfigError(f"{column}: expected a finite number, got {cell[:40]!r}")
    return value


def count(record: Record, column: str, default: float | None = None) -> float:
    """Read a whole number of at least 1."""
    value = number(record, column, default)
    if not 1 <= value <= MOST_COUNT or value != int(value):
        raise ConfigError(
            f"{column}: expected a whole number of at least 1 and at most {MOST_COUNT:g}, "
            f"got {value:g}"
        )
    return value


def hardware_of(record: Record, profile: HardwareProfile | None) -> str:
    """The device a row names; a row that names none is of the profile's."""
    spellings = [cell for cell in (text(record, c) for c in ("hw", "device")) if cell]
    found = ""
    for spelling in spellings:
        if profile is not None and _may_be(normalised(spelling), profile):
            return profile.name
        try:
            found = found or resolve_gpu(spelling)
        except UnknownNameError:
            continue
    if profile is not None:
        if not spellings or found == profile.name:
            return profile.name
        shown = ", ".join(spellings)[:80]
        raise ConfigError(f"measured on {shown!r}, which is not {profile.name}")
    if found:
        return found
    raise ConfigError(
        f"no known GPU in hw={text(record, 'hw')[:80]!r}, device={text(record, 'device')[:80]!r}"
    )


def _may_be(spelling: str, profile: HardwareProfile) -> bool:
    """Whether a spelling is a profile's name or title, or its name without form or memory."""
    name = normalised(profile.name)
    return spelling in (name, normalised(profile.title)) or name.startswith(f"{spelling}-")


_DTYPES = {
    "bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16", "half": "fp16",
    "fp8": "fp8", "fp8_static": "fp8", "fp8_e4m3": "fp8", "fp8_e4m3fn": "fp8", "fp8_e5m2": "fp8",
    "e4m3": "fp8", "e5m2": "fp8", "float8_e4m3fn": "fp8", "float8_e4m3fnuz": "fp8",
    "float8_e5m2": "fp8", "fp8_block": "fp8_block", "mxfp8": "fp8_block",
}  # fmt: skip


def dtype(record: Record, column: str) -> str:
    """Read a data type into this project's spelling; ``ConfigError`` for one without a model."""
    cell = text(record, column).lower().removeprefix("torch.")
    if cell not in _DTYPES:
        known = ", ".join(sorted(set(_DTYPES.values())))
        raise ConfigError(f"{column}: no kernel model for {cell[:40]!r}; known: {known}")
    return _DTYPES[cell]


def _gemm(record: Record) -> Read:
    variant = dtype(record, "dtype")
    shape = {name: count(record, name) for name in ("m", "n", "k")}
    return "gemm", "bf16" if variant == "fp16" else variant, shape


def _attention(record: Record) -> Read:
    heads, kv_heads = count(record, "Hq"), count(record, "Hkv")
    if heads % kv_heads:
        raise ConfigError(f"Hq: expected a multiple of Hkv {kv_heads:g}, got {heads:g}")
    op = text(record, "op")
    # A cache is kept as the queries come where nothing else is said ("auto", as engines say).
    kept = {"kv_dtype": text(record, "kv_dtype")}
    if kept["kv_dtype"].lower() in ("", "auto"):
        kept["kv_dtype"] = text(record, "q_dtype") or "bf16"
    element_bytes = 1.0 if dtype(kept, "kv_dtype").startswith("fp8") else 2.0
    shape = {
        "batch": count(record, "batch"),
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "head_dim": count(record, "D"),
        "element_bytes": element_bytes,
        "window": max(number(record, "window", 0.0), 0.0),
    }
    if op == "decode_attn":
        return "decode_attention", "", shape | {"kv_len": count(record, "kv_len")}
    if op in ("prefill_attn", "encoder_attn"):
        more = {"q_len": count(record, "q_len"), "causal": float(op == "prefill_attn")}
        return "prefill_attention", "", shape | more
    raise ConfigError(f"op: expected decode_attn, prefill_attn or encoder_attn, got {op[:40]!r}")


def _mla(record: Record) -> Read:
    fp8 = dtype(record, "kv_cache_dtype").startswith("fp8")
    shape = {
        "batch": count(record, "batch_size"),
        "n_heads": count(record, "num_heads"),
        "element_bytes": 1.0 if fp8 else 2.0,
    }
    phase = text(record, "phase")
    if phase == "decode":
        return "mla_decode_attention", "", shape | {"kv_len": count(record, "kv_len")}
    if phase == "prefill":
        return "mla_prefill_attention", "", shape | {"q_len": count(record, "kv_len")}
    raise ConfigError(f"phase: expected decode or prefill, got {phase[:40]!r}")


#: Published rows whose columns cannot describe what ran: GPU, engine, its version and kernel.
#: Their times do not depend on the channels they state (a fixed cost per sequence and per token),
#: and at those channels a third of them would be 2 to 4 times faster than DRAM.
_UNDESCRIBED = frozenset({("a100", "sglang", "0.5.10", "causal_conv1d_fn")})


def _linear(record: Record) -> Read:
    """Gated DeltaNet and KDA: heads and head sizes into bytes per token and per state.

    q and k have the key heads, v and the output the value heads (KDA: all alike, and a gate as
    wide as k); states are fp32, activations 2 bytes. A verify step stores one state per drafted
    token.
    """
    source = (text(record, c).lower() for c in ("hw", "framework", "version", "kernel_source"))
    gpu, engine, version, kernel = source
    if (gpu.replace("-", "_").split("_")[0], engine, version, kernel) in _UNDESCRIBED:
        raise ConfigError(
            f"{kernel} of {engine} {version} on {gpu}: these times do not depend on the number of "
            "channels, so the columns do not describe what ran"
        )
    heads_k, heads_v = count(record, "num_k_heads"), count(record, "num_v_heads")
    dim_k, dim_v = count(record, "head_k_dim"), count(record, "head_v_dim")
    seq = count(record, "seq_len")
    phase = text(record, "phase")
    step = phase in ("generation", "verify")
    shape = {"batch": count(record, "batch_size"), "seq_len": seq}
    channels = 2.0 * heads_k * dim_k + heads_v * dim_v
    if "conv" in text(record, "kernel_source"):
        taps = count(record, "d_conv", 4.0)
        state = channels * (taps - 1.0) * 2.0
        states = 1.0 + seq if step else 1.0
        more = {"token_bytes": channels * 4.0, "state_bytes": state * states}
        return "scan", "conv_step" if step else "conv_prefill", shape | more
    gates = heads_k * dim_k if text(record, "op_name") == "kda" else 0.0
    token = (heads_k * dim_k + heads_v * dim_k + 2.0 * heads_v * dim_v + gates) * 2.0
    state = heads_v * dim_k * dim_v * 4.0
    states = 1.0 + seq if step else 2.0
    more = {"token_bytes": token, "state_bytes": state * states}
    return "scan", "scan_step" if step else "scan_prefill", shape | more


def _moe(record: Record) -> Read:
    variant = dtype(record, "moe_dtype")
    variant = "bf16" if variant == "fp16" else variant
    experts, groups = count(record, "num_experts"), count(record, "moe_ep_size")
    if not groups <= experts <= MOST_EXPERTS:
        raise ConfigError(
            f"num_experts: expected from moe_ep_size {groups:g} to {MOST_EXPERTS}, got {experts:g}"
        )
    routing = text(record, "distribution").lower() or "balanced"
    dealt = routing == "balanced"
    if dealt or routing in ("uniform", "random"):
        routing = "0"
    skew = number({"distribution": routing.removeprefix("power_law_")}, "distribution")
    if not 0.0 <= skew <= MOST_SKEW:
        raise ConfigError(
            "distribution: expected balanced, uniform or power_law_A with A from 0 to "
            f"{MOST_SKEW:g}, got {routing[:40]!r}"
        )
    shape = {
        "tokens": count(record, "num_tokens"),
        "hidden": count(record, "hidden_size"),
        "inner": count(record, "inter_size") / count(record, "moe_tp_size"),
        "top_k": count(record, "topk"),
        "n_experts": experts,
        "local_experts": experts / groups,
        "skew": skew,
        "dealt": float(dealt),
        # Rows of this kernel were made before the benchmark changed its rule (see kernels.routing).
        "leftovers_first": float(text(record, "kernel_source").lower() == "vllm_fused_moe"),
    }
    return "moe_gemm", variant, shape


#: Bytes of an element of a message.
_MESSAGE_BYTES = dict.fromkeys(("int8", "uint8", "fp8", "float8_e4m3fn", "float8_e5m2"), 1.0)
_MESSAGE_BYTES |= dict.fromkeys(("half", "float16", "fp16", "bfloat16", "bf16"), 2.0)
_MESSAGE_BYTES |= dict.fromkeys(("float", "float32", "fp32", "int32"), 4.0)


def _collective(record: Record) -> Read:
    operation = text(record, "op_name")
    if operation not in ("all_reduce", "all_gather"):
        raise ConfigError(f"op_name: expected all_reduce or all_gather, got {operation[:40]!r}")
    cell = text(record, "nccl_dtype") or text(record, "allreduce_dtype")
    width = _MESSAGE_BYTES.get(cell.lower().removeprefix("torch."))
    if width is None:
        raise ConfigError(f"nccl_dtype, allreduce_dtype: no element size known for {cell[:40]!r}")
    shape = {
        "message_bytes": count(record, "message_size") * width,
        "n_gpus": count(record, "num_gpus"),
    }
    return "collective", operation, shape


#: hidden, q rank, head size without rope, value head size, index heads, by architecture.
#: config.json of deepseek-ai/DeepSeek-V3.2 and zai-org/GLM-5.
_DSA_DIMENSIONS = {
    "deepseekv32forcausallm": (7168.0, 1536.0, 128.0, 128.0, 64.0),
    "glmmoedsaforcausallm": (6144.0, 2048.0, 192.0, 256.0, 32.0),
}


def _sparse(record: Record) -> Read:
    architecture = text(record, "architecture").lower()
    if architecture not in _DSA_DIMENSIONS:
        known = ", ".join(_DSA_DIMENSIONS)
        raise ConfigError(
            f"architecture: no dimensions known for {architecture[:40]!r}; known: {known}"
        )
    hidden, q_rank, nope, value, index_heads = _DSA_DIMENSIONS[architecture]
    module = text(record, "op_name")
    decode = "generation" in module
    step = number(record, "step", 0.0)
    kernel = text(record, "kernel_source")
    shape = {
        "batch": count(record, "batch_size"),
        "q_len": 1.0 if decode else count(record, "isl"),
        "prefix": max(step, 0.0),
        "n_heads": count(record, "num_heads"),
        "hidden": hidden,
        "q_rank": q_rank,
        "nope_dim": nope,
        "value_dim": value,
        "index_heads": index_heads,
        "has_index": float("skip_indexer" not in module),
        "dense": float("dense" in kernel),
        "weight_bytes": 1.0 if dtype(record, "gemm_type").startswith("fp8") else 2.0,
        "element_bytes": 1.0 if dtype(record, "kv_cache_dtype").startswith("fp8") else 2.0,
    }
    return "sparse_attention", "generation" if decode else "context", shape


SCHEMAS = (
    Schema("gemm", ("gemm",), frozenset({"m", "n", "k", "dtype", "latency_us"}), _gemm),
    Schema(
        "attention",
        ("decode_attention", "prefill_attention"),
        frozenset({"op", "batch", "q_len", "kv_len", "Hq", "Hkv", "D", "latency_us"}),
        _attention,
    ),
    Schema(
        "mla",
        ("mla_decode_attention", "mla_prefill_attention"),
        frozenset({"phase", "kv_cache_dtype", "num_heads", "batch_size", "kv_len", "mla_dtype"}),
        _mla,
        "kernel_source",
    ),
    Schema(
        "linear_attention",
        ("scan",),
        frozenset({"phase", "num_k_heads", "head_k_dim", "num_v_heads", "head_v_dim", "seq_len"}),
        _linear,
        "kernel_source",
    ),
    Schema(
        "moe",
        ("moe_gemm",),
        frozenset({"moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts"}),
        _moe,
        "kernel_source",
    ),
    Schema(
        "sparse_attention",
        ("sparse_attention",),
        frozenset({"op_name", "architecture", "num_heads", "batch_size", "isl", "gemm_type"}),
        _sparse,
        "kernel_source",
    ),
    Schema(
        "collectives",
        ("collective",),
        frozenset({"op_name", "num_gpus", "message_size", "latency_us"}),
        _collective,
        "kernel_source",
    ),
)

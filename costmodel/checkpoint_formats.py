"""Which format a checkpoint stores each matrix in, from its config's ``quantization_config``.

Reads the methods that published checkpoints use: block and per-tensor fp8, fbgemm, mxfp4 (gpt-oss),
GPTQ, AWQ, bitsandbytes, compressed-tensors and ModelOpt, with their lists of modules left alone. An
unknown method is an error, never a guess.
"""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from costmodel.errors import ConfigError
from costmodel.mixers.base import Linear
from costmodel.module_names import Patterns, module_paths
from costmodel.weight_formats import (
    FP8_TENSOR,
    INT4_GROUP,
    INT8_CHANNEL,
    MXFP4,
    NVFP4,
    Format,
    plain,
)

Shares = tuple[tuple[Format, float], ...]


@functools.lru_cache(maxsize=4096)
def checkpoint_formats(
    linear: Linear, quantization: tuple[tuple[str, object], ...], n_layers: int, dtype: str
) -> Shares:
    """Formats of one matrix over the layers, with the share of layers stored in each.

    A matrix does not know its layer, so lists that name layers one by one become shares; exact
    when they treat all layers that hold the matrix alike, as published checkpoints do.
    """
    rules = _rules(quantization)
    counts: Counter[Format] = Counter()
    layers = range(n_layers) if rules.by_layer else range(n_layers // 2, n_layers // 2 + 1)
    for layer in layers:
        counts[rules.format_of(linear, layer) or plain(dtype)] += 1
    return tuple((f, n / len(layers)) for f, n in counts.items())


class _Rules:
    """A quantization_config, read once."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        method = str(config.get("quant_method", "")).lower().replace("_", "-")
        if method not in _READERS:
            given = str(config.get("quant_method"))[:40]
            raise ConfigError(
                f"quantization_config: quant_method {given!r} is not one lccost reads "
                f"({', '.join(sorted(_READERS))}). Give --weight-dtype to say how the "
                "weights are stored"
            )
        skipped: list[object] = []
        for key in (
            "modules_to_not_convert",
            "ignore",
            "exclude_modules",
            "ignored_layers",
            "llm_int8_skip_modules",
        ):
            skipped += _names(config.get(key), key)
        self.ignored = Patterns(skipped)
        self.groups = _READERS[method](config)
        self.by_layer = self.ignored.by_layer or any(p.by_layer for p, _, _ in self.groups)

    def format_of(self, linear: Linear, layer: int) -> Format | None:
        """The format in one layer; None where the matrix is left alone."""
        paths = module_paths(linear, layer)
        if self.ignored.match(paths):
            return None
        everything = None
        for patterns, roles, stored in self.groups:
            if roles and linear.role not in roles:
                continue
            if patterns.empty:
                everything = everything or stored
            elif patterns.match(paths):
                return stored
        return everything


@functools.lru_cache(maxsize=64)
def _rules(quantization: tuple[tuple[str, object], ...]) -> _Rules:
    return _Rules(_thawed(quantization))


def _thawed(value: object) -> Any:
    """(key, value) tuples back to a dict, as ``Architecture.quantization`` documents."""
    if isinstance(value, tuple):
        if value and all(
            isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str) for x in value
        ):
            return {k: _thawed(v) for k, v in value}
        return [_thawed(x) for x in value]
    return value


def _names(value: object, key: str) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ConfigError(f"quantization_config: {key}: expected a list of module names")
    return value


def _whole(config: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            f"quantization_config: {key}: expected a whole number of {low} to {high}, "
            f"got {str(value)[:40]!r}"
        )
    return value


def _block(value: object, key: str) -> tuple[int, int]:
    """Rows and columns that share one scale."""
    whole = isinstance(value, list) and all(type(x) is int and x > 0 for x in value)
    if not whole or not isinstance(value, list) or len(value) != 2:
        raise ConfigError(f"quantization_config: {key}: expected two whole numbers over 0")
    return value[0], value[1]


Groups = list[tuple[Patterns, frozenset[str], Format]]
_ALL = Patterns([])
_EVERY_ROLE: frozenset[str] = frozenset()
_EXPERTS = frozenset({"expert"})


def _fp8(config: Mapping[str, Any]) -> Groups:
    """``fp8``: blocks where weight_block_size says so, else one scale per matrix.

    ``scale_fmt = "ue8m0"`` with ``expert_dtype = "fp4"`` (DeepSeek-V4) stores E8M0 scale bytes, and
    the routed experts as MXFP4, multiplied with fp8 activations.
    """
    fp4_experts = config.get("expert_dtype") == "fp4"
    groups: Groups = []
    if fp4_experts:
        experts = Format(
            name="mxfp4",
            code_bytes=0.5,
            block_rows=1,
            block_columns=32,
            scale_bytes=1,
            compute="fp8",
        )
        groups.append((_ALL, _EXPERTS, experts))
    block = config.get("weight_block_size")
    if block is None:
        return [*groups, (_ALL, _EVERY_ROLE, FP8_TENSOR)]
    rows, columns = _block(block, "weight_block_size")
    stored = Format(
        name="fp8",
        code_bytes=1,
        block_rows=rows,
        block_columns=columns,
        scale_bytes=1 if fp4_experts else 4,
        compute="fp8",
    )
    return [*groups, (_ALL, _EVERY_ROLE, stored)]


def _fbgemm_fp8(config: Mapping[str, Any]) -> Groups:
    """One fp32 scale per output channel."""
    stored = Format(name="fp8", code_bytes=1, block_rows=1, scale_bytes=4, compute="fp8")
    return [(_ALL, _EVERY_ROLE, stored)]


def _mxfp4(config: Mapping[str, Any]) -> Groups:
    """gpt-oss: the routed experts only."""
    return [(_ALL, _EXPERTS, MXFP4)]


def _integer_groups(bits: int, group: int, *, zero: bool, column_bytes: float = 0.0) -> Format:
    if group == 0:
        raise ConfigError(
            "quantization_config: group_size: expected -1 (whole rows) or over 0, got 0"
        )
    return Format(
        name=f"int{bits}",
        code_bytes=bits / 8,
        block_rows=1,
        block_columns=math.inf if group == -1 else group,
        scale_bytes=2 + (bits / 8 if zero else 0),
        column_bytes=column_bytes,
    )


def _gptq(config: Mapping[str, Any]) -> Groups:
    """Packed codes, fp16 scales, packed zeros, and an int32 group index per input column."""
    bits, group = _whole(config, "bits", 4, 1, 8), _whole(config, "group_size", 128, -1, 1 << 20)
    return [(_ALL, _EVERY_ROLE, _integer_groups(bits, group, zero=True, column_bytes=4))]


def _awq(config: Mapping[str, Any]) -> Groups:
    """Packed codes, fp16 scales, packed zeros."""
    key = "w_bit" if "w_bit" in config else "bits"
    group_key = "q_group_size" if "q_group_size" in config else "group_size"
    bits, group = _whole(config, key, 4, 1, 8), _whole(config, group_key, 128, -1, 1 << 20)
    return [(_ALL, _EVERY_ROLE, _integer_groups(bits, group, zero=True))]


def _bitsandbytes(config: Mapping[str, Any]) -> Groups:
    """NF4 or FP4 with an fp32 maximum per 64 (a byte per 64 and an fp32 per 16,384 when that is
    quantised too), or LLM.int8().
    """
    if config.get("load_in_8bit"):
        return [(_ALL, _EVERY_ROLE, INT8_CHANNEL)]
    nested = bool(config.get("bnb_4bit_use_double_quant"))
    per_64 = 1 + 4 / 256 if nested else 4.0
    return [(_ALL, _EVERY_ROLE, Format(name="int4", code_bytes=0.5 + per_64 / 64))]


def _compressed_tensors(config: Mapping[str, Any]) -> Groups:
    """Each group names its targets: a class ("Linear": everything) or module patterns."""
    table = config.get("config_groups")
    if not isinstance(table, dict):
        raise ConfigError("quantization_config: config_groups: expected a table of groups")
    groups: Groups = []
    for name, group in table.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ConfigError(
                f"quantization_config: config_groups.{name[:40]}: expected a table of weights"
            )
        targets = _names(group.get("targets", ["Linear"]), f"config_groups.{name}.targets")
        everything = any(t in ("Linear", "MoEGate", "FusedMoE") for t in targets)
        patterns = _ALL if everything else Patterns(targets)
        groups.append((patterns, _EVERY_ROLE, _compressed_format(weights, group, name)))
    return groups


def _compressed_format(weights: Mapping[str, Any], group: Mapping[str, Any], name: str) -> Format:
    bits = _whole(weights, "num_bits", 8, 1, 16)
    floating = weights.get("type") == "float"
    strategy = weights.get("strategy") or "tensor"
    activations = group.get("input_activations")
    w8a8 = isinstance(activations, dict) and bits == 8
    if floating and bits == 4:
        size = _whole(weights, "group_size", 16, 1, 1 << 20)
        fp4 = MXFP4 if size == 32 else NVFP4
        return fp4 if isinstance(activations, dict) else replace(fp4, compute=None)
    stored = Format(name=f"fp{bits}" if floating else f"int{bits}", code_bytes=bits / 8)
    compute = ("fp8" if floating else "int8") if w8a8 else None
    zero = 0.0 if weights.get("symmetric", True) else bits / 8
    packed_shape = 0.0 if floating or w8a8 else 16.0
    if strategy == "block":
        rows, columns = _block(
            weights.get("block_structure", [128, 128]), f"config_groups.{name}.block_structure"
        )
        return replace(
            stored, block_rows=rows, block_columns=columns, scale_bytes=2, compute=compute
        )
    if strategy == "tensor":
        return replace(stored, matrix_bytes=2 + packed_shape, compute=compute)
    per_scale: float = math.inf
    if strategy in ("group", "tensor_group"):
        per_scale = _whole(weights, "group_size", 128, 1, 1 << 20)
    elif strategy != "channel":
        raise ConfigError(
            f"quantization_config: config_groups.{name[:40]}: strategy {str(strategy)[:40]!r} "
            "is none of tensor, channel, group, block"
        )
    return replace(
        stored,
        block_rows=1,
        block_columns=per_scale,
        scale_bytes=2 + zero,
        matrix_bytes=packed_shape,
        compute=compute,
    )


def _modelopt(config: Mapping[str, Any]) -> Groups:
    """NVIDIA ModelOpt: FP8 (per tensor), NVFP4, or a table of layers."""
    if isinstance(config.get("config_groups"), dict):
        return _compressed_tensors(config)
    layers = config.get("quantized_layers")
    if isinstance(layers, dict):
        return [
            (Patterns([path]), _EVERY_ROLE, _modelopt_format(_layer_algorithm(path, row)))
            for path, row in layers.items()
        ]
    return [(_ALL, _EVERY_ROLE, _modelopt_format(config.get("quant_algo")))]


def _layer_algorithm(path: str, row: object) -> object:
    if not isinstance(row, dict):
        raise ConfigError(
            f"quantization_config: quantized_layers.{path[:80]}: expected a table with quant_algo"
        )
    return row.get("quant_algo")


def _modelopt_format(algorithm: object) -> Format:
    formats = {"FP8": FP8_TENSOR, "NVFP4": NVFP4, "NVFP4_AWQ": NVFP4, "W4A16_AWQ": INT4_GROUP}
    if not isinstance(algorithm, str) or algorithm not in formats:
        raise ConfigError(
            f"quantization_config: quant_algo {str(algorithm)[:40]!r}: expected one of "
            f"{', '.join(formats)}"
        )
    return formats[algorithm]


_READERS = {
    "fp8": _fp8,
    "fbgemm-fp8": _fbgemm_fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
}

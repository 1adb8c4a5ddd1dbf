"""Bytes of a model's weights, and the type its matrices are multiplied in.

``--weight-dtype checkpoint`` (the default) stores each matrix as the checkpoint does (its
``quantization_config``), everything else in the run's dtype; an explicit dtype replaces the formats
of the checkpoint. Embeddings, LM head, norms, routers and biases stay in the run's dtype always.

    resident = sum over stored layers of (matrices + biases + other parameters)
               + ceil(V/tp) d (1 or, untied, 2) b + other parameters

Left out: MTP heads (not built), multimodal towers, fp32 router corrections and decay vectors that a
checkpoint keeps wider than the run's dtype (under 0.01 % of any bundled model).
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable

from costmodel.architecture import Architecture, Layer
from costmodel.checkpoint_formats import Shares, checkpoint_formats
from costmodel.errors import UnknownNameError
from costmodel.hardware import HardwareProfile
from costmodel.mixers.base import Linear
from costmodel.mlps import MoE
from costmodel.units import DTYPE_BYTES
from costmodel.weight_formats import (
    FP8_TENSOR,
    INT4_GROUP,
    INT8_CHANNEL,
    MXFP4,
    NVFP4,
    plain,
)

_FORMATS = {
    "bf16": plain("bf16"),
    "fp16": plain("fp16"),
    "fp8": FP8_TENSOR,
    "int8": INT8_CHANNEL,
    "int4": INT4_GROUP,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
}
#: What ``--weight-dtype`` accepts.
WEIGHT_DTYPES = ("checkpoint", *_FORMATS)


def _shares(linear: Linear, weight_dtype: str, architecture: Architecture, dtype: str) -> Shares:
    """Formats of a matrix with the share of layers stored in each."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise UnknownNameError("weight dtype", weight_dtype[:60], WEIGHT_DTYPES)
    if not linear.quantisable:
        return ((plain(dtype), 1.0),)
    if weight_dtype != "checkpoint":
        return ((_FORMATS[weight_dtype], 1.0),)
    if not architecture.quantization:
        return ((plain(dtype), 1.0),)
    return checkpoint_formats(linear, architecture.quantization, architecture.n_layers, dtype)


def linear_bytes(
    linear: Linear, weight_dtype: str, architecture: Architecture, dtype: str = "bf16"
) -> float:
    """Stored bytes of a matrix, all its copies and its bias, in one layer (the mean over layers
    where a checkpoint treats them differently).

    ``dtype`` is the run's dtype, in which unquantised weights are loaded.
    """
    shares = _shares(linear, weight_dtype, architecture, dtype)
    codes = sum(share * form.matrix(linear) for form, share in shares)
    return linear.copies * codes + linear.bias * DTYPE_BYTES[dtype]


def compute_dtype(
    linear: Linear,
    weight_dtype: str,
    architecture: Architecture,
    dtype: str,
    hardware: HardwareProfile,
) -> str:
    """Type of the multiplications: fp8 (fp4) weights multiply in fp8 (fp4) where the device has
    such a peak, otherwise they are only stored so and widened to the run's dtype. Integer weights
    multiply as integers only in checkpoints whose activations are quantised too.
    """
    form, share = max(_shares(linear, weight_dtype, architecture, dtype), key=lambda x: x[1])
    if form.compute is not None and share > 0.5 and form.compute in hardware.peak_flops_per_s:
        return form.compute
    return dtype


@functools.lru_cache(maxsize=256)
def weights_bytes(
    architecture: Architecture, weight_dtype: str, dtype: str = "bf16", tp: int = 1
) -> float:
    """Resident weight bytes of one GPU.

    ``architecture`` is already sharded (``Architecture.sharded(tp)``); ``tp`` divides what is
    vocabulary-parallel. Tied embeddings are stored once, and so are weight sets that several
    layers share.
    """
    b = DTYPE_BYTES[dtype]

    def matrices(linears: Iterable[Linear]) -> float:
        return sum(linear_bytes(x, weight_dtype, architecture, dtype) for x in linears)

    total = 0.0
    for layer, count in Counter(architecture.stored_layers).items():
        linears, other = _contents(layer, architecture.d_model)
        total += count * (matrices(linears) + other * b)
    rows = math.ceil(architecture.vocab_size / tp)
    embedding = (
        math.ceil(architecture.embedding_parameters / tp)
        if architecture.embedding_parameters
        else rows * architecture.d_model
    )
    head = 0 if architecture.tied_embeddings else rows * architecture.d_model
    bias = math.ceil(architecture.head_bias / tp)
    return total + (embedding + head + bias + architecture.other_parameters) * b


def _contents(layer: Layer, d_model: int) -> tuple[list[Linear], int]:
    """All matrices of a layer, routed experts too, and its other parameters."""
    linears = list(layer.linears)
    other = layer.other_parameters
    for mixer in layer.mixers:
        linears += mixer.linears(d_model)
        other += mixer.other_parameters(d_model)
    for mlp in layer.mlps:
        linears += mlp.linears(d_model)
        other += mlp.other_parameters(d_model)
        if isinstance(mlp, MoE):
            linears += mlp.expert_linears(d_model)
    return linears, other

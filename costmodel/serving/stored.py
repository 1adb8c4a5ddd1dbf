"""How engines store a model that a table or a user calls "fp8" or "fp4".

A checkpoint that is already stored so keeps its own format. Otherwise fp8 means every matrix in
fp8; fp4 means NVFP4 in every matrix of a dense model and in the experts and MLPs of a sparse one,
whose attention stays 16-bit (NVIDIA's published NVFP4 checkpoints are made so:
huggingface.co/nvidia/DeepSeek-R1-0528-FP4 hf_quant_config.json).
"""

from dataclasses import replace

from costmodel.architecture import Architecture
from costmodel.errors import ConfigError
from costmodel.mlps import MoE

#: The module lists of NVIDIA's NVFP4 checkpoints of sparse models.
_NVFP4_EXPERTS: tuple[tuple[str, object], ...] = (
    ("quant_method", "modelopt"),
    ("quant_algo", "NVFP4"),
    ("group_size", 16),
    (
        "ignore",
        (
            "lm_head",
            "model.embed_tokens",
            "model.layers.*.self_attn*",
            "model.layers.*.linear_attn*",
            "model.layers.*.mlp.gate",
        ),
    ),
)
PRECISIONS = ("", "bf16", "fp16", "fp8", "fp4", "int8", "int4")


def stored_as(architecture: Architecture, precision: str) -> tuple[Architecture, str]:
    """The architecture and its ``weight_dtype`` for a precision; "" is the checkpoint as it is.

    Raises ``ConfigError`` for a precision without a storage format.
    """
    own = dict(architecture.quantization or ())
    method = str(own.get("quant_method", ""))
    if precision == "":
        return architecture, "checkpoint"
    if precision in ("bf16", "fp16"):
        return architecture, precision if own else "checkpoint"
    if precision == "fp8":
        return architecture, "checkpoint" if method == "fp8" else "fp8"
    if precision == "fp4":
        if method == "mxfp4" or own.get("quant_algo") == "NVFP4":
            return architecture, "checkpoint"
        if any(isinstance(mlp, MoE) for mlp, _ in architecture.mlp_groups):
            return replace(architecture, quantization=_NVFP4_EXPERTS), "checkpoint"
        return architecture, "nvfp4"
    if precision == "int4":
        return architecture, "checkpoint" if own else "int4"
    if precision == "int8":
        return architecture, "int8"
    raise ConfigError(f"precision: expected one of {', '.join(PRECISIONS[1:])}, got {precision!r}")

"""How a matrix of weights is stored.

A format is codes of a few bits, plus scales (and zero points) per block of the matrix, plus a few
bytes per stored matrix. Ignored: the padding of packed rows to whole int32 words (dimensions that
are no multiple of the pack factor).
"""

import math
from dataclasses import dataclass

from costmodel.mixers.base import Linear
from costmodel.units import DTYPE_BYTES

#: Matrices that engines and our architectures fuse but checkpoints store apart.
_PARTS = {"qkv_proj": 3, "gate_up_proj": 2, "experts_gate_up": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Storage of a matrix with ``n_out`` rows and ``n_in`` columns.

    code_bytes    bytes of one code
    block_rows, block_columns   one scale covers this many; infinite: the whole extent
    scale_bytes   bytes of one scale, zero point included; 0: no scales
    column_bytes  bytes per column besides (GPTQ's group index)
    matrix_bytes  bytes per stored matrix besides (per-tensor scales, shapes)
    compute       type in which the codes can be multiplied, or None when they are only stored
    """

    name: str
    code_bytes: float
    block_rows: float = math.inf
    block_columns: float = math.inf
    scale_bytes: float = 0.0
    column_bytes: float = 0.0
    matrix_bytes: float = 0.0
    compute: str | None = None

    def matrix(self, linear: Linear) -> float:
        """Bytes of one copy without its bias: codes + ceil(n/rows) ceil(k/columns) scales."""
        n, k = linear.n_out, linear.n_in
        blocks = _blocks(n, self.block_rows) * _blocks(k, self.block_columns)
        parts = _PARTS.get(linear.name, 1)
        return (
            n * k * self.code_bytes
            + blocks * self.scale_bytes
            + parts * (k * self.column_bytes + self.matrix_bytes)
        )


def _blocks(extent: int, block: float) -> int:
    return 1 if math.isinf(block) else math.ceil(extent / block)


def plain(dtype: str) -> Format:
    """Unquantised elements."""
    return Format(name=dtype, code_bytes=DTYPE_BYTES[dtype])


#: E4M3 with an fp32 scale per block of 128 x 128: DeepSeek-V3 (arXiv 2412.19437, section 3.3.2).
FP8_BLOCK = Format(
    name="fp8", code_bytes=1, block_rows=128, block_columns=128, scale_bytes=4, compute="fp8"
)
#: E4M3 with one fp32 scale per matrix: what vLLM's online ``fp8`` and ModelOpt's FP8 store.
FP8_TENSOR = Format(name="fp8", code_bytes=1, matrix_bytes=4, compute="fp8")
#: Symmetric, one fp32 scale per output channel: LLM.int8() (arXiv 2208.07339), weight-only.
INT8_CHANNEL = Format(name="int8", code_bytes=1, block_rows=1, scale_bytes=4)
#: Groups of 128 along the input with an fp16 scale and a 4-bit zero: GPTQ and AWQ.
INT4_GROUP = Format(name="int4", code_bytes=0.5, block_rows=1, block_columns=128, scale_bytes=2.5)
#: E2M1 with one E8M0 scale byte per 32: OCP Microscaling Formats (MX) v1.0.
MXFP4 = Format(name="mxfp4", code_bytes=0.5, block_rows=1, block_columns=32, scale_bytes=1)
#: E2M1 with an E4M3 scale per 16 and an fp32 scale per matrix: NVIDIA's NVFP4.
NVFP4 = Format(
    name="nvfp4",
    code_bytes=0.5,
    block_rows=1,
    block_columns=16,
    scale_bytes=1,
    matrix_bytes=4,
    compute="fp4",
)

"""One thing a pass executes: counts, no hardware.

An :class:`Operation` says what is multiplied, what is moved and how often; ``costmodel.kernels``
turns it into seconds. Amounts are float64 scalars or arrays that broadcast to the shape of the
workload, and stand for ONE run on ONE GPU; ``count`` says how many runs a pass makes (usually the
number of layers alike; an array where it depends on the point: chunks of a prompt, or 0 where a
method's budget holds everything and the operation does not run). float64 throughout: at 2**20
tokens and batch 16 the attention FLOPs of an 8B model overflow int64.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64] | np.float64 | float

#: What an operation can be; each kind has one time model in ``costmodel.kernels``.
KINDS = frozenset(
    {
        "gemm",  # dense matmul with weights: shape m, n, k
        "moe_gemm",  # grouped experts: shape m (tokens), n, k, experts, active_experts, top_k
        # shape batch, q_len, kv_len, n_heads, n_kv_heads, head_dim, v_head_dim, and
        "prefill_attention",  # pairs, window_tokens
        "decode_attention",  # kv_bytes
        "mla_prefill_attention",  # as prefill_attention
        "mla_decode_attention",  # shape batch, kv_len, n_heads, latent_dim, rope_dim
        "scan_prefill",  # recurrent mixer over a prompt (chunked matmul form)
        "scan_step",  # recurrent mixer, one token: reads and writes its state
        "elementwise",  # norm, rope, activation, quantise, pack, gather, copy: bytes decide
        "select",  # top-k, argmin, sort over scores
        "collective",  # shape message_bytes, n_gpus; algorithm in the name
        "host_link",  # transfers over the host link: link_bytes decide
    }
)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Operation:
    """Counts of one operation. See the module docstring for what a value stands for.

    flops            useful matmul and convolution FLOPs (1 MAC = 2); causal attention counts the
                     pairs that exist
    executed_flops   matmul-like FLOPs that really run (what torch's flop counter counts), with
                     recomputation, repeated heads and full squares; ``None`` means ``flops``
    vector_flops     elementwise work (exp, dequantise, scale) that runs beside the tensor cores
    weight_bytes     weights read from HBM
    state_bytes      KV cache or recurrent state read and written in HBM
    workspace_bytes  intermediates the algorithm must write to HBM and read back
                     (dequantised copies, score matrices, ``cat`` copies)
    activation_bytes inputs and outputs between kernels; priced in time, not part of ``*_hbm_bytes``
                     because in a fused pass they stay on chip
    link_bytes       bytes over the host link
    launches         kernels started by one run
    transient_bytes  device memory alive during the run beyond weights and state
    host_waits       the host waits for its result before it starts anything else, so that starting
                     kernels cannot hide behind running them
    dtype            compute type of the multiplications
    unfitted         why no fitted family of an engine's kernels describes it, though its shape may
                     look like one's; "": one may
    kernel           the kernel of this project that runs it (``costmodel.fused_kernels``); "": none
    shape            what the time model of this kind needs, by name
    source           upstream file (``reference`` level) or formula reference
    formula          the formula in words, for ``--explain``
    """

    name: str
    kind: str
    count: Array = 1.0
    flops: Array = 0.0
    executed_flops: Array | None = None
    vector_flops: Array = 0.0
    weight_bytes: Array = 0.0
    state_bytes: Array = 0.0
    workspace_bytes: Array = 0.0
    activation_bytes: Array = 0.0
    link_bytes: Array = 0.0
    launches: float = 1.0
    transient_bytes: Array = 0.0
    host_waits: bool = False
    dtype: str = "bf16"
    unfitted: str = ""
    kernel: str = ""
    shape: Mapping[str, Array] = field(default_factory=dict)
    source: str = ""
    formula: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AssertionError(f"operation {self.name!r} has unknown kind {self.kind!r}")

    @property
    def counted_flops(self) -> Array:
        """FLOPs that really run."""
        return self.flops if self.executed_flops is None else self.executed_flops

    @property
    def hbm_bytes(self) -> Array:
        """Bytes the algorithm must move through HBM; activations between kernels are left out."""
        return added(self.weight_bytes, self.state_bytes, self.workspace_bytes)

    @property
    def moved_bytes(self) -> Array:
        """All bytes the kernel touches, activations included: what its time model uses."""
        return added(self.hbm_bytes, self.activation_bytes)


Operations = tuple[Operation, ...]


def some(amount: Array) -> bool:
    """Whether any entry is not zero; amounts mostly are not, so the first one is asked first."""
    if isinstance(amount, np.ndarray) and amount.size:
        return bool(amount.flat[0]) or bool(amount.any())
    return bool(np.any(amount))


def added(*amounts: Array) -> Array:
    """The sum, without touching arrays for the amounts that are plainly nothing: most are."""
    out: Array = 0.0
    for amount in amounts:
        if isinstance(amount, float) and amount == 0.0:
            continue
        out = amount if isinstance(out, float) and out == 0.0 else out + amount
    return out


def causal_pairs(n_queries: Array, window_tokens: Array | None = None) -> Array:
    """Query-key pairs of causal attention over a prompt: S(S+1)/2, or with a window W
    (each query sees itself and W-1 before it): a ramp up to W, then flat.
    """
    s = np.asarray(n_queries, dtype=np.float64)
    w = s if window_tokens is None else np.minimum(s, window_tokens)
    pairs: Array = w * (w + 1) / 2 + (s - w) * w
    return pairs


def blocked_pairs(n_queries: Array, keys: Array, block: float) -> Array:
    """Pairs computed for causal attention of at most ``keys`` keys a query, masked ones too.

    Blocks of b queries ending at e compute b min(e, keys + b - 1) pairs on an engine that has no
    kernel for it; with ``block`` 0 only the pairs that exist are computed.
    """
    if not block:
        return causal_pairs(n_queries, keys)
    s, b = np.asarray(n_queries, dtype=np.float64), block
    widest = np.minimum(keys, s) + b - 1
    whole = np.floor(s / b)
    growing = np.minimum(np.floor(widest / b), whole)
    rest = s - whole * b
    pairs: Array = (
        b * b * growing * (growing + 1) / 2
        + (whole - growing) * b * widest
        + rest * np.minimum(s, np.minimum(keys, s) + rest - 1)
    )
    return pairs


def chunked_pairs(n_queries: Array, chunk_tokens: float) -> Array:
    """Pairs of chunked causal attention: every chunk of c tokens sees only itself."""
    s = np.asarray(n_queries, dtype=np.float64)
    n_full = np.floor(s / chunk_tokens)
    rest = s - n_full * chunk_tokens
    return n_full * causal_pairs(chunk_tokens) + causal_pairs(rest)

"""Seconds of recurrent mixers (gated DeltaNet, KDA, Mamba-2 and their convolutions).

Prefill runs a sequence in chunks of C tokens: products inside a chunk, and a state passed on from
chunk to chunk. B sequences of T tokens, n = ceil(T / C) chunks, state bytes read and written once:

    own         t_own min(T / C, 1)      products inside one chunk, all chunks at once
    work        passes over q, k, v, outputs and gates: B T token bytes p / bw
    chain       n t_chunk                the state goes through the chunks one after the other
    states      B state bytes (1 + c n) / (e_b bw)     kernels that write every chunk's state: c > 0
    time        t0 + own + max(work, chain) + states

Decode reads and writes the state once per step (and once more per drafted token in a verify step,
which is a kernel of its own with another start). A causal convolution of a few taps moves every
channel once in and once out; its blocks take C = 16 tokens.

Replayed buffers that fit the last-level cache are read from there. A table made without a captured
graph shows the host instead where the host is slower: t_host + B t_host,sequence.

What is ignored: tensor time (the chunk products are small beside their passes over memory).
"""

from dataclasses import dataclass

import numpy as np

from costmodel.hardware import HardwareProfile
from costmodel.kernels.kinds import KernelKind, Shape, Work
from costmodel.kernels.physics import Prior, cache_bytes, miss_fraction, tensor_peak
from costmodel.operation import Array

#: Tokens of a chunk in the published kernels, and of a block of a convolution.
CHUNK_TOKENS = 64.0
CONV_TOKENS = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanParameters:
    """One kernel family of a recurrent mixer's part.

    launch_s            start of the kernels
    bandwidth_fraction  attained share of DRAM bandwidth over the useful bytes; prefill scans: of
                        the states
    chunk_s             one link of the chain from chunk to chunk
    own_s               products inside one whole chunk or block, all of them at once
    passes              times the token bytes pass DRAM (prefill scans)
    chunk_states        share of a state's traffic that every chunk causes once more (prefill scans)
    token_s             more per token, whatever its width (convolutions)
    verify_s            more in steps over several drafted tokens
    cache_gain          rate from the last-level cache, against the attained one from DRAM
    cache_fraction      share of the last-level cache that holds replayed operands
    eager_s             host time per call; only in tables made without a captured graph
    eager_sequence_s    more of it per sequence
    """

    launch_s: float
    bandwidth_fraction: float
    chunk_s: float = 0.0
    own_s: float = 0.0
    passes: float = 1.0
    chunk_states: float = 0.0
    token_s: float = 0.0
    verify_s: float = 0.0
    cache_gain: float = 1.0
    cache_fraction: float = 0.7
    eager_s: float = 0.0
    eager_sequence_s: float = 0.0


_EAGER = Prior(2e-6, 2.0, 1e-7, 2e-3, "host time per call, no captured graph")
_EAGER_SEQUENCE = Prior(1e-8, 2.0, 1e-10, 2e-5, "more of it per sequence")
STEP_PRIORS: dict[str, Prior] = {
    "launch_s": Prior(3.5e-6, 0.6, 5e-7, 6e-5, "start of the kernels"),
    "bandwidth_fraction": Prior(0.75, 0.25, 0.05, 1.0, "attained share of DRAM bandwidth"),
    "verify_s": Prior(1e-6, 1.0, 1e-8, 1e-5, "more with several drafted tokens"),
    "cache_gain": Prior(1.3, 0.3, 1.0, 4.0, "rate from the last-level cache against DRAM's"),
}
CONV_PRIORS: dict[str, Prior] = {
    "launch_s": Prior(3.5e-6, 0.7, 5e-7, 6e-5, "start of the kernels"),
    "bandwidth_fraction": Prior(0.5, 0.5, 0.02, 1.0, "attained share of DRAM bandwidth"),
    "own_s": Prior(2e-6, 1.0, 1e-8, 3e-5, "one whole block of 16 tokens"),
    "token_s": Prior(1e-10, 2.0, 1e-13, 1e-6, "more per token, whatever its width"),
    "eager_s": _EAGER,
    "eager_sequence_s": _EAGER_SEQUENCE,
}
PREFILL_PRIORS: dict[str, Prior] = {
    "launch_s": Prior(2.0e-5, 0.6, 2e-6, 3e-4, "start of the kernels"),
    "bandwidth_fraction": Prior(0.4, 0.6, 0.05, 1.0, "attained share for the states"),
    "chunk_s": Prior(3e-6, 0.7, 1e-8, 5e-5, "one link of the chain from chunk to chunk"),
    "own_s": Prior(6e-6, 1.0, 1e-8, 1e-4, "products inside one whole chunk"),
    "passes": Prior(5.0, 0.6, 1.0, 60.0, "times the token bytes pass DRAM"),
    "chunk_states": Prior(0.2, 1.2, 1e-3, 3.0, "share of a state's traffic that a chunk repeats"),
    "eager_s": _EAGER,
}
PRIORS = {
    "conv_prefill": CONV_PRIORS,
    "conv_step": STEP_PRIORS,
    "scan_prefill": PREFILL_PRIORS,
    "scan_step": STEP_PRIORS,
}


def scan_time_s(
    parameters: ScanParameters,
    device: HardwareProfile,
    variant: str,
    batch: Array,
    seq_len: Array,
    token_bytes: Array,
    state_bytes: Array,
    *,
    cold: bool = True,
) -> Array:
    """Seconds of one part of a recurrent mixer. Shape: that of the arguments broadcast.

    variant      conv_prefill, conv_step, scan_prefill or scan_step
    token_bytes  read and written per token: inputs and outputs
    state_bytes  read and written per sequence and step
    """
    p = parameters
    tokens = np.asarray(seq_len, dtype=np.float64)
    bandwidth = device.hbm_bytes_per_s
    per_block = CHUNK_TOKENS if variant == "scan_prefill" else CONV_TOKENS
    chunks = np.ceil(tokens / CHUNK_TOKENS)
    useful = batch * (tokens * token_bytes + state_bytes)
    attained = p.bandwidth_fraction * bandwidth
    start = p.launch_s + p.own_s * np.minimum(tokens / per_block, 1.0)
    if variant == "scan_prefill":
        work = batch * tokens * token_bytes * (p.passes / bandwidth)
        states = batch * state_bytes * (1.0 + p.chunk_states * chunks) / attained
        seconds: Array = start + np.maximum(work, chunks * p.chunk_s) + states
    else:
        gain: Array = np.float64(1.0)
        if not cold and p.cache_gain > 1.0:
            miss = miss_fraction(useful, p.cache_fraction * cache_bytes(device))
            gain = miss + (1.0 - miss) / p.cache_gain
        seconds = start + useful * (gain / attained) + batch * tokens * p.token_s
        if variant.endswith("_step"):
            seconds = seconds + np.where(tokens > 1.0, p.verify_s, 0.0)
    if not cold and p.eager_s:
        seconds = np.maximum(seconds, p.eager_s + batch * p.eager_sequence_s)
    return np.maximum(seconds, useful / bandwidth) if cold else seconds


def _time(
    parameters: ScanParameters, device: HardwareProfile, shape: Shape, variant: str, cold: bool
) -> Array:
    args = (shape[name] for name in SHAPE)
    return scan_time_s(parameters, device, variant, *args, cold=cold)


def _work(device: HardwareProfile, shape: Shape, variant: str) -> Work:
    tokens = np.asarray(shape["seq_len"], dtype=np.float64)
    n_bytes = shape["batch"] * (tokens * shape["token_bytes"] + shape["state_bytes"])
    return Work(0.0, tensor_peak(device, "bf16"), n_bytes)


SHAPE = ("batch", "seq_len", "token_bytes", "state_bytes")
KIND = KernelKind(
    name="scan",
    parameters=ScanParameters,
    shape=SHAPE,
    variants=tuple(PRIORS),
    priors=lambda kernel, variant: PRIORS[variant],
    structure=lambda kernel, variant: {},
    time_s=_time,
    work=_work,
)

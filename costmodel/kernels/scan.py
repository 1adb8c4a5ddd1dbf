"""Seconds of recurrent mixers (gated DeltaNet, KDA, Mamba-2 and their convolutions).

Prefill runs a sequence in chunks of C tokens: products inside a chunk, and a state passed on from
chunk to chunk. B sequences of T tokens, n = ceil(T / C) chunks; S SMs that each move r useful bytes
per second (most of these kernels are bound by their instructions, not by DRAM):

    moved(x, r) x / min(e_b bw, S r)
    own         t_own min(T / C, 1)      products inside one chunk, all chunks at once
    work        moved(B T token bytes, r)
    chain       n t_chunk                the state goes through the chunks one after the other
    states      moved(B state bytes (1 + c n), r_s)    kernels that write every chunk's state: c > 0
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
from costmodel.kernels.physics import (
    Prior,
    cache_bytes,
    clock_ratio,
    miss_fraction,
    tensor_peak,
    units,
)
from costmodel.operation import Array

#: Tokens of a chunk in the published kernels, and of a block of a convolution.
CHUNK_TOKENS = 64.0
CONV_TOKENS = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanParameters:
    """One kernel family of a recurrent mixer's part.

    launch_s            start of the kernels
    bandwidth_fraction  attained share of DRAM bandwidth, e_b
    stream_bytes_per_s  useful bytes that one SM moves at 1.8 GHz, r: of tokens where there are any
    state_bytes_per_s   the same of states, r_s (prefill scans)
    chunk_s             one link of the chain from chunk to chunk
    own_s               products inside one whole chunk or block, all of them at once
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
    stream_bytes_per_s: float
    state_bytes_per_s: float = 1e12
    chunk_s: float = 0.0
    own_s: float = 0.0
    chunk_states: float = 0.0
    token_s: float = 0.0
    verify_s: float = 0.0
    cache_gain: float = 1.0
    cache_fraction: float = 0.7
    eager_s: float = 0.0
    eager_sequence_s: float = 0.0


_BANDWIDTH = Prior(0.85, 0.07, 0.3, 1.0, "attained share of DRAM bandwidth")
_EAGER = Prior(2e-6, 2.0, 1e-7, 2e-3, "host time per call, no captured graph")
_EAGER_SEQUENCE = Prior(1e-8, 2.0, 1e-10, 2e-5, "more of it per sequence")
STEP_PRIORS: dict[str, Prior] = {
    "launch_s": Prior(3.5e-6, 0.6, 5e-7, 6e-5, "start of the kernels"),
    "bandwidth_fraction": _BANDWIDTH,
    "stream_bytes_per_s": Prior(1.8e10, 0.5, 5e8, 2e11, "useful bytes one SM moves at 1.8 GHz"),
    "verify_s": Prior(1e-6, 1.0, 1e-8, 1e-5, "more with several drafted tokens"),
    "cache_gain": Prior(2.0, 0.4, 1.0, 8.0, "rate from the last-level cache against DRAM's"),
}
CONV_PRIORS: dict[str, Prior] = {
    "launch_s": Prior(3.5e-6, 0.7, 5e-7, 6e-5, "start of the kernels"),
    "bandwidth_fraction": _BANDWIDTH,
    "stream_bytes_per_s": Prior(1.5e10, 0.6, 5e8, 2e11, "useful bytes one SM moves at 1.8 GHz"),
    "own_s": Prior(2e-6, 1.0, 1e-8, 3e-5, "one whole block of 16 tokens"),
    "token_s": Prior(1e-10, 2.0, 1e-13, 1e-6, "more per token, whatever its width"),
    "eager_s": _EAGER,
    "eager_sequence_s": _EAGER_SEQUENCE,
}
PREFILL_PRIORS: dict[str, Prior] = {
    "launch_s": Prior(2.0e-5, 0.6, 2e-6, 3e-4, "start of the kernels"),
    "bandwidth_fraction": _BANDWIDTH,
    "stream_bytes_per_s": Prior(4e9, 0.7, 1e8, 2e11, "useful token bytes one SM moves at 1.8 GHz"),
    "state_bytes_per_s": Prior(1e10, 0.7, 5e8, 2e11, "state bytes one SM moves at 1.8 GHz"),
    "chunk_s": Prior(3e-6, 0.7, 1e-8, 5e-5, "one link of the chain from chunk to chunk"),
    "own_s": Prior(6e-6, 1.0, 1e-8, 1e-4, "products inside one whole chunk"),
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
    from_dram = p.bandwidth_fraction * device.hbm_bytes_per_s
    sms = units(device) * clock_ratio(device)
    per_block = CHUNK_TOKENS if variant == "scan_prefill" else CONV_TOKENS
    chunks = np.ceil(tokens / CHUNK_TOKENS)
    useful = batch * (tokens * token_bytes + state_bytes)
    start = p.launch_s + p.own_s * np.minimum(tokens / per_block, 1.0)
    if variant == "scan_prefill":
        work = batch * tokens * token_bytes / min(from_dram, sms * p.stream_bytes_per_s)
        states = batch * state_bytes * (1.0 + p.chunk_states * chunks)
        states = states / min(from_dram, sms * p.state_bytes_per_s)
        seconds: Array = start + np.maximum(work, chunks * p.chunk_s) + states
    else:
        missed: Array = useful
        if not cold and p.cache_gain > 1.0:
            miss = miss_fraction(useful, p.cache_fraction * cache_bytes(device))
            missed = useful * (miss + (1.0 - miss) / p.cache_gain)
        moved = np.maximum(missed / from_dram, useful / (sms * p.stream_bytes_per_s))
        seconds = start + moved + batch * tokens * p.token_s
        if variant.endswith("_step"):
            seconds = seconds + np.where(tokens > 1.0, p.verify_s, 0.0)
    if not cold and p.eager_s:
        seconds = np.maximum(seconds, p.eager_s + batch * p.eager_sequence_s)
    return np.maximum(seconds, useful / device.hbm_bytes_per_s) if cold else seconds


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

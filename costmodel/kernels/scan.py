"""Seconds of recurrent mixers (gated DeltaNet, KDA, Mamba-2 and their convolutions).

Prefill runs a sequence in chunks of C tokens: products inside a chunk, and a state passed on from
chunk to chunk. H heads with D_k x D_v states in fp32:

    chunks      every sequence padded to whole chunks
    work        passes over q, k, v, outputs and gates in DRAM: padded tokens * token bytes
    chain       chunks per sequence * t_chunk: the state goes through them one after the other
    time        t0 + max(work / (e_b bw), chain) + state bytes / (e_b bw)

Decode reads and writes the state once per step (and once more per drafted token in a verify step).
A causal convolution of a few taps moves every channel once in and once out.

What is ignored: tensor time (the chunk products are small beside their passes over memory).
"""

from dataclasses import dataclass

import numpy as np

from costmodel.hardware import HardwareProfile
from costmodel.kernels.kinds import KernelKind, Shape, Work
from costmodel.kernels.physics import Prior, tensor_peak
from costmodel.operation import Array

#: Tokens of a chunk in the published kernels.
CHUNK_TOKENS = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanParameters:
    """One kernel family of a recurrent mixer's part.

    launch_s            start of the kernels
    bandwidth_fraction  attained share of DRAM bandwidth over the useful bytes
    chunk_s             one link of the chain from chunk to chunk
    passes              times the token bytes pass DRAM (prefill)
    eager_s             host time per call; only in tables made without a captured graph
    """

    launch_s: float
    bandwidth_fraction: float
    chunk_s: float = 0.0
    passes: float = 1.0
    eager_s: float = 0.0


_EAGER = Prior(2e-6, 2.0, 1e-7, 2e-3, "host time per call, no captured graph")
STEP_PRIORS: dict[str, Prior] = {
    "launch_s": Prior(3.5e-6, 0.6, 5e-7, 6e-5, "start of the kernels"),
    "bandwidth_fraction": Prior(0.75, 0.25, 0.05, 1.0, "attained share of DRAM bandwidth"),
}
CONV_PRIORS: dict[str, Prior] = {
    "launch_s": Prior(3.5e-6, 0.7, 5e-7, 6e-5, "start of the kernels"),
    "bandwidth_fraction": Prior(0.5, 0.5, 0.02, 1.0, "attained share of DRAM bandwidth"),
    "chunk_s": Prior(2e-8, 1.0, 1e-10, 1e-5, "64 tokens of one sequence, one after the other"),
    "eager_s": _EAGER,
}
PREFILL_PRIORS: dict[str, Prior] = {
    "launch_s": Prior(2.5e-5, 0.6, 2e-6, 3e-4, "start of the kernels"),
    "bandwidth_fraction": Prior(0.6, 0.4, 0.05, 1.0, "attained share for the states"),
    "chunk_s": Prior(3e-6, 0.7, 1e-8, 5e-5, "one link of the chain from chunk to chunk"),
    "passes": Prior(6.0, 0.6, 1.0, 60.0, "times the token bytes pass DRAM"),
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
    chunks = np.ceil(tokens / CHUNK_TOKENS)
    useful = batch * (tokens * token_bytes + state_bytes)
    padded = chunks * CHUNK_TOKENS if variant == "scan_prefill" else tokens
    work = batch * padded * token_bytes * (p.passes / bandwidth)
    if variant != "scan_prefill":
        work = work / p.bandwidth_fraction
    states = batch * state_bytes / (p.bandwidth_fraction * bandwidth)
    seconds: Array = p.launch_s + np.maximum(work, chunks * p.chunk_s) + states
    if not cold and p.eager_s:
        seconds = np.maximum(seconds, p.eager_s)
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

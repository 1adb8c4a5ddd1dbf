"""Prompt kernels of one layer on a CUDA device, beside the same without kernels.

    python benchmarks/prompt_kernels_gpu.py --output out/gpu/prompt_kernels.jsonl

Llama-3-8B geometry in bf16 for what keys received (H2O: all queries; SnapKV: the last 32), Mamba-2
2.7B's and RecurrentGemma-9B's scans, at 8k, 32k and 128k tokens and batch 1, then at what fits need
besides. Useful work is counted as in the kernels' docstrings: FLOPs of H2O's two passes
(4 N D S^2 / 2) and of the chunked scan, bytes of SnapKV's two passes over K and of RG-LRU's one.
One JSON line a measurement, from which ``lccost calibrate --table`` fits the families of the
kernels; run again with the same output it goes on where it stopped. Exit: 0 measured; 1 a kernel
failed; 4 no device or no Triton.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kernels_gpu import kernels_digest, measured_before
from torch import Tensor

from costmodel.mixers import Attention
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.rglru import RGLRU
from measure.devices.base import AbstractDevice
from measure.devices.open import open_device
from measure.kernels import why_not
from measure.methods.h2o import received_scores as received_by_blocks
from measure.mixers.base import linear_scan
from measure.mixers.mamba2 import Mamba2Runner
from measure.numerics import Numerics
from measure.timing import Budget

#: (context, batch), those that are looked at first.
POINTS = (
    *((8_192, 1), (32_768, 1), (131_072, 1)),
    *((16_384, 1), (65_536, 1), (4_096, 1), (2_048, 1)),
    *((8_192, 4), (16_384, 4), (32_768, 4), (4_096, 4), (2_048, 4)),
)
BUDGET = Budget(seconds=1.0, min_samples=3, max_samples=30, warmup_seconds=0.2)
#: Longest prompt whose form without kernels is timed: it keeps blocks of scores, or all states.
PLAIN_LIMIT = 32_768
N, K, D, WINDOW = 32, 8, 128, 32
ATTENTION = Attention(n_heads=N, n_kv_heads=K, head_dim=D, v_head_dim=D)
MAMBA = Mamba2(n_heads=80, head_dim=64, d_state=128, n_groups=1, conv_kernel=4, chunk_tokens=256)
WIDTH = 4096
#: What ``lccost calibrate --table`` builds a fused call from again: kernel, method, mixer.
CALLS: dict[str, tuple[str, str, str, Any]] = {
    "h2o_prompt_scores": ("prompt_scores", "h2o", "attention", ATTENTION),
    "snapkv_votes": ("window_scores", "snapkv:keep_tokens=512", "attention", ATTENTION),
    "ssd_scan": ("ssd_scan", "full", "mamba2", MAMBA),
    "rglru_scan": ("rglru_scan", "full", "rglru", RGLRU(width=WIDTH, n_blocks=16, conv_kernel=4)),
}
Case = tuple[str, str, Callable[[], object], float, str]


def attention_cases(s: int, batch: int, device: torch.device) -> Iterator[Case]:
    from measure.kernels.prompt_scores import received_scores

    q, k = (torch.randn(batch, n, s, D, device=device, dtype=torch.bfloat16) for n in (N, K))
    flops = 4.0 * batch * N * D * s * s / 2
    yield "h2o_prompt_scores", "fused", lambda: received_scores(q, k), flops, "flops"
    if s * batch <= PLAIN_LIMIT:
        yield "h2o_prompt_scores", "torch", lambda: received_by_blocks(q, k), flops, "flops"
    last, n_bytes = q[:, :, -WINDOW:], 2.0 * k.nbytes
    yield "snapkv_votes", "fused", lambda: received_scores(last, k), n_bytes, "bytes"


def scan_cases(s: int, batch: int, device: torch.device) -> Iterator[Case]:
    from measure.kernels.rglru_scan import rglru_scan
    from measure.kernels.ssd_scan import ssd_scan

    m = MAMBA
    x = torch.randn(batch, s, m.n_heads, m.head_dim, device=device)
    shape = (batch, s, m.n_groups, m.d_state)
    # in 16 bits, as the mixer of such a model has them: in fp32 each product would be three
    b, c = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    decay = -torch.rand(batch, s, m.n_heads, device=device)
    state = torch.zeros(batch, m.n_heads, m.head_dim, m.d_state, device=device)
    per_token = 4.0 * m.head_dim * m.d_state + (m.d_state + m.head_dim) * m.chunk_tokens
    flops = batch * m.n_heads * s * per_token

    def fused() -> Tensor:
        return ssd_scan(x, b, c, decay, state, m.chunk_tokens)

    runner, wide = Mamba2Runner(m, Numerics()), (b.float(), c.float())
    yield "ssd_scan", "fused", fused, flops, "flops"
    yield "ssd_scan", "torch", lambda: runner._prompt(x, *wide, decay, state), flops, "flops"
    inputs = [torch.randn(batch, s, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(3)]
    rate, h = torch.randn(WIDTH, device=device), torch.zeros(batch, WIDTH, device=device)
    moved = 4.0 * inputs[0].nbytes
    yield "rglru_scan", "fused", lambda: rglru_scan(*inputs, rate, h, first=True), moved, "bytes"
    if s * batch <= PLAIN_LIMIT:
        a, added = (y.float().sigmoid() for y in inputs[:2])
        yield "rglru_scan", "torch, scan alone", lambda: linear_scan(a, added, h), moved, "bytes"


def built_from(case: str) -> dict[str, Any]:
    """What a record says of the call besides its sizes."""
    kernel, spec, kind, mixer = CALLS[case]
    return {
        "kernel": kernel,
        "method_spec": spec,
        "phase": "prefill",
        "mixer": {"kind": kind, **asdict(mixer)},
        "dtype": "bf16",
    }


def timed(
    device: AbstractDevice, call: Callable[[], object], work: float, unit: str
) -> dict[str, Any]:
    """Seconds of a call, and its useful work per second."""
    timing = device.sampler().time(call, budget=BUDGET)
    seconds = timing.statistics.median_s
    return {
        "status": "ok",
        "seconds": seconds,
        f"{unit}_per_s": work / seconds,
        "samples": list(timing.samples),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 4
    device = open_device(options.device, 1, pinned=False)
    reason = why_not(device.device)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 4
    options.output.parent.mkdir(parents=True, exist_ok=True)
    common = {
        "gpu": torch.cuda.get_device_name(device.device),
        "torch": torch.__version__,
        "kernels": kernels_digest(),
    }
    there = measured_before(options.output, common)
    done = {(r["case"], r["form"], r["context_tokens"], r["batch"]) for r in there}
    worked = True
    with options.output.open("a", encoding="utf-8") as file:
        for s, batch in POINTS:
            for cases in (attention_cases, scan_cases):
                for case, form, call, work, unit in cases(s, batch, device.device):
                    if (case, form, s, batch) in done:
                        continue
                    record = {"case": case, "form": form, "context_tokens": s, "batch": batch}
                    record |= common
                    try:
                        record |= timed(device, call, work, unit) | built_from(case)
                    except torch.OutOfMemoryError as problem:
                        record |= {"status": "oom", "message": str(problem)[:300]}
                    except Exception as problem:  # Triton's are of no common kind
                        message = f"{type(problem).__name__}: {problem}"[:300]
                        record |= {"status": "error", "message": message}
                        worked &= form != "fused"
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    print({k: v for k, v in record.items() if k not in ("samples", "mixer")})
    return 0 if worked else 1


if __name__ == "__main__":
    sys.exit(main())

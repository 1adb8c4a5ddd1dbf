"""How fast a prediction is: start-up of the command, and a million points in one call.

    python benchmarks/predict_speed.py [--runs 7] [--markdown]

Start-up is wall time of a fresh process with byte code cached, median of several after a warm-up;
the sweep is one call of ``predict`` with 1,000,000 random (batch, context) pairs, without the
solved fields, with its peak memory.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "lccost --help": ["--help"],
    "lccost predict, 1 model x 5 methods x 3 contexts": [
        "predict",
        "--model",
        "llama-3.1-8b",
        "--gpu",
        "h100-sxm",
        "--context",
        "8k,32k,128k",
        "--method",
        "full,kivi,h2o,snapkv,fp8_kv",
    ],
    "the same as JSON": [
        "predict",
        "--model",
        "llama-3.1-8b",
        "--gpu",
        "h100-sxm",
        "--context",
        "8k,32k,128k",
        "--method",
        "full,kivi,h2o,snapkv,fp8_kv",
        "--format",
        "json",
    ],
}


def start_up(arguments: list[str], runs: int) -> list[float]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    seconds = []
    for i in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "lccost", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        if i:
            seconds.append(time.perf_counter() - start)
    return seconds


def million(method: str, runs: int) -> list[float]:
    import numpy as np

    from costmodel.hardware import load_hardware
    from costmodel.predict import predict
    from costmodel.registry import load_architecture
    from costmodel.workload import Workload

    rng = np.random.default_rng(0)
    workload = Workload.of(
        rng.integers(1, 257, 1_000_000), rng.integers(1, 2**20 + 1, 1_000_000), 256
    )
    architecture, hardware = load_architecture("llama-3.1-8b"), load_hardware("h100-sxm")
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        predict(architecture, method, workload, hardware, solve=False)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = {name: start_up(a, arguments.runs) for name, a in COMMANDS.items()}
    for method in ("full", "kivi", "h2o"):
        rows[f"predict, 1,000,000 pairs, {method}"] = million(method, min(arguments.runs, 5))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if arguments.json:
        print(json.dumps({"seconds": rows, "peak_bytes": peak, "machine": platform.processor()}))
        return
    print(f"{'what':58} {'median':>9} {'min':>9} {'max':>9}")
    for name, seconds in rows.items():
        print(
            f"{name:58} {statistics.median(seconds):8.3f}s"
            f" {min(seconds):8.3f}s {max(seconds):8.3f}s"
        )
    print(f"peak memory of this process: {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()

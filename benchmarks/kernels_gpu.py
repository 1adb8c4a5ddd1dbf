"""Decode steps of one attention layer by the kernels of ``measure/kernels``, on a CUDA device.

    python benchmarks/kernels_gpu.py --output out/gpu/kernels.jsonl

Llama-3-8B geometry (32 query heads, 8 KV heads of 128), bf16, contexts of 8k, 32k and 128k (then
64k and 4k, which fits need), batches of 1, 8 and 32. A step is what a twin does in a decode step:
attention over the filled cache and the new token, merge, quantise and append. As many layers as
leave nothing of each other in the L2 cache are one CUDA graph, whose time is divided among them.
Beside it PyTorch's SDPA over a bf16 cache, FlashAttention and FlashInfer where they are installed,
the same twin without kernels, and for the quantised caches the published chain (realisation
``reference``).

One JSON line a measurement, from which ``lccost calibrate --table`` fits the families of the
kernels, and at the end the figures that are required of them. Points are taken from the most
important on, until ``--seconds`` are spent; run again with the same output it goes on where it
stopped, as long as device, software and kernels are the same. Exit: 0 measured, or out of time; 1 a
kernel failed or gave a wrong result; 4 no device or no Triton.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import kernel_cases as made
import torch
from kernel_figures import figures, required, unmeasured

from costmodel.errors import LccostError, NotApplicableError
from costmodel.hardware import HardwareProfile, load_hardware
from measure import kernels
from measure.devices.base import AbstractDevice
from measure.devices.open import open_device
from measure.environment import fingerprint
from measure.timing import Budget

#: (context, batch), those that figures are required for first.
POINTS = [
    *((131_072, 8), (32_768, 8), (131_072, 32), (32_768, 32)),
    *((8_192, 8), (131_072, 1), (32_768, 1), (8_192, 32), (8_192, 1)),
    *((65_536, 8), (4_096, 8), (65_536, 32), (65_536, 1), (4_096, 32), (4_096, 1)),
]
METHODS = (
    *("full", "kivi:bits=2", "kivi:bits=4", "fp8_kv", "flexgen", "h2o", "tova"),
    *("streaming_llm", "quest"),
)
#: Most layers of one sample: those of the model.
MOST_LAYERS = 32
#: Largest difference from the torch form, over the largest output.
MAX_ERROR = 0.02
BUDGET = Budget(seconds=0.6, min_samples=9, max_samples=60, warmup_seconds=0.2)


def copy_bytes_per_s(device: AbstractDevice, n_bytes: int = 2**31) -> float:
    """Read and write of a plain copy, both counted."""
    source = torch.empty(n_bytes // 4, dtype=torch.float32, device=device.device).fill_(1.0)
    target = torch.empty_like(source)
    timing = device.sampler().time(lambda: target.copy_(source), budget=BUDGET)
    return 2.0 * n_bytes / timing.statistics.median_s


def timed(case: made.Case, n_bytes: float, device: AbstractDevice) -> dict[str, Any]:
    """Seconds of a layer's step that moves ``n_bytes``, in a replayed graph where there are some.

    As in a model the graph has the steps of several layers, until what they read leaves nothing in
    the L2 cache: one short step would be timed with the start of its graph.
    """
    layers = [case]
    while len(layers) < MOST_LAYERS and device.flush(int(n_bytes * len(layers))) is not None:
        layers.append(case.another())

    def steps() -> None:
        for layer in layers:
            layer.call()

    def restore() -> None:
        for layer in layers:
            layer.before()

    # putting back writes, so that something is in the cache however large the working set
    flush = device.flush(0)

    def put_back() -> None:
        restore()
        if flush is not None:
            flush()

    restore()
    captured = device.capture(steps, restore)
    timing = device.sampler().time(captured.replay or steps, before=put_back, budget=BUDGET)
    restore()
    return {
        "seconds": timing.statistics.median_s / len(layers),
        "layers": len(layers),
        "iqr_fraction": timing.statistics.iqr_fraction,
        "n_samples": len(timing.samples),
        "samples": [x / len(layers) for x in timing.samples],
        "timer": timing.timer,
        "graph": captured.replay is not None,
        "graph_reason": captured.reason,
    }


def kernels_digest() -> str:
    """12 hex digits of the kernels' sources."""
    files = sorted(Path(kernels.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(x.read_bytes() for x in files)).hexdigest()[:12]


def common_fields(device: AbstractDevice, hardware: HardwareProfile) -> dict[str, Any]:
    """Fields of every record: what a record is comparable with."""
    properties = getattr(device, "properties", None)
    return {
        "gpu": hardware.name,
        "device_name": str(getattr(properties, "name", device.name)),
        "torch": torch.__version__,
        "triton": version("triton"),
        "kernels": kernels_digest(),
    }


def measured_before(output: Path, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Measurements that an earlier run left, of the same device, software and kernels."""
    if not output.exists():
        return []
    records = [json.loads(x) for x in output.read_text("utf-8").splitlines() if x.endswith("}")]
    return [r for r in records if r["status"] == "ok" and r.items() >= common.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A device with what its figures are held against; records go to ``file`` as they are made."""

    device: AbstractDevice
    hardware: HardwareProfile
    copy: float
    common: dict[str, Any]
    file: TextIO
    records: list[dict[str, Any]]

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self.file.write(json.dumps({**self.common, **record}, allow_nan=False) + "\n")
        self.file.flush()

    def failed(self, record: dict[str, Any], problem: Exception) -> None:
        """Write what went wrong; ends the run where the device does not answer any more."""
        message = f"{type(problem).__name__}: {problem}"[:300]
        self.write({**record, "status": "error", "message": message})
        print(f"{record}: {message}", file=sys.stderr)
        if self.device.name != "cpu":
            try:
                torch.cuda.synchronize()
            except RuntimeError as fatal:
                raise SystemExit(f"the device does not answer any more: {fatal}") from problem

    def checks(self, spec: str) -> bool:
        """Whether the kernels of a method give what the torch form gives."""
        record: dict[str, Any] = {"case": spec, "form": "fused"}
        try:
            error = made.agreement(spec, self.device.device)
        except Exception as problem:  # Triton's are of no common kind; the other kernels go on
            self.failed(record, problem)
            return False
        # bf16 outputs: 2^-8 of the largest, and rounding of what is multiplied.
        right = error <= MAX_ERROR
        record |= {"status": "checked" if right else "wrong", "largest_error": error}
        self.write({**record, "environment": fingerprint(device=self.device.name)})
        print(f"{spec}: differs from the torch form by {error:.2e}", file=sys.stderr)
        return right

    def measure(self, context: int, batch: int, make: Callable[[], Iterator[made.Case]]) -> bool:
        """Time what ``make`` gives; False where a kernel failed other than for memory."""
        record: dict[str, Any] = {"context_tokens": context, "batch": batch}
        try:
            for case in make():
                record = {"context_tokens": context, "batch": batch}
                record |= {"case": case.name, "form": case.form, "tokens": case.context}
                spec = case.name if case.name in METHODS else "full"
                record |= figures(spec, case.context, batch, self.copy, self.hardware)
                record |= timed(case, record["bytes"], self.device) | {"status": "ok"}
                record["bytes_per_s"] = record["bytes"] / record["seconds"]
                self.write(record)
                self.records.append({**self.common, **record})
                print(line(record), file=sys.stderr)
        except NotApplicableError as problem:  # a form that this twin does not have
            self.write({**record, "status": "skipped", "message": str(problem)})
        except torch.OutOfMemoryError as problem:
            self.write({**record, "status": "oom", "message": str(problem)[:300]})
        except Exception as problem:  # as above
            self.failed(record, problem)
            return record.get("form") not in ("fused", "kept", None)
        finally:
            if self.device.name != "cpu":
                torch.cuda.empty_cache()
        return True


def run(
    output: Path,
    device: AbstractDevice,
    hardware: HardwareProfile,
    *,
    points: list[tuple[int, int]],
    methods: tuple[str, ...] = METHODS,
    seconds: float = 450.0,
) -> int:
    """Measure, write as it goes, and print what is met; the exit code."""
    stop = time.monotonic() + seconds
    output.parent.mkdir(parents=True, exist_ok=True)
    common = common_fields(device, hardware)
    before = measured_before(output, common)
    copy = hardware.hbm_bytes_per_s if device.name == "cpu" else copy_bytes_per_s(device)
    with output.open("w", encoding="utf-8") as file:
        bench = Bench(
            device=device, hardware=hardware, copy=copy, common=common, file=file, records=[]
        )
        for record in before:
            bench.write(record)
            bench.records.append(record)
        print(f"copy: {copy / 1e12:.3f} TB/s; {len(before)} records kept", file=sys.stderr)
        usable = tuple(spec for spec in methods if bench.checks(spec))
        worked = len(usable) == len(methods)
        done = {(r["case"], r["form"], r["context_tokens"], r["batch"]) for r in before}
        todo = [
            (context, batch, make)
            for context, batch in points
            for name, form, make in made.cases(context, batch, device.device, usable)
            if (name, form, context, batch) not in done
        ]
        for i, (context, batch, make) in enumerate(todo):
            if time.monotonic() > stop:
                print(f"out of time: {len(todo) - i} cases left, run again", file=sys.stderr)
                break
            worked &= bench.measure(context, batch, make)
    left = unmeasured(bench.records, points, methods)
    if left:
        print(f"not measured yet, though figures are required of it: {'; '.join(left)}")
    verdicts = required(bench.records)
    for text, met in verdicts:
        print(f"{'met   ' if met else 'MISSED'} {text}")
    print(f"{sum(met for _, met in verdicts)} of {len(verdicts)} required figures met")
    return 0 if worked else 1


def line(record: dict[str, Any]) -> str:
    """One measurement for the eye."""
    return (
        f"{record['case']:>14} {record['form']:<9} {record['context_tokens']:>7,} "
        f"x {record['batch']:<2} {record['seconds'] * 1e6:10.1f} us "
        f"{record['bytes_per_s'] / record['copy_bytes_per_s']:6.1%} of copy, "
        f"predicted {record['predicted_s'] * 1e6:10.1f} us"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/gpu/kernels.jsonl"))
    parser.add_argument("--gpu", help="profile that predicts; default: the device's")
    parser.add_argument("--seconds", type=float, default=450.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device: none is here", file=sys.stderr)
        return 4
    reason = kernels.why_not(torch.device("cuda"))
    if reason is not None:
        print(reason, file=sys.stderr)
        return 4
    device = open_device("cuda:0", 1)
    try:
        hardware = load_hardware(options.gpu or torch.cuda.get_device_name(0))
    except LccostError as problem:
        print(f"{problem} Name one with --gpu.", file=sys.stderr)
        return 2
    return run(options.output, device, hardware, points=POINTS, seconds=options.seconds)


if __name__ == "__main__":
    sys.exit(main())

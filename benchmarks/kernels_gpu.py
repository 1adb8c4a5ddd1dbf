"""Decode steps of one attention layer by the kernels of ``measure/kernels``, on a CUDA device.

    python benchmarks/kernels_gpu.py --output out/gpu/kernels.jsonl

Llama-3-8B geometry (32 query heads, 8 KV heads of 128), bf16, contexts of 8k, 32k and 128k (then
64k and 4k, which fits need), batches of 1, 8 and 32. A step is what a twin does in a decode step:
attention over the filled cache and the new token, merge, quantise and append, replayed as a CUDA
graph with cold caches. Beside it PyTorch's SDPA over a bf16 cache, FlashAttention and FlashInfer
where they are installed, the same twin without kernels, and for the quantised caches the published
chain (realisation ``reference``).

One JSON line a measurement, from which ``lccost calibrate --table`` fits the families of the
kernels, and at the end the figures that are required of them. Points are taken from the most
important on, until ``--seconds`` are spent. Exit: 0 measured; 1 a kernel failed or gave a wrong
result; 4 no device or no Triton.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from costmodel.architecture import MixerGroup
from costmodel.engines import load_engine
from costmodel.errors import LccostError, NotApplicableError
from costmodel.fused_kernels import work_of
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.kernels import time_operation
from costmodel.kernels.fused import arithmetic_s
from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from costmodel.operation import Operation
from costmodel.workload import Point
from measure.devices.base import AbstractDevice
from measure.devices.open import open_device
from measure.kernels import why_not
from measure.methods import build_layer_cache
from measure.timing import Budget

GEOMETRY = Attention(n_heads=32, n_kv_heads=8, head_dim=128, v_head_dim=128)
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
#: Methods whose kernels must reach a share of the copy bandwidth, not only of their ceiling.
PLAIN = ("full", "fp8_kv", "streaming_llm")
#: Speed over bf16 SDPA at 128k x 8: required, aimed at.
FASTER = {"kivi:bits=2": (2.5, 4.0), "kivi:bits=4": (1.9, 2.7)}
#: Largest difference from the torch form, over the largest output.
MAX_ERROR = 0.02
CEILING_SHARE, COPY_SHARE, SCORING_COST = 0.75, 0.80, 0.10
#: Steps replayed between two restores lengthen the cache; so much room is made.
ROOM_TOKENS = 1024
BUDGET = Budget(seconds=0.6, min_samples=9, max_samples=60, warmup_seconds=0.2)
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to time: ``call`` makes a step, ``before`` puts back what it changed."""

    name: str
    form: str
    call: Call
    before: Call
    working_bytes: float
    check: Callable[[], Tensor] | None = None


def twin_case(
    spec: str, form: str, context: int, batch: int, device: torch.device, seed: int = 0
) -> Case:
    """A twin's step: ``fused`` by kernels, ``torch`` without, ``reference`` the published chain."""
    cache = build_layer_cache(
        parse_method(spec).resolved(context),
        GEOMETRY,
        batch=batch,
        dtype=torch.bfloat16,
        device=device,
        reserve_tokens=context + ROOM_TOKENS,
        fused=form == "fused",
        realisation="reference" if form == "reference" else "best",
    )
    # the third of its model's caches: Quest's first two are dense
    cache.place(2, 3)
    cache.fill(context, seed)
    q, k, v = tokens(batch, device, seed)
    snapshot = cache.snapshot()
    return Case(
        name=spec,
        form=form,
        call=lambda: cache.decode(q, k, v),
        before=lambda: cache.restore(snapshot),
        working_bytes=cache.held_bytes,
        check=lambda: cache.decode(q, k, v).float().clone(),
    )


def tokens(batch: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A new token's q, k and v."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = {"dtype": torch.bfloat16, "device": device, "generator": generator}
    heads = (GEOMETRY.n_heads, GEOMETRY.n_kv_heads, GEOMETRY.n_kv_heads)
    q, k, v = (torch.randn(batch, n, 1, GEOMETRY.head_dim, **shape) for n in heads)  # type: ignore[call-overload]
    return q, k, v


def library_cases(context: int, batch: int, device: torch.device) -> Iterator[Case]:
    """Attention of libraries over a bf16 cache: no append, so they do a little less."""
    shape = (batch, GEOMETRY.n_kv_heads, context, GEOMETRY.head_dim)
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in "kv")
    q = tokens(batch, device, 1)[0]
    nbytes = 2.0 * k.nbytes

    def nothing() -> None:
        pass

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    folded = q.view(batch, GEOMETRY.n_kv_heads, -1, GEOMETRY.head_dim)

    def sdpa_folded() -> Tensor:
        return scaled_dot_product_attention(folded, k, v)

    yield Case("sdpa", "library", sdpa, nothing, nbytes)
    yield Case("sdpa_folded", "library", sdpa_folded, nothing, nbytes)
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_with_kvcache

        fq, fk, fv = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        yield Case(
            "flash_attn", "library", lambda: flash_attn_with_kvcache(fq, fk, fv), nothing, nbytes
        )
    if batch == 1 and importlib.util.find_spec("flashinfer") is not None:
        import flashinfer

        q1, k1, v1 = q[0, :, 0], k[0], v[0]
        yield Case(
            "flashinfer",
            "library",
            lambda: flashinfer.single_decode_with_kv_cache(q1, k1, v1, kv_layout="HND"),
            nothing,
            nbytes,
        )


def operation(spec: str, context: int, batch: int) -> Operation:
    """The step of one layer as the cost model has it, level ideal."""
    at = Point(
        batch=float(batch),
        prompt_tokens=float(context),
        cached_tokens=float(context),
        reserved_tokens=float(context + ROOM_TOKENS),
        dtype="bf16",
        kv_dtype="bf16",
        level="ideal",
        engine=load_engine("lccost"),
    )
    # the third of its model's caches, as in ``twin_case``
    group = MixerGroup(GEOMETRY, 1, (2,), 3)
    (step,) = parse_method(spec).resolved(context).decode(group, at)
    return step


def copy_bytes_per_s(device: AbstractDevice, n_bytes: int = 2**31) -> float:
    """Read and write of a plain copy, both counted."""
    source = torch.empty(n_bytes // 4, dtype=torch.float32, device=device.device).fill_(1.0)
    target = torch.empty_like(source)
    timing = device.sampler().time(lambda: target.copy_(source), budget=BUDGET)
    return 2.0 * n_bytes / timing.statistics.median_s


def timed(case: Case, device: AbstractDevice) -> dict[str, Any]:
    """Seconds of a step, as a replayed graph where it can be captured."""
    case.before()
    captured = device.capture(case.call, case.before)
    call = captured.replay or case.call
    flush = device.flush(case.working_bytes)

    def put_back() -> None:
        case.before()
        if flush is not None:
            flush()

    timing = device.sampler().time(call, before=put_back, budget=BUDGET)
    case.before()
    return {
        "seconds": timing.statistics.median_s,
        "iqr_fraction": timing.statistics.iqr_fraction,
        "n_samples": len(timing.samples),
        "samples": list(timing.samples),
        "timer": timing.timer,
        "graph": captured.replay is not None,
        "graph_reason": captured.reason,
    }


def agreement(spec: str, device: torch.device, context: int = 4096 + 77) -> float:
    """Largest difference of a fused step from the torch form, over the largest output."""
    outs = []
    for form in ("fused", "torch"):
        case = twin_case(spec, form, context, 2, device)
        assert case.check is not None
        outs.append(case.check())
    return float((outs[0] - outs[1]).abs().max() / outs[1].abs().max())


def ceiling_bytes_per_s(step: Operation, copy: float, hardware: HardwareProfile) -> float:
    """The smaller of the copy bandwidth and what the kernel's arithmetic allows."""
    arithmetic = float(arithmetic_s(hardware, work_of(step, float(hardware.n_units or 100))))
    n_bytes = float(step.hbm_bytes)
    return n_bytes / max(n_bytes / copy, arithmetic)


def figures(
    spec: str, context: int, batch: int, copy: float, hardware: HardwareProfile
) -> dict[str, Any]:
    """What a step is held against, and what ``lccost calibrate --table`` builds it from again."""
    step = operation(spec, context, batch)
    return {
        "kernel": step.kernel,
        "method_spec": spec,
        "phase": "decode",
        "mixer": {"kind": "attention", **asdict(GEOMETRY)},
        "dtype": "bf16",
        "reserved_tokens": context + ROOM_TOKENS,
        "bytes": float(step.hbm_bytes),
        "copy_bytes_per_s": copy,
        "ceiling_bytes_per_s": ceiling_bytes_per_s(step, copy, hardware),
        "predicted_s": float(time_operation(step, hardware).mid_s),
    }


def cases(
    context: int, batch: int, device: torch.device, methods: tuple[str, ...]
) -> Iterator[Callable[[], Iterator[Case]]]:
    """Everything that is timed at a point, made one at a time: each holds a cache."""
    yield lambda: library_cases(context, batch, device)
    for spec in methods:
        forms = ["fused"]
        # The chain repeats caches to all query heads; larger ones do not fit beside the cache.
        if spec.startswith(("kivi", "flexgen")) and context * batch <= 2**18:
            forms += ["torch", "reference"]
        for form in forms:
            yield lambda spec=spec, form=form: iter([twin_case(spec, form, context, batch, device)])  # type: ignore[misc]


def required(records: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """The figures required of the kernels, with whether they are met; only what was measured."""
    at = {(r["case"], r["form"], r["context_tokens"], r["batch"]): r for r in records}
    out = []
    for (name, form, context, batch), r in at.items():
        if form != "fused" or context < 32_768 or batch < 8:
            continue
        where = f"{name} at {context:,} x {batch}"
        share = r["bytes_per_s"] / r["ceiling_bytes_per_s"]
        text = f"{where}: {share:.0%} of the ceiling ({CEILING_SHARE:.0%})"
        out.append((text, share >= CEILING_SHARE))
        if name in PLAIN:
            share = r["bytes_per_s"] / r["copy_bytes_per_s"]
            text = f"{where}: {share:.0%} of the copy bandwidth ({COPY_SHARE:.0%})"
            out.append((text, share >= COPY_SHARE))
        plain = at.get(("full", "fused", context, batch))
        if name == "h2o" and plain is not None:
            per_byte = r["seconds"] / r["bytes"] * plain["bytes"] / plain["seconds"] - 1
            text = f"{where}: scoring costs {per_byte:.0%} per byte ({SCORING_COST:.0%})"
            out.append((text, per_byte <= SCORING_COST))
    sdpa = [at.get((n, "library", 131_072, 8)) for n in ("sdpa", "sdpa_folded")]
    fastest = min((r["seconds"] for r in sdpa if r is not None), default=None)
    for name, (least, aim) in FASTER.items():
        r = at.get((name, "fused", 131_072, 8))
        if r is not None and fastest is not None:
            ratio = fastest / r["seconds"]
            text = f"{name}: {ratio:.2f} x as fast as bf16 SDPA at 128k x 8 ({least}, aim {aim})"
            out.append((text, ratio >= least))
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A device with what its figures are held against; records go to ``file`` as they are made."""

    device: AbstractDevice
    hardware: HardwareProfile
    copy: float
    file: TextIO
    records: list[dict[str, Any]]

    @property
    def common(self) -> dict[str, Any]:
        """Fields of every record."""
        properties = getattr(self.device, "properties", None)
        name = str(getattr(properties, "name", self.device.name))
        return {"gpu": self.hardware.name, "device_name": name, "torch": torch.__version__}

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self.file.write(json.dumps({**self.common, **record}, allow_nan=False) + "\n")
        self.file.flush()

    def checks(self, spec: str) -> bool:
        """Whether the kernels of a method give what the torch form gives."""
        record: dict[str, Any] = {"case": spec, "form": "fused"}
        try:
            error = agreement(spec, self.device.device)
        except (LccostError, RuntimeError, ValueError) as problem:
            self.write({**record, "status": "error", "message": str(problem)[:300]})
            print(f"{spec}: {problem}", file=sys.stderr)
            return False
        # bf16 outputs: 2^-8 of the largest, and rounding of what is multiplied.
        right = error <= MAX_ERROR
        self.write({**record, "status": "checked" if right else "wrong", "largest_error": error})
        print(f"{spec}: differs from the torch form by {error:.2e}", file=sys.stderr)
        return right

    def measure(self, context: int, batch: int, make: Callable[[], Iterator[Case]]) -> bool:
        """Time what ``make`` gives; False where something failed other than for memory."""
        record: dict[str, Any] = {"context_tokens": context, "batch": batch}
        try:
            for case in make():
                record = {"context_tokens": context, "batch": batch}
                record |= {"case": case.name, "form": case.form}
                record |= timed(case, self.device) | {"status": "ok"}
                spec = case.name if case.name in METHODS else "full"
                record |= figures(spec, context, batch, self.copy, self.hardware)
                record["bytes_per_s"] = record["bytes"] / record["seconds"]
                self.write(record)
                self.records.append({**self.common, **record})
                print(line(record), file=sys.stderr)
        except NotApplicableError as problem:  # a form that this twin does not have
            self.write({**record, "status": "skipped", "message": str(problem)})
        except torch.OutOfMemoryError as problem:
            self.write({**record, "status": "oom", "message": str(problem)[:300]})
        except (LccostError, RuntimeError, ValueError) as problem:
            self.write({**record, "status": "error", "message": str(problem)[:300]})
            print(f"{context} x {batch}: {problem}", file=sys.stderr)
            return False
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
    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    copy = hardware.hbm_bytes_per_s if device.name == "cpu" else copy_bytes_per_s(device)
    with output.open("w", encoding="utf-8") as file:
        bench = Bench(device=device, hardware=hardware, copy=copy, file=file, records=[])
        print(f"copy: {copy / 1e12:.3f} TB/s", file=sys.stderr)
        usable = tuple(spec for spec in methods if bench.checks(spec))
        worked = len(usable) == len(methods)
        for context, batch in points:
            for make in cases(context, batch, device.device, usable):
                if time.monotonic() - started > seconds:
                    print("out of time: the rest was not measured", file=sys.stderr)
                    break
                worked &= bench.measure(context, batch, make)
    for text, met in required(bench.records):
        print(f"{'met   ' if met else 'MISSED'} {text}")
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
    reason = why_not(torch.device("cuda"))
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

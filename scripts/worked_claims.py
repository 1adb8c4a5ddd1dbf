"""Figures and shorthands that people repeat, set beside what a count gives."""

from collections.abc import Iterator

import numpy as np

from costmodel.architecture import Architecture
from costmodel.hardware import HardwareProfile
from costmodel.model import Model
from costmodel.options import Options
from costmodel.predict import predict
from costmodel.quality import accuracy
from costmodel.registry import load_architecture
from costmodel.units import format_bytes, format_seconds
from costmodel.workload import Workload

CREDIT = (
    "The figures in the first column are from the write-up on long-context inference by "
    "[Jaehun Ryu](https://jaehun.me) (CC BY 4.0), which lccost started from."
)


def state(model: Architecture, spec: str, context: int, hardware: HardwareProfile) -> int:
    """GPU bytes of the state after a prompt."""
    p = predict(model, spec, Workload.of(1, context), hardware, solve=False)
    return int(p["state_bytes"])


def claims() -> Iterator[str]:
    """The write-up's figures beside exact ones."""
    from costmodel.hardware import load_hardware

    hardware = load_hardware("a100-sxm-80gb")
    llama3, llama2 = load_architecture("llama-3-8b"), load_architecture("llama-2-7b")
    full, kivi = (state(llama3, s, 10_000, hardware) for s in ("full", "kivi:bits=4"))
    short, long = (state(llama2, "full", n, hardware) for n in (4096, 100_000))
    product = 4 * 4096 * 1024 * 2
    yield f"## Figures of the write-up, checked\n\n{CREDIT}\n"
    yield "| figure | counted | what is behind it |\n|---|---|---|"
    yield (
        f"| 1.6 GB of cache at 10,000 tokens | {full / 1e9:.3f} GB ({format_bytes(full)}) on "
        f"Llama-3-8B | 1.6 GB is {1.6e9 / 10_000:,.0f} B a token; Llama-3-8B holds "
        f"{full // 10_000:,}: "
        f"2 x 32 layers x 8 KV heads x 128 x 2 B. The figure is {1.6e9 / full - 1:.0%} above it |"
    )
    yield (
        f"| 0.4 GB of it left with 4 bits | {kivi / 1e9:.3f} GB ({format_bytes(kivi)}) with KIVI-4 "
        "| "
        f"the size is right, the factor is not: scales, zero points and the 16-bit residual make "
        f"{full / kivi:.2f}x of the nominal 4x |"
    )
    yield (
        f"| 4 x 4096 x 1024 x 2 = 32 MB for a 7B model at 4k | {short:,} B "
        f"({format_bytes(short)}) on Llama-2-7B | the product is {product:,} B; the cache is 2 x "
        f"32 layers x 4,096 tokens x 4,096 wide x 2 B, {short / product:.0f} times as much |"
    )
    yield (
        f"| 800 MB at 100k | {long:,} B ({format_bytes(long)}) on Llama-2-7B | the same factor "
        f"carried on: {long / 800e6:.1f} times as much, most of an 80 GB GPU |"
    )
    yield ""


def shorthands(hardware: HardwareProfile) -> Iterator[str]:
    """Rules of thumb: when they hold, when not, by how much."""
    model = load_architecture("llama-3-8b")
    yield "## Shorthands beside the truth\n"
    yield from _bits(model, hardware)
    yield from _half(model, hardware)
    yield from _nothing(model, hardware)
    yield from _linear(model, hardware)


def _bits(model: Architecture, hardware: HardwareProfile) -> Iterator[str]:
    yield '### "4 bits are 4 times smaller"\n'
    yield (
        "Of codes alone. Each group also has a scale and a zero point, and recent tokens stay in "
        "16 bits, so short prompts gain least and no length reaches 4x:\n"
    )
    yield "| tokens | full | KIVI-4 | times smaller | KIVI-2 | times smaller |"
    yield "|---|---|---|---|---|---|"
    for n in (128, 1_000, 10_000, 100_000, 1_000_000):
        full, four, two = (
            state(model, s, n, hardware) for s in ("full", "kivi:bits=4", "kivi:bits=2")
        )
        yield (
            f"| {n:,} | {full:,} B | {four:,} B | {full / four:.2f} "
            f"| {two:,} B | {full / two:.2f} |"
        )
    rows = [
        predict(model, s, Workload.of(1, 10_000, 256), hardware, solve=False)
        for s in ("full", "kivi:bits=4")
    ]
    moved = [float(p["decode_hbm_bytes"]) for p in rows]
    peak = [float(p["peak_decode_bytes"]) for p in rows]
    yield (
        f"\nAnd the cache is not all: at 10,000 tokens and batch 1 a step reads {moved[0]:,.0f} B "
        f"with full attention and {moved[1]:,.0f} B with a fused 4-bit cache, "
        f"{1 - moved[1] / moved[0]:.1%} less, because weights dominate; the GPU holds "
        f"{1 - peak[1] / peak[0]:.1%} less. It pays with long contexts and large batches.\n"
    )


def _half(model: Architecture, hardware: HardwareProfile) -> Iterator[str]:
    yield '### "Dropping half the tokens quarters the compute"\n'
    yield (
        "Of attention scores alone, which are quadratic. Projections and MLPs are linear and are "
        "halved. What is left of the prefill FLOPs of Llama-3-8B when half the prompt is dropped:\n"
    )
    yield "| tokens | attention's share of the FLOPs | left of attention | left of all |"
    yield "|---|---|---|---|"
    m = Model.of(model, "full", hardware, Options())
    for n in (1_000, 10_000, 100_000, 1_000_000, 10_000_000):
        whole, half = (_prefill_flops(m, float(k)) for k in (n, n // 2))
        yield (
            f"| {n:,} | {whole[0] / whole[1]:.1%} | {half[0] / whole[0]:.1%} "
            f"| {half[1] / whole[1]:.1%} |"
        )
    full, dropped = (
        predict(model, s, Workload.of(1, 10_000, 256), hardware, solve=False)
        for s in ("full", "llmlingua2:rate=0.5")
    )
    yield (
        f"\nAt 10,000 tokens it halves: the first token comes after "
        f"{format_seconds(float(dropped['ttft_s']))} instead of "
        f"{format_seconds(float(full['ttft_s']))}, the compressor's own pass included. Dropping "
        "tokens from the cache *after* the prompt (SnapKV, H2O) saves no prefill compute at all.\n"
    )


def _prefill_flops(model: Model, n: float) -> tuple[float, float]:
    """FLOPs of attention scores and of everything."""
    found = model.operations(1.0, n, 1.0)["prefill"]
    amounts = [(op.kind, float(np.max(np.asarray(op.flops) * op.count))) for op in found]
    return sum(v for k, v in amounts if k == "prefill_attention"), sum(v for _, v in amounts)


def _nothing(model: Architecture, hardware: HardwareProfile) -> Iterator[str]:
    yield '### "Quantisation loses nothing"\n'
    known = []
    for name, context in (("llama-3-8b", 4096), ("llama-2-7b", 4096), ("llama-3.1-8b", 4096)):
        for bits in (2, 4):
            parameters = {"bits": bits, "group": 32, "residual_tokens": 128}
            drop, source = accuracy(name, "kivi", parameters, context)
            if drop is not None:
                known.append(f"| {name} | {bits} | {drop:g} | {source} |")
    if known:
        yield "Published evidence for KIVI, averages over tasks:\n"
        yield "| model | bits | points lost | source |\n|---|---|---|---|"
        yield from known
        yield ""
    yield (
        "Small on averages of short answers; unknown for most models at long contexts, where "
        "lccost says unknown instead of 0. Time is not free either: at 10,000 tokens and batch 1 "
        "a step of Llama-3-8B takes\n"
    )
    yield "| | fused | as published |\n|---|---|---|"
    for spec in ("full", "kivi:bits=4", "kivi:bits=2"):
        times = [
            format_seconds(
                float(
                    predict(
                        model, spec, Workload.of(1, 10_000, 256), hardware, level=level, solve=False
                    )["tpot_s"]
                )
            )
            for level in ("ideal", "reference")
        ]
        yield f"| `{spec}` | {' | '.join(times)} |"
    yield ""


def _linear(model: Architecture, hardware: HardwareProfile) -> Iterator[str]:
    yield '### "Linear models need no memory"\n'
    yield (
        "They need no memory that *grows*. Their state is there from the first token, every "
        "sequence of a batch has its own, and each step reads and writes all of it. State in "
        "bytes:\n"
    )
    names = ("llama-3-8b", "recurrentgemma-9b", "mamba-2.8b", "mamba-codestral-7b")
    yield f"| tokens | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"
    models = [load_architecture(n) for n in names]
    for n in (1, 100, 1_000, 10_000, 1_000_000):
        held = [f"{state(m, 'full', n, hardware):,}" for m in models]
        yield f"| {n:,} | {' | '.join(held)} |"
    codestral = state(models[3], "full", 1, hardware)
    per_token = state(models[0], "full", 2, hardware) - state(models[0], "full", 1, hardware)
    yield (
        f"\nRecurrentGemma's grows for 2,048 tokens, because every third layer is attention over a "
        f"window. Below {codestral // per_token:,} tokens a sequence of mamba-codestral-7b holds "
        f"*more* than one of Llama-3-8B. The weights of these three, 5 to 17 GB, dwarf the "
        "state of one sequence at any length.\n"
    )

"""Write docs/worked_example.md: one request walked through, method by method, in exact numbers.

    python scripts/worked_example.py            write the page and its pictures
    python scripts/worked_example.py --check    fail when the page is out of date

Every number on the page is computed here; only the sentences between them are written by hand.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from costmodel.architecture import Architecture
from costmodel.errors import NotApplicableError
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.methods import method_class
from costmodel.model import Model
from costmodel.operation import Operation
from costmodel.options import Options
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.units import format_bytes, format_seconds
from costmodel.workload import Workload
from reports.figures.style import GREY, house_style, new_figure, save_figure

ROOT = Path(__file__).resolve().parents[1]
PAGE, IMAGES = ROOT / "docs/worked_example.md", ROOT / "docs/img/worked"
NOTE = "<!-- Written by scripts/worked_example.py; edit the script instead. -->\n\n"
PROMPT, OUTPUT, GPU = 10_000, 256, "a100-sxm-80gb"
LEVELS = ("ideal", "reference")
METHODS = (
    *("full", "kivi:bits=4", "kivi:bits=2", "fp8_kv", "h2o", "streaming_llm", "snapkv", "quest"),
    *("infllm", "llmlingua2", "minference", "kv_offload"),
)
#: What a method does to a request, in a sentence.
WORDS = {
    "full": "Nothing is left out: the yardstick.",
    "kivi:bits=4": "Old keys and values become 4-bit codes with a scale and a zero point per group "
    "of 32; the newest 128 tokens stay in 16 bits.",
    "kivi:bits=2": "The same with 2 bits.",
    "fp8_kv": "One byte a number instead of two, and nothing else.",
    "h2o": "Keeps the tenth of the tokens with the largest summed attention and the newest tenth.",
    "streaming_llm": "Keeps four first tokens and the newest 1,020.",
    "snapkv": "Keeps what the last 32 queries of the prompt attended to, 2,048 tokens a layer.",
    "quest": "Keeps everything; each step reads summaries of all pages, then the best of them.",
    "infllm": "Keeps a window, and fetches blocks of the rest from host memory.",
    "llmlingua2": "A small model drops every second word of the prompt before the large one reads.",
    "minference": "Computes only a vertical and slash pattern of the prompt's attention.",
    "kv_offload": "The cache lives in host memory and is fetched layer by layer at every step.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """One method on one model: the row of each level."""

    spec: str
    rows: tuple[dict[str, Any], ...]

    def values(self, key: str) -> list[float]:
        """A number per level, unknown as 0."""
        return [float(row[key] or 0.0) for row in self.rows]


def walk(architecture: Architecture, spec: str, hardware: HardwareProfile) -> Walk:
    """Price the request at both levels; raises ``NotApplicableError``."""
    request = Workload.of(1, PROMPT, OUTPUT)
    priced = partial(predict, architecture, spec, request, hardware, solve=False)
    return Walk(spec=spec, rows=tuple(priced(level=level).rows()[0] for level in LEVELS))


def phases(architecture: Architecture, hardware: HardwareProfile) -> Iterator[str]:
    """What full attention multiplies and reads, by operation."""
    model = Model.of(architecture, "full", hardware, Options())
    for phase, operations in model.operations(1.0, float(PROMPT), float(OUTPUT)).items():
        title = "Prefill: 10,000 tokens at once" if phase == "prefill" else "Decode: one step"
        rows = [op for op in operations if _amount(op, "counted_flops") or _amount(op, "hbm_bytes")]
        flops = sum(_amount(op, "counted_flops") for op in rows)
        moved = sum(_amount(op, "hbm_bytes") for op in rows)
        yield f"**{title}, full attention**\n"
        yield from table(
            ("operation", "runs", "multiplied (FLOP)", "weights read", "state read or written"),
            [
                (
                    f"`{op.name}`",
                    f"{float(np.max(op.count)):,.0f}",
                    f"{_amount(op, 'counted_flops'):,.0f}",
                    f"{_amount(op, 'weight_bytes'):,.0f} B",
                    f"{_amount(op, 'state_bytes') + _amount(op, 'workspace_bytes'):,.0f} B",
                )
                for op in rows
            ],
        )
        yield f"Together {flops:,.0f} FLOP and {moved:,.0f} B, {flops / moved:,.1f} FLOP a byte.\n"


def _amount(op: Operation, name: str) -> float:
    return float(np.max(np.asarray(getattr(op, name)) * op.count))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A Markdown table and an empty line."""
    head = tuple(head)
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def section(found: Walk, full: Walk, image: str) -> Iterator[str]:
    """One method: numbers at both levels and the picture."""
    name = found.spec.partition(":")[0]
    cls = method_class(name)
    yield f"#### `{found.spec}`\n"
    yield f"{WORDS[found.spec]} State: `{cls.STATE_FORMULA}`.\n"
    exact = ("{:,.0f} B".format, "{:,.0f} FLOP".format)
    lines = (
        ("held on the GPU after the prompt", "state_bytes", exact[0]),
        ("held in host memory", "state_host_bytes", exact[0]),
        ("multiplied in prefill", "executed_prefill_flops", exact[1]),
        ("read and written in prefill", "prefill_hbm_bytes", exact[0]),
        ("multiplied in a decode step", "executed_decode_flops", exact[1]),
        ("read and written in a decode step", "decode_hbm_bytes", exact[0]),
        ("sent to or from the host in prefill", "prefill_link_bytes", exact[0]),
        ("sent to or from the host in a step", "decode_link_bytes", exact[0]),
        ("time to first token", "ttft_s", format_seconds),
        ("time per output token", "tpot_s", format_seconds),
    )
    rows = []
    for words, key, form in lines:
        values, base = found.values(key), full.values(key)
        if not any(values):
            continue
        shares = [v / b if b else None for v, b in zip(values, base, strict=True)]
        rows.append(
            (
                words,
                *(
                    form(v) + ("" if found is full or s is None else f" ({s:.3g} of full)")
                    for v, s in zip(values, shares, strict=True)
                ),
            )
        )
    yield from table(("", "fused (`ideal`)", "as published (`reference`)"), rows)
    drop = found.rows[0]["accuracy_drop_points"]
    if found is not full:
        known = "unknown here" if drop is None else f"{drop:g} points"
        yield f"Accuracy given up: {known}.\n"
    yield f"![{found.spec}: held, read, multiplied and sent](img/worked/{image})\n"


def picture(found: Walk, full: Walk, path: Path) -> None:
    """Held, read, multiplied, sent: full attention beside both levels of a method."""
    panels = (
        ("held (GB)", ("state_bytes", "state_host_bytes"), 1e9),
        ("read per step (GB)", ("decode_hbm_bytes",), 1e9),
        ("multiplied, prefill (TFLOP)", ("executed_prefill_flops",), 1e12),
        ("sent per step (GB)", ("decode_link_bytes",), 1e9),
    )
    both = found is not full
    names = ("full", *LEVELS) if both else ("full",)
    with house_style():
        figure, axes = new_figure((9.0, 1.75 if both else 1.15), ncols=4)
        for ax, (title, keys, unit) in zip(axes, panels, strict=True):
            parts = [[full.rows[0][k] or 0.0, *(found.values(k) if both else ())] for k in keys]
            totals = np.sum(parts, axis=0) / unit
            left = np.zeros(len(names))
            for k, values in zip(keys, parts, strict=True):
                width = np.array(values) / unit
                host = k == "state_host_bytes"
                ax.barh(
                    names, width, left=left, height=0.66, edgecolor="white",
                    color=["#BBBBBB", "#0072B2", "#D55E00"][: len(names)],
                    hatch="///" if host else None,
                )  # fmt: skip
                left += width
            for y, total in enumerate(totals):
                ax.annotate(f" {total:.3g}", (total, y), va="center", color=GREY, fontsize=8)
            ax.set_xlim(0, max(float(totals.max()), 1e-12) * 1.32)
            ax.set_title(title, fontsize=9)
            ax.invert_yaxis()
            ax.xaxis.set_visible(False)
            ax.grid(False)
            for side in ("top", "right", "bottom"):
                ax.spines[side].set_visible(False)
            ax.tick_params(axis="y", length=0, labelsize=8)
            if ax is not axes[0]:
                ax.set_yticklabels([])
        save_figure(figure, path, dpi=110.0)


def page() -> tuple[str, list[tuple[Walk, Walk, Path]]]:
    """The text, and what the pictures show."""
    from worked_claims import claims, shorthands

    hardware = load_hardware(GPU)
    lines = [
        f"{NOTE}# One request, walked through\n",
        f"A prompt of {PROMPT:,} tokens and {OUTPUT} output tokens, alone on one "
        f"{hardware.title}, 16-bit weights. Bytes and FLOPs are exact counts; times are "
        "predictions with kernels fitted on this GPU, and by a prior where a method runs kernels "
        "nobody tabulated. Grey bars are full attention, blue a fused implementation, orange the "
        "published one; hatched is in host memory. A step is the first one after the prompt.\n",
    ]
    pictures = []
    for name in ("llama-3-8b", "recurrentgemma-9b"):
        model = load_architecture(name)
        full = walk(model, "full", hardware)
        lines += [f"## {name}\n", *_facts(model, full), *phases(model, hardware)]
        lines.append("### Method by method\n")
        refused = []
        for spec in METHODS:
            try:
                found = full if spec == "full" else walk(model, spec, hardware)
            except NotApplicableError:
                refused.append(f"`{spec}`")
                continue
            image = f"{name}-{spec.replace(':', '-').replace('=', '')}.png"
            lines += section(found, full, image)
            pictures.append((found, full, IMAGES / image))
        if refused:
            lines.append(
                f"Not applicable, because no layer has a cache that grows without bound: "
                f"{', '.join(refused)}.\n"
            )
    lines += [*claims(), *shorthands(hardware)]
    return "\n".join(lines).rstrip() + "\n", pictures


def _facts(model: Architecture, full: Walk) -> Iterator[str]:
    row = full.rows[0]
    yield (
        f"{model.n_parameters:,} parameters in {model.n_layers} layers: "
        f"{row['weights_bytes']:,} B ({format_bytes(row['weights_bytes'])}) of weights. After the "
        f"prompt the state is {row['state_bytes']:,} B ({format_bytes(row['state_bytes'])}). First "
        f"token after {format_seconds(row['ttft_s'])} ({row['prefill_bound']}-bound), then one in "
        f"{format_seconds(row['tpot_s'])} ({row['decode_bound']}-bound).\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    text, pictures = page()
    if check:
        missing = [str(path) for _, _, path in pictures if not path.exists()]
        if missing or not PAGE.exists() or PAGE.read_text("utf-8") != text:
            print(f"out of date: {PAGE.relative_to(ROOT)}; run make docs", file=sys.stderr)
            return 1
        return 0
    IMAGES.mkdir(parents=True, exist_ok=True)
    for found, full, path in pictures:
        picture(found, full, path)
    PAGE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

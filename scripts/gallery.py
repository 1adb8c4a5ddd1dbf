"""Build docs/gallery/: one report per scenario, from commands that are shown and can be repeated.

    python scripts/gallery.py              all of them
    python scripts/gallery.py ONE ...      only these

Predictions are made anew; what a machine measured is read from measurements/.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lccost.joins import profiles_of
from reports import figures
from reports.comparison import Pair, compare
from reports.figures import save_figure
from reports.records import read_records

ROOT = Path(__file__).resolve().parents[1]
GALLERY, DRAFTS = Path("docs/gallery"), Path("out/gallery")
EVERY_METHOD = (
    "full,fp8_kv,kivi:bits=4,kivi:bits=2,flexgen,kvquant,gear,h2o,streaming_llm,infllm,snapkv,"
    "pyramidkv,tova,knorm,quest,minference,llmlingua2,kv_offload"
)
Draw = Callable[[Sequence[Pair], Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A question, the predictions or records that answer it, and the picture of the answer."""

    name: str
    title: str
    question: str
    predict: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    draw: Draw


def scenarios() -> list[Scenario]:
    """All scenarios; of measurements, one a machine that has records."""
    made = [
        Scenario(
            name="8b-at-128k",
            title="An 8B model at 128k tokens on an 80 GB GPU, all methods",
            question="Which method serves long prompts cheapest, and what does it give up?",
            predict=(
                *("--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--context", "128k"),
                *("--method", EVERY_METHOD, "--explain"),
            ),
            draw=lambda pairs, device: figures.memory(
                [p for p in pairs if p.key.text("level") == "ideal"], device
            ),
        ),
        Scenario(
            name="hybrid-at-1m",
            title="Transformer, hybrid and SSM up to 1M tokens",
            question="When does a model without a growing cache decode faster?",
            predict=(
                *("--model", "llama-3-8b-gradient-1048k,recurrentgemma-9b,falcon-mamba-7b"),
                *("--gpu", "b200-sxm", "--context", "8k,32k,64k,128k,256k,512k,1m"),
            ),
            draw=lambda pairs, _: figures.curve(pairs, "tpot_s"),
        ),
        Scenario(
            name="kv-quantisation",
            title="When does KV quantisation pay?",
            question="From which context on is a quantised cache faster than a 16-bit one?",
            predict=(
                *("--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--batch", "8"),
                *("--context", "1k,2k,4k,8k,16k,32k,64k"),
                *("--method", "full,fp8_kv,kivi:bits=4,kivi:bits=2"),
            ),
            draw=lambda pairs, _: figures.curve(pairs, "tpot_s"),
        ),
    ]
    for folder in sorted((ROOT / "measurements").glob("cpu-*")):
        place = folder.relative_to(ROOT)
        if (folder / "records.jsonl").exists():
            made.append(
                Scenario(
                    name=f"measured-{folder.name}",
                    title=f"What one machine measured ({folder.name})",
                    question="How far are predictions from what really ran?",
                    records=(str(place / "records.jsonl"),),
                    profiles=tuple(str(place / p.name) for p in sorted(folder.glob("*.toml"))),
                    draw=lambda pairs, device: figures.roofline(pairs, device),
                )
            )
    return made


def command(*arguments: str) -> str:
    """Run one lccost command in the repository and return how it is typed."""
    print(f"$ lccost {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "lccost", *arguments], cwd=ROOT, check=True)
    return f"lccost {shlex.join(arguments)}"


def build(scenario: Scenario) -> list[str]:
    """Make page, summary and picture; returns the commands."""
    typed = []
    records = scenario.records
    if scenario.predict:
        records = tuple(
            str(DRAFTS / f"{scenario.name}-{level}.json") for level in ("ideal", "reference")
        )
        typed = [
            command("predict", *scenario.predict, "--level", level, "--output", file)
            for level, file in zip(("ideal", "reference"), records, strict=True)
        ]
    profiles = [part for profile in scenario.profiles for part in ("--gpu", profile)]
    for ending in (".html", ".md"):
        output = str(GALLERY / f"{scenario.name}{ending}")
        typed.append(
            command("report", *records, *profiles, "--title", scenario.title, "--output", output)
        )
    read = read_records([ROOT / r for r in records])
    device = profiles_of(
        read.predictions + read.measurements, [str(ROOT / p) for p in scenario.profiles]
    )[0]
    picture = scenario.draw(compare(read).pairs, device)
    save_figure(picture, ROOT / GALLERY / f"{scenario.name}.png", dpi=110.0)
    return typed


def index(made: Sequence[Scenario]) -> str:
    """docs/gallery/README.md."""
    lines = [
        "<!-- Written by scripts/gallery.py; edit the script instead. -->\n\n# Gallery\n",
        "One report per scenario. Each has a summary (.md) and an interactive page (.html: "
        "download it, it opens from disk). `make gallery` builds them again and shows every "
        "command.\n",
    ]
    for s in made:
        lines.append(f"## {s.title}\n")
        lines.append(f"{s.question} [Summary]({s.name}.md), [page]({s.name}.html)\n")
        lines.append(f"![{s.title}]({s.name}.png)\n")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = scenarios()
    parser.add_argument("only", nargs="*", metavar="ONE", help=", ".join(s.name for s in every))
    only = parser.parse_args().only
    unknown = sorted(set(only) - {s.name for s in every})
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(s.name for s in every)}")
    for folder in (GALLERY, DRAFTS):
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
    for scenario in every:
        if not only or scenario.name in only:
            build(scenario)
    (ROOT / GALLERY / "README.md").write_text(index(every), "utf-8")


if __name__ == "__main__":
    main()

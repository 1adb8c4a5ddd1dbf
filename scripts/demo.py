"""The main job from end to end, on this machine: predict, calibrate, measure, compare, report.

    python scripts/demo.py --output out/demo

Every step is one lccost command and is printed before it runs, so that it can be repeated. About
two minutes on two CPU cores.
"""

import argparse
import shlex
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

#: A small decoder with grouped queries; its weights are random, its dimensions are real.
DEMO_MODEL = resources.files("measure").joinpath("data/demo-decoder.json")
ALL_METHODS = (
    "full,fp8_kv,kivi,kivi:bits=4,flexgen,kvquant,h2o,streaming_llm,infllm,snapkv,pyramidkv,"
    "tova,quest,minference,llmlingua2,kv_offload,llmlingua2:rate=0.5+kivi:bits=4"
)


def step(title: str, *arguments: str, save: Path | None = None) -> None:
    """Run one command, its table on the screen (and in a file)."""
    print(f"\n== {title}\n$ lccost {shlex.join(arguments)}", flush=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lccost", *arguments],
        stdout=subprocess.PIPE if save else None,
        text=True,
        check=False,
    )
    if save:
        print(done.stdout, end="")
        save.write_text(done.stdout, "utf-8")
    if done.returncode:
        sys.exit(f"this step failed with exit code {done.returncode}")
    print(f"   ({time.perf_counter() - start:.1f} s)", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    out = parser.parse_args().output
    out.mkdir(parents=True, exist_ok=True)
    profile, runs = out / "this-cpu.toml", out / "runs.jsonl"

    step(
        "1. What every method would cost: Llama-3.1-8B, one H100, 32k and 128k tokens",
        "predict", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--context", "32k,128k",
        "--method", ALL_METHODS,
        save=out / "predict.txt",
    )  # fmt: skip
    step(
        "2. What this CPU can do",
        "calibrate", "--device", "cpu", "--quick", "--output", str(profile),
    )  # fmt: skip
    step(
        "3. Run a small real decoder: full cache and KIVI-2 with packed integers",
        "measure", "--model", str(DEMO_MODEL), "--gpu", str(profile), "--method",
        "full,kivi:bits=2",
        "--context", "512,2k,8k", "--output-tokens", "16", "--output", str(runs),
    )  # fmt: skip
    step(
        "4. Predicted beside observed",
        "compare", str(runs), "--by", "method,context", "--gpu", str(profile),
        "--plot", str(out / "roofline.png"),
        save=out / "errors.txt",
    )  # fmt: skip
    step(
        "5. One page with everything",
        "report", str(runs), "--gpu", str(profile), "--output", str(out / "report.html"),
    )  # fmt: skip
    print(f"\npicture     {out / 'roofline.png'}\nreport      {out / 'report.html'}")
    for name, what in (
        ("errors.txt", "errors     "),
        ("predict.txt", "predictions"),
        ("runs.jsonl", "records    "),
        ("this-cpu.toml", "profile    "),
    ):
        print(f"{what} {out / name}")


if __name__ == "__main__":
    main()

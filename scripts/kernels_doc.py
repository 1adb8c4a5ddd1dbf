"""Write docs/kernels.md: what every kernel computes and moves, and what its blocks use.

    python scripts/kernels_doc.py            compile what changed, write the page
    python scripts/kernels_doc.py --all      compile everything again
    python scripts/kernels_doc.py --check    fail when a kernel changed since (nothing is compiled)

Compiling needs Triton and no GPU. Measured speeds are those of measurements/kernels/*.jsonl, which
benchmarks/kernels_gpu.py wrote (``scripts/gpu_run.sh kernels``); without records there is no table.
"""

import argparse
import ast
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from measure.kernels._compile import CompileCase, Resources

ROOT = Path(__file__).resolve().parents[1]
FOLDER, PAGE = ROOT / "measure" / "kernels", ROOT / "docs" / "kernels.md"
RECORDS = ROOT / "measurements" / "kernels"
HEAD = """<!-- Written by scripts/kernels_doc.py; edit the kernels instead. -->

# Kernels

Triton kernels of `measure/kernels/`, used by `--engine lccost` on a CUDA device. They are checked
against their references in Triton's interpreter and compiled in every test run, each for sm_80,
sm_90 and sm_100, further shapes and lesser launches for sm_90. The tables say what one block takes
(Triton 3.9.0 and the ptxas in its wheel). Instructions are those that a warp executes in one pass
of the hot loop, and of them those that access spilled registers; both are counted in the machine
code. Triton 3.6.0 compiles all cases too. Speeds need a device: `scripts/gpu_run.sh
kernels` measures them.

"""
COLUMNS = (
    "| case | target | threads | registers | shared bytes | blocks an SM's registers hold "
    "| spilled bytes | loop's instructions | of them spills |\n" + "|---" * 9 + "|\n"
)
SPEEDS = (
    "| device | case | form | context | batch | us | predicted us | TB/s | of copy | of ceiling |\n"
    + "|---" * 10
    + "|\n"
)


def names() -> list[str]:
    """Kernel files, without importing them."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem[0] != "_")


def digest(name: str) -> str:
    """12 hex digits of a kernel's source and of what it imports from the folder."""
    files, seen = [f"{name}.py"], {}
    for file in files:
        if file not in seen:
            seen[file] = (FOLDER / file).read_bytes()
            found = re.findall(rb"^from measure\.kernels\.(\w+) import", seen[file], flags=re.M)
            files += [f"{x.decode()}.py" for x in found]
    return hashlib.sha256(b"".join(seen[x] for x in sorted(seen))).hexdigest()[:12]


def row(case: "CompileCase", architecture: int, used: "Resources") -> str:
    """One line of a section's table."""
    return (
        f"| {case.name} | sm_{architecture} | {used.threads} | {used.registers} "
        f"| {used.shared_bytes:,} | {used.resident_blocks} | {used.spilled_bytes} "
        f"| {used.loop_instructions:,} | {used.loop_spills} |\n"
    )


def section(name: str) -> str:
    """Compile a kernel's cases; its section of the page."""
    from measure.kernels._compile import compile_case, compile_cases

    doc = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))) or ""
    rows = "".join(
        row(case, architecture, compile_case(case, architecture).resources)
        for case in compile_cases(name)
        for architecture in case.architectures
    )
    return f"## {name}\n\n<!-- {digest(name)} -->\n\n{doc}\n\n{COLUMNS}{rows}\n"


def measured() -> str:
    """The page's last section: steps as ``kernels_gpu.py`` timed them; "" without records."""
    rows = ""
    for path in sorted(RECORDS.glob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            r = json.loads(line)
            if r.get("status") != "ok" or "copy_bytes_per_s" not in r:  # of prompts
                continue
            shares = (r["bytes_per_s"] / r[f"{of}_bytes_per_s"] for of in ("copy", "ceiling"))
            rows += (
                f"| {r['device_name']} | {r['case']} | {r['form']} | {r['context_tokens']:,} "
                f"| {r['batch']} | {r['seconds'] * 1e6:,.1f} | {r['predicted_s'] * 1e6:,.1f} "
                f"| {r['bytes_per_s'] / 1e12:.2f} | {' | '.join(f'{x:.0%}' for x in shares)} |\n"
            )
    return f"## Measured\n\n{SPEEDS}{rows}\n" if rows else ""


def sections() -> dict[str, str]:
    """Sections of the page as it stands."""
    if not PAGE.exists():
        return {}
    parts = re.split(r"^(?=## )", PAGE.read_text("utf-8"), flags=re.M)[1:]
    return {part[3:].partition("\n")[0]: part for part in parts}


def stale() -> list[str]:
    """Kernels whose section is not of their present source, and sections without a kernel."""
    found = sections()
    current = {n for n in names() if f"<!-- {digest(n)} -->" in found.get(n, "")}
    speeds = found.pop("Measured", "")
    outdated = ["Measured"] if speeds.strip() != measured().strip() else []
    return sorted((set(names()) | set(found)) - current) + outdated


def write(outdated: list[str]) -> None:
    """Compile the outdated kernels and write the page."""
    found = sections()
    texts = [section(n) if n in outdated else found[n] for n in names()]
    PAGE.write_text(HEAD + ("".join(texts) + measured()).rstrip("\n") + "\n", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    if options.check:
        if stale():
            print(f"docs/kernels.md is out of date: {', '.join(stale())}", file=sys.stderr)
        return 1 if stale() else 0
    write(names() if options.all else stale())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The table of public traces in docs/planning.md: what holds, what binds, and which method helps.

    python scripts/plan_traces.py FOLDER            writes the table into docs/planning.md
    python scripts/plan_traces.py FOLDER --print    prints it

FOLDER holds mooncake_conversation.jsonl (github.com/kvcache-ai/Mooncake, FAST25-release/traces),
azure2023_conv.csv and azure2023_code.csv (github.com/Azure/AzurePublicDataset). Some minutes on two
cores.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from costmodel.planning.executors import open_executor
from costmodel.planning.plan import Plan, make_plan
from costmodel.planning.sentences import binding_sentences
from costmodel.planning.spec import plan_from_table

PAGE = Path(__file__).parents[1] / "docs/planning.md"
#: Around the table in the page.
BEGIN, END = "<!-- table of scripts/plan_traces.py -->", "<!-- end of table -->"
TRACES = {
    "Mooncake": ("mooncake_conversation.jsonl", {"ttft_p99_s": 30, "itl_p95_ms": 200}),
    "Azure conversation": ("azure2023_conv.csv", {"ttft_p99_s": 2, "itl_p95_ms": 100}),
    "Azure code": ("azure2023_code.csv", {"ttft_p99_s": 2, "itl_p95_ms": 100}),
}
MODELS = {
    "llama-3.1-8b": [1, 2],
    "llama-3.1-70b": [2, 4, 8],
    "qwen3-next-80b-a3b": [2, 4],
    "recurrentgemma-9b": [1, 2],
}
METHODS = ["full", "fp8_kv", "kivi", "snapkv:keep_tokens=4096", "minference", "llmlingua2"]
GPUS = ["h100-sxm", "h200-sxm", "a100-sxm-80gb", "l40s"]
#: Methods that shorten the prompt or attend only a part of it.
NOT_WHOLE = ("llmlingua2", "minference")


def plan(folder: Path, trace: str, slo: dict[str, float], model: str) -> Plan:
    table = {
        "workload": {"trace": str(folder / trace)},
        "slo": slo,
        "candidates": {
            "models": [model],
            "methods": METHODS,
            "gpus": GPUS,
            "tp": MODELS[model],
            "engines": ["vllm"],
            "max_gpus": 128,
        },
        "accuracy": {"allow_unknown": True},
    }
    spec = plan_from_table(table, trace, folder)
    requests = spec.demand.requests()
    with open_executor("local", spec, requests, 2) as executor:
        return make_plan(
            spec, requests, executor, lambda title, n: lambda text: None, details=False
        )


def fleet(row: dict[str, Any]) -> str:
    split = f" ({row['replicas']} x TP{row['tp']})" if row["tp"] > 1 else ""
    return f"{row['gpus']} x {row['gpu']}{split}, {row['usd_per_hour']:.2f}"


def first(rows: list[dict[str, Any]], keep: Any) -> str:
    row = next((r for r in rows if keep(r)), None)
    return "none" if row is None else f"{row['method']}: {fleet(row)}"


def numbers(row: dict[str, Any]) -> list[str]:
    b = row["binding"]
    return [f"{b[key]:.3g}" for key in ("prefill_s", "decode_s", "kv_pool_s")]


def lines(folder: Path) -> Iterator[str]:
    yield (
        "| trace | model | without a method: GPUs, USD/h | closed form | prefill s | decode s | "
        "KV pool s | binds | best method that keeps the whole prompt | best of all |"
    )
    yield "|---|---|---|---:|---:|---:|---:|---|---|---|"
    for trace, (file, slo) in TRACES.items():
        for model in MODELS:
            made = plan(folder, file, slo, model)
            rows = list(made.feasible)
            plain = next((r for r in rows if r["method"] == "full"), None)
            cells = [trace, model]
            if plain is None:
                cells += ["none", *["-"] * 5]
            else:
                cells += [
                    fleet(plain),
                    f"{plain['bound_replicas']} of {plain['replicas']}",
                    *numbers(plain),
                    str(plain["binds"]),
                ]
            whole = first(rows, lambda r: r["method"] != "full" and r["method"] not in NOT_WHOLE)
            cells += [whole, first(rows, lambda r: True)]
            yield "| " + " | ".join(cells) + " |"
            for sentence in binding_sentences(made.rows):
                print(f"  {model} on {trace}: {sentence}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--print", action="store_true")
    options = parser.parse_args()
    start = time.perf_counter()
    table = "\n".join(lines(options.folder)) + "\n"
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if options.print:
        print(table)
        return
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE}: expected {BEGIN} and {END}")
    PAGE.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

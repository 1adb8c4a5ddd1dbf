"""The table of public traces in docs/planning.md: what holds, what binds, and which method helps.

    python scripts/plan_traces.py FOLDER

FOLDER holds mooncake_conversation.jsonl (github.com/kvcache-ai/Mooncake, FAST25-release/traces),
azure2023_conv.csv and azure2023_code.csv (github.com/Azure/AzurePublicDataset). Some minutes on two
cores.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from costmodel.planning.executors import open_executor
from costmodel.planning.plan import Plan, make_plan
from costmodel.planning.sentences import binding_sentences
from costmodel.planning.spec import plan_from_table

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(
        "| trace | model | without a method: GPUs, USD/h | closed form | binds | "
        "best that keeps the whole prompt | best of all |"
    )
    print("|---|---|---|---:|---|---|---|")
    for trace, (file, slo) in TRACES.items():
        for model in MODELS:
            made = plan(folder, file, slo, model)
            rows = list(made.feasible)
            plain = next((r for r in rows if r["method"] == "full"), None)
            cells = [trace, model]
            if plain is None:
                cells += ["none", "-", "-"]
            else:
                cells += [
                    fleet(plain),
                    f"{plain['bound_replicas']} of {plain['replicas']}",
                    str(plain["binds"]),
                ]
            whole = first(rows, lambda r: r["method"] != "full" and r["method"] not in NOT_WHOLE)
            cells += [whole, first(rows, lambda r: True)]
            print("| " + " | ".join(cells) + " |", flush=True)
            for sentence in binding_sentences(made.rows):
                print(f"  {model} on {trace}: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    main()

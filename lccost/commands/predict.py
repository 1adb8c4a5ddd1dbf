"""``lccost predict``."""

from pathlib import Path
from typing import Any

import click

from lccost import __version__
from lccost.commands.common import (
    EXIT_INFEASIBLE,
    EXIT_USAGE,
    CommaList,
    CommandError,
    Count,
    CountList,
    emit,
    flatten,
    handle_errors,
    to_csv,
    to_json,
    to_jsonl,
)

FORMATS = ("table", "json", "jsonl", "csv", "md")


def _choice(*values: str) -> "click.Choice[str]":
    return click.Choice(values, case_sensitive=False)


EXAMPLES = """
\b
Examples:
  lccost predict --model llama-3.1-8b --gpu h100-sxm --context 128k --method full,kivi,fp8_kv
  lccost predict --model recurrentgemma-9b,gemma-2-9b --gpu l4 --context 8k,1m --format json
  lccost predict --model ./config.json --gpu my-gpu.toml --context 32k --solve max-batch
"""


@click.command(epilog=EXAMPLES)
@click.option(
    "--model",
    "models",
    type=CommaList(),
    multiple=True,
    required=True,
    help="Bundled name, hub id, config.json or its folder; repeats.",
)
@click.option(
    "--gpu",
    "gpus",
    type=CommaList(),
    multiple=True,
    required=True,
    help="Profile name or a .toml of your own; repeats.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=("full",),
    show_default=True,
    help="name[:k=v,...], composed with +; repeats and takes comma lists.",
)
@click.option(
    "--context",
    "contexts",
    type=CountList(),
    multiple=True,
    required=True,
    help="Prompt tokens: 4096, 8k, 1m; repeats.",
)
@click.option(
    "--batch",
    "batches",
    type=CountList(),
    multiple=True,
    default=((1,),),
    show_default="1",
    help="Sequences served together; repeats.",
)
@click.option(
    "--output-tokens",
    type=Count(),
    default=256,
    show_default=True,
    help="Tokens generated per sequence.",
)
@click.option(
    "--dtype",
    type=_choice("bf16", "fp16", "fp32"),
    default=None,
    help="Compute and cache type [default: the checkpoint's].",
)
@click.option(
    "--weight-dtype",
    default="checkpoint",
    show_default=True,
    help="checkpoint, bf16, fp16, fp8, int8, int4, mxfp4 or nvfp4.",
)
@click.option(
    "--level",
    type=_choice("ideal", "reference"),
    default="ideal",
    show_default=True,
    help="One fused pass, or what the published code runs.",
)
@click.option(
    "--tp", type=click.IntRange(1, 1024), default=1, show_default=True, help="Tensor-parallel GPUs."
)
@click.option(
    "--engine",
    default=None,
    help="Who executes: its rules, and the kernels fitted for it or the nearest ones "
    "[default: vllm for ideal, transformers for reference, torch on a CPU].",
)
@click.option(
    "--memory-fraction",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    show_default=True,
    help="Share of GPU memory that may be used.",
)
@click.option(
    "--solve",
    type=_choice("max-batch", "max-context", "min-gpus"),
    default=None,
    help="Print this answer first.",
)
@click.option(
    "--assume",
    default=None,
    metavar="FAMILY",
    help="Read an unknown model_type as this family; the result says so.",
)
@click.option("--explain", is_flag=True, help="Print every formula with its numbers.")
@click.option(
    "--format",
    "form",
    type=_choice(*FORMATS),
    default=None,
    help="[default: table, or the output file's ending]",
)
@click.option("--output", type=click.Path(path_type=Path), default=None, help="File to write.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    default=None,
    help="Roofline picture to write (.png, .svg, .pdf).",
)
@handle_errors
def predict(
    models: tuple[tuple[str, ...], ...],
    gpus: tuple[tuple[str, ...], ...],
    methods: tuple[str, ...],
    contexts: tuple[tuple[int, ...], ...],
    batches: tuple[tuple[int, ...], ...],
    output_tokens: int,
    dtype: str | None,
    weight_dtype: str,
    level: str,
    tp: int,
    engine: str | None,
    memory_fraction: float,
    solve: str | None,
    assume: str | None,
    explain: bool,
    form: str | None,
    output: Path | None,
    plot: Path | None,
) -> None:
    """What methods cost on a model and a GPU.

    Memory, traffic, FLOPs, time, energy and money of prefill and of one decode step, for every
    combination of the repeated options.
    """
    from lccost import sweep

    form = form or _format_of(output)
    if explain and form in ("jsonl", "csv"):
        raise CommandError(f"--explain goes with table, md or json, not {form}", EXIT_USAGE)
    run = sweep.Sweep.of(
        models=flatten(models),
        gpus=flatten(gpus),
        methods=methods,
        contexts=flatten(contexts),
        batches=flatten(batches),
        output_tokens=output_tokens,
        options={
            "dtype": dtype,
            "weight_dtype": weight_dtype.strip().lower(),
            "level": level,
            "tp": tp,
            "engine": engine,
            "memory_fraction": memory_fraction,
        },
        assume=assume,
    )
    rows = run.rows()
    assumptions = sweep.assumptions(rows, run)
    inputs: dict[str, Any] = run.inputs()
    if solve:
        inputs["solve"] = solve
    if form in ("table", "md"):
        from lccost import show

        text = show.predictions(rows, run, assumptions, markdown=form == "md", solve=solve)
        if explain:
            text += show.explanations(run)
    elif form == "json":
        document = {
            "schema_version": sweep.SCHEMA_VERSION,
            "lccost_version": __version__,
            "command": "predict",
            "inputs": inputs,
            "assumptions": assumptions,
            "results": rows,
        }
        if explain:
            from lccost.explain import explain as explanations

            document["explanations"] = explanations(run)
        text = to_json(document)
    elif form == "jsonl":
        text = to_jsonl(rows)
    else:
        text = to_csv(rows)
    if plot is not None:
        sweep.plot(rows, run, plot)
    emit(text, output)
    if solve and not any(sweep.solvable(r, solve) for r in rows if r["applicable"]):
        raise CommandError(_nothing_fits(solve, rows), EXIT_INFEASIBLE)


_ENDINGS = {
    "": "table", ".txt": "table", ".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".md": "md",
}  # fmt: skip


def _format_of(output: Path | None) -> str:
    if output is None:
        return "table"
    ending = output.suffix.lower()
    if ending not in _ENDINGS:
        raise CommandError(
            f"{output}: expected an ending of {', '.join(filter(None, _ENDINGS))}, or --format; "
            "pages and spreadsheets: lccost report",
            EXIT_USAGE,
        )
    return _ENDINGS[ending]


def _nothing_fits(solve: str, rows: list[dict[str, Any]]) -> str:
    from costmodel.units import format_bytes

    shown = [r for r in rows if r["applicable"]]
    if not shown:
        return f"{solve}: nothing applies. {rows[0]['reason']}"
    row = min(shown, key=lambda r: max(r["peak_prefill_bytes"], r["peak_decode_bytes"]))

    need = format_bytes(max(row["peak_prefill_bytes"], row["peak_decode_bytes"]))
    return (
        f"{solve}: nothing fits. The smallest combination ({row['model']}, {row['method_spec']}, "
        f"context {row['context_tokens']:,}, batch {row['batch']}) needs {need} per GPU on "
        f"{row['gpu']}. Try --tp, --weight-dtype int4, a larger GPU or a smaller context."
    )

"""``lccost measure``."""

from pathlib import Path

import click

from lccost.commands.common import (
    EXIT_MISSING,
    EXIT_RUN_FAILED,
    EXIT_USAGE,
    CommaList,
    CommandError,
    Count,
    CountList,
    FiniteRange,
    flatten,
    handle_errors,
)

EXAMPLES = """
\b
Examples:
  lccost measure --model llama-3.2-1b --layers 2 --method full,kivi --context 1k --output runs.jsonl
  lccost measure --model ./config.json --gpu this-cpu.toml --context 2k --output runs.jsonl --resume
  lccost compare runs.jsonl
"""


@click.command(epilog=EXAMPLES)
@click.option(
    "--model",
    "models",
    type=CommaList(),
    multiple=True,
    required=True,
    help="Bundled name or config.json; repeats.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=("full",),
    show_default=True,
    help="name[:k=v,...]; repeats and takes comma lists.",
)
@click.option(
    "--context",
    "contexts",
    type=CountList(),
    multiple=True,
    required=True,
    help="Prompt tokens; the timed step reads as many cached tokens; repeats.",
)
@click.option(
    "--batch",
    "batches",
    type=CountList(),
    multiple=True,
    default=((1,),),
    show_default="1",
    help="Sequences; repeats.",
)
@click.option(
    "--layers",
    type=click.IntRange(1),
    default=None,
    help="Run only the first so many layers; records say so.",
)
@click.option(
    "--output-tokens",
    type=Count(),
    default=32,
    show_default=True,
    help="Room for generated tokens.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda:0.")
@click.option(
    "--engine",
    type=click.Choice(("torch", "lccost", "transformers")),
    default="torch",
    show_default=True,
)
@click.option(
    "--realisation",
    type=click.Choice(("reference", "best")),
    default=None,
    help="Form that runs: the published operations, or the fastest here.  "
    "[default: best; reference with --engine transformers]",
)
@click.option(
    "--dtype",
    type=click.Choice(("bf16", "fp16", "fp32")),
    default=None,
    help="[default: the checkpoint's]",
)
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads."
)
@click.option(
    "--gpu",
    default=None,
    metavar="PROFILE",
    help="Profile that predicts the points (a calibration of this device).",
)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Records, one JSON line each."
)
@click.option("--resume", is_flag=True, help="Keep the file; run only what is not finished.")
@click.option(
    "--timeout",
    type=FiniteRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds a point may take.",
)
@click.option(
    "--tp",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that share the model, one GPU each (Gloo on a CPU).",
)
@click.option(
    "--executor",
    default="local",
    show_default=True,
    metavar="local|ray|ray://HOST:PORT",
    help="One point after another here, or on the nodes of a Ray cluster.",
)
@click.option(
    "--weights",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=None,
    metavar="FOLDER",
    help="Local checkpoint (safetensors) instead of random weights.",
)
@click.option(
    "--encoder",
    default=None,
    metavar="FOLDER|llmlingua:FOLDER",
    help="Local encoder of llmlingua2 (XLM-RoBERTa, safetensors), or the package llmlingua with "
    "it.  [default: true size, random weights]",
)
@click.option(
    "--weight-dtype",
    type=click.Choice(("checkpoint", "bf16", "fp16", "int8", "int4")),
    default="checkpoint",
    show_default=True,
    help="How matrices are held: int8 per channel, int4 in groups of 128.",
)
@click.option(
    "--energy",
    type=FiniteRange(0),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="Window of the energy reading, where the device has a counter; 0: none.",
)
@click.option(
    "--seconds",
    type=FiniteRange(0, min_open=True),
    default=3.0,
    show_default=True,
    help="Most seconds of samples per phase.",
)
@click.option(
    "--max-prefill",
    type=FiniteRange(0),
    default=None,
    metavar="SECONDS",
    help="Longer prompts (as --gpu predicts) are not run: caches hold random tokens, TTFT is null.",
)
@click.option(
    "--retries",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="How often a noisy point is run again.",
)
@click.option(
    "--isolation",
    type=click.Choice(("point", "model")),
    default="point",
    show_default=True,
    help="A process for every point, or one for a model's points until one fails.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--force", is_flag=True, help="Also start points that are predicted not to fit.")
@handle_errors
def measure(
    models: tuple[tuple[str, ...], ...],
    methods: tuple[str, ...],
    contexts: tuple[tuple[int, ...], ...],
    batches: tuple[tuple[int, ...], ...],
    layers: int | None,
    output_tokens: int,
    device: str,
    engine: str,
    realisation: str | None,
    dtype: str | None,
    threads: int,
    gpu: str | None,
    output: Path,
    resume: bool,
    timeout: float,
    tp: int,
    executor: str,
    weights: Path | None,
    encoder: str | None,
    weight_dtype: str,
    energy: float,
    seconds: float,
    max_prefill: float | None,
    retries: int,
    isolation: str,
    seed: int,
    force: bool,
) -> None:
    """Run the actual methods on this machine and record what happens.

    Every point runs in a process of its own: running out of memory, a crash or a hang becomes a
    row, and the sweep goes on. Each record carries its own prediction.
    """
    from lccost.measuring import Request, run
    from measure.observation_options import How
    from measure.runner import Rules
    from measure.timing import Budget

    rules = Rules(
        timeout_s=timeout,
        force=force,
        retries=retries,
        isolation=isolation,  # type: ignore[arg-type]
        how=How(
            budget=Budget(seconds=seconds, warmup_seconds=min(1.0, seconds)),
            max_prefill_s=max_prefill,
            energy_s=energy,
        ),
    )
    records = run(
        Request(
            models=tuple(flatten(models)),
            methods=methods,
            contexts=tuple(flatten(contexts)),
            batches=tuple(flatten(batches)),
            layers=layers,
            output_tokens=output_tokens,
            device=device,
            engine=engine,
            realisation=realisation,
            dtype=dtype,
            threads=threads,
            gpu=gpu,
            seed=seed,
            tp=tp,
            weights=None if weights is None else str(weights),
            weight_dtype=weight_dtype,
            encoder=encoder,
        ),
        output=output,
        resume=resume,
        rules=rules,
        executor=executor,
    )
    results = ("ok", "noisy", "skipped_oom_predicted")
    possible = [r for r in records if r["status"] != "not_applicable"]
    failed = [r for r in possible if r["status"] not in results]
    click.echo(f"{len(records)} records in {output}; next: lccost compare {output}", err=True)
    if not possible:
        raise CommandError(records[0]["message"], EXIT_USAGE)
    if failed and len(failed) == len(possible):
        raise CommandError(
            f"no point was measured; the first: {failed[0]['status']}: {failed[0]['message']}",
            EXIT_MISSING if failed[0].get("is_missing") else EXIT_RUN_FAILED,
        )

"""``lccost plan``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lccost import __version__
from lccost.commands.common import (
    EXIT_INFEASIBLE,
    EXIT_USAGE,
    CommaList,
    CommandError,
    emit,
    flatten,
    handle_errors,
    to_csv,
    to_json,
    write_atomic,
)

EXAMPLES = """
\b
Examples:
  lccost init && lccost plan plan.toml
  lccost plan plan.toml --gpu h100-sxm,l40s --method full,kivi --slo ttft_p99_s=30
  lccost plan --rate 4 --input-tokens 12000 --output-tokens 350 --model llama-3.1-8b \\
      --gpu h100-sxm --slo ttft_p99_s=10
  lccost plan plan.toml --output plan.json && lccost plan plan.json --set candidates.max_gpus=16
"""

#: option -> keys of the plan file that go with that kind of demand alone
_DEMANDS = {
    "trace": ("trace",),
    "rate": ("rate_per_s",),
    "concurrency": ("concurrency",),
    "users": ("users", "active_fraction", "requests_per_minute", "peak_factor"),
}
#: ending of the output file -> function that makes it
_PAGES = {".html": "html", ".xlsx": "xlsx"}
#: ending of the output file -> format of the text in it
_TEXTS = {".json": "json", ".csv": "csv", ".md": "md", ".txt": "table"}

#: option -> key of the plan file
_KEYS = {
    "trace": "workload.trace",
    "rate": "workload.rate_per_s",
    "concurrency": "workload.concurrency",
    "users": "workload.users",
    "scale": "workload.scale",
    "growth": "workload.growth",
    "arrivals": "workload.arrivals",
    "prefix_cache": "workload.prefix_cache",
    "requests": "workload.requests",
    "seed": "workload.seed",
    "max_gpus": "candidates.max_gpus",
    "memory_fraction": "candidates.memory_fraction",
    "max_drop_points": "accuracy.max_drop_points",
    "task_family": "accuracy.task_family",
    "prices": "prices.file",
}


@click.command(epilog=EXAMPLES)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--trace", default=None, help="Trace file (Mooncake, Azure, BurstGPT or own csv).")
@click.option("--rate", type=float, default=None, help="Requests per second instead of a trace.")
@click.option(
    "--concurrency", type=int, default=None, help="Sessions that always have a request open."
)
@click.option(
    "--users", type=float, default=None, help="Users; see requests_per_minute in the plan file."
)
@click.option("--input-tokens", default=None, help="Tokens, a CDF file, or a TOML distribution.")
@click.option("--output-tokens", default=None, help="The same for answers.")
@click.option("--scale", type=float, default=None, help="Multiply the rate.")
@click.option("--growth", type=float, default=None, help="Multiply it again, for the load to come.")
@click.option("--arrivals", default=None, help="trace, poisson or gamma:CV.")
@click.option("--prefix-cache", default=None, help="off, ideal or hit=SHARE.")
@click.option("--requests", type=int, default=None, help="Requests to draw when there is no trace.")
@click.option("--seed", type=int, default=None, help="Of everything that is drawn.")
@click.option(
    "--slo",
    "slos",
    multiple=True,
    metavar="KEY=VALUE",
    help="ttft_p99_s=30, itl_p95_ms=200, attainment=0.99, ...; repeats.",
)
@click.option("--model", "models", type=CommaList(), multiple=True, help="Repeats.")
@click.option("--gpu", "gpus", type=CommaList(), multiple=True, help="Repeats.")
@click.option("--method", "methods", multiple=True, help="name[:k=v,...]; repeats, comma lists.")
@click.option("--level", "levels", type=CommaList(), multiple=True, help="ideal, reference.")
@click.option("--engine", "engines", type=CommaList(), multiple=True, help="Repeats.")
@click.option("--tp", type=CommaList(), multiple=True, help="Tensor-parallel degrees.")
@click.option("--pp", type=CommaList(), multiple=True, help="Pipeline stages.")
@click.option("--ep", type=CommaList(), multiple=True, help="Expert-parallel ranks.")
@click.option("--cp", type=CommaList(), multiple=True, help="Context-parallel ranks.")
@click.option("--max-gpus", type=int, default=None, help="Most GPUs of one plan.")
@click.option("--memory-fraction", type=float, default=None, help="Share of GPU memory to use.")
@click.option("--max-drop-points", type=float, default=None, help="Largest accuracy drop allowed.")
@click.option("--task-family", default=None, help="Which evidence counts (retrieval, qa, ...).")
@click.option("--allow-unknown-accuracy", is_flag=True, help="Rank methods without evidence too.")
@click.option("--allow-analogy", is_flag=True, help="Take evidence from a model like it.")
@click.option("--prices", default=None, help="A dated price file of your own.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Any key of the plan file; repeats.",
)
@click.option("--validate-only", is_flag=True, help="Check the input, print the grid, stop.")
@click.option("--no-prune", is_flag=True, help="Simulate candidates that cannot win too.")
@click.option("--no-details", is_flag=True, help="Skip headroom, sensitivities and the rate curve.")
@click.option(
    "--executor", default="local", show_default=True, help="local, ray or ray://HOST:PORT."
)
@click.option(
    "--workers",
    type=click.IntRange(1, 4096),
    default=None,
    help="Local processes [default: one per core].",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(("table", "json", "csv", "md")),
    default=None,
    help="Of the text [default: table, or the output file's ending].",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="File to write: .json .csv .md .txt; .html or .xlsx beside the text.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@handle_errors
def plan(file: Path | None, **options: Any) -> None:
    """How many of which GPUs, with which method, at what cost and accuracy.

    FILE is a plan.toml (make one with `lccost init`) or the JSON of an earlier plan. Every key can
    also be given as an option, which goes before the file.
    """
    from costmodel.planning.executors import open_executor
    from costmodel.planning.plan import make_plan
    from lccost import plans

    spec = read_spec(file, options)
    form = _form(options["form"], options["output"])
    requests = spec.demand.requests()
    if options["validate_only"]:
        emit(plans.validated(spec, requests), None)
        return
    with (
        open_executor(options["executor"], spec, requests, options["workers"]) as executor,
        plans.progress(options["quiet"]) as report,
    ):
        found = make_plan(
            spec, requests, executor, report,
            prune=not options["no_prune"], details=not options["no_details"],
        )  # fmt: skip
    output = options["output"]
    if output is not None and output.suffix.lower() in _PAGES:
        from reports import plan_page

        document = plans.document(found, __version__)
        write_atomic(output, getattr(plan_page, _PAGES[output.suffix.lower()])(document))
        output = None
    if form == "json":
        emit(to_json(plans.document(found, __version__)), output)
    elif form == "csv":
        emit(to_csv(found.rows), output)
    else:
        emit(plans.text(found, markdown=form == "md"), output)
    if not found.feasible:
        raise CommandError(plans.nothing(found), EXIT_INFEASIBLE)


def read_spec(file: Path | None, options: dict[str, Any]) -> Any:
    """The plan file, the options laid over it, checked together."""
    from costmodel.planning.spec import parse_override, plan_from_table, read_plan

    overrides: list[tuple[str, Any]] = [(f"workload.{key}", None) for key in _replaced(options)]
    overrides += [(key, options[name]) for name, key in _KEYS.items() if options[name] is not None]
    for key in ("input_tokens", "output_tokens"):
        if options[key] is not None:
            overrides.append(parse_override(f"workload.{key}={options[key]}"))
    for name, key in (("models", "models"), ("gpus", "gpus"), ("levels", "levels"),
                      ("engines", "engines")):  # fmt: skip
        if options[name]:
            overrides.append((f"candidates.{key}", flatten(options[name])))
    if options["methods"]:
        overrides.append(("candidates.methods", list(options["methods"])))
    for name in ("tp", "pp", "ep", "cp"):
        if options[name]:
            degrees = [_whole(name, x) for x in flatten(options[name])]
            overrides.append((f"candidates.{name}", degrees))
    for name, key in (("allow_unknown_accuracy", "allow_unknown"), ("allow_analogy",) * 2):
        if options[name]:
            overrides.append((f"accuracy.{key}", True))
    overrides += [parse_override(f"slo.{text}") for text in options["slos"]]
    overrides += [parse_override(text) for text in options["settings"]]
    if file is not None and file.suffix.lower() == ".json":
        table, folder = _from_result(file)
        _lay_over(table, overrides)
        own = not any(key.startswith("workload.") for key, _ in overrides)
        return replace(plan_from_table(table, str(file), folder), own_workload=own)
    return read_plan(file, overrides)


def read_plan_file(file: Path) -> Any:
    """A plan file or the JSON of an earlier plan, as it stands."""
    from costmodel.planning.spec import plan_from_table, read_plan

    if file.suffix.lower() == ".json":
        table, folder = _from_result(file)
        return plan_from_table(table, str(file), folder)
    return read_plan(file)


def _replaced(options: dict[str, Any]) -> list[str]:
    """Keys of the file's own demand, where the options name another one."""
    if not any(options[name] is not None for name in _DEMANDS):
        return []
    gone = [key for keys in _DEMANDS.values() for key in keys]
    if options["trace"] is not None:
        gone += ["input_tokens", "output_tokens", "requests", "arrivals"]
    if options["concurrency"] is not None:
        gone.append("arrivals")
    return gone


def _lay_over(table: dict[str, Any], overrides: list[tuple[str, Any]]) -> None:
    for key, value in overrides:
        section, _, name = key.partition(".")
        rows = table.setdefault(section, {})
        if value is None:
            rows.pop(name, None)
        else:
            rows[name] = value


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise CommandError(f"--{name}: expected whole numbers, got {text!r}", EXIT_USAGE) from None


def _from_result(file: Path) -> tuple[dict[str, Any], Path]:
    """The plan inside an earlier result."""
    try:
        document = json.loads(file.read_text("utf-8"))
        inputs = document["inputs"]
        table, folder = inputs["plan"], Path(inputs["folder"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CommandError(
            f"{file}: expected the JSON that `lccost plan --output result.json` writes", EXIT_USAGE
        ) from None
    if not isinstance(table, dict):
        raise CommandError(f"{file}: expected inputs.plan to be a table", EXIT_USAGE)
    return {k: dict(v) if isinstance(v, dict) else v for k, v in table.items()}, folder


def _form(form: str | None, output: Path | None) -> str:
    """Of the text. A page or workbook is written beside it, so there the text goes to stdout."""
    if output is None:
        return form or "table"
    ending = output.suffix.lower()
    if ending not in (*_TEXTS, *_PAGES):
        raise CommandError(
            f"--output {output}: expected a file that ends in {', '.join((*_TEXTS, *_PAGES))}",
            EXIT_USAGE,
        )
    if not output.absolute().parent.is_dir():
        raise CommandError(f"--output {output}: there is no such folder", EXIT_USAGE)
    own = _TEXTS.get(ending)
    if form is not None and own is not None and form != own:
        raise CommandError(
            f"--format {form} and --output {output} do not agree: name a file that ends in "
            f"{next(e for e, f in _TEXTS.items() if f == form)}, or leave --format out",
            EXIT_USAGE,
        )
    return form or own or "table"

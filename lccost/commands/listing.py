"""``lccost methods | models | gpus``: list what there is, or show one."""

from typing import Any

import click

from lccost.commands.common import CountList, emit, handle_errors, to_json

FORMAT = click.option(
    "--format", "form", type=click.Choice(("table", "json")), default="table", show_default=True
)


@click.group()
def methods() -> None:
    """The long-context methods lccost prices.

    \b
    Examples:
      lccost methods list
      lccost methods show kivi
      lccost methods show h2o --model gemma-2-9b --context 32k
    """


@methods.command("list")
@FORMAT
@handle_errors
def methods_list(form: str) -> None:
    """Every method: what it is, when it acts, its parameters.

    \b
    Example:
      lccost methods list --format json
    """
    from lccost import method_catalogue as catalogue

    rows = catalogue.method_rows()
    _print("methods", rows, form, catalogue.METHOD_COLUMNS)


@methods.command("show")
@click.argument("spec", metavar="NAME")
@click.option("--model", default="llama-3.1-8b", show_default=True, help="Model for the numbers.")
@click.option(
    "--context", type=CountList(), default="32k", show_default=True, help="Context for the numbers."
)
@FORMAT
@handle_errors
def methods_show(spec: str, model: str, context: tuple[int, ...], form: str) -> None:
    """Formula with the numbers put in, parameters, evidence, and what it does not save.

    \b
    Example:
      lccost methods show kivi:bits=4 --model llama-3.1-70b --context 128k
    """
    from lccost import method_catalogue as catalogue

    shown = catalogue.method_details(spec, model, context[0])
    if form == "json":
        emit(to_json(_document("methods show", [shown])), None)
    else:
        emit(catalogue.method_text(shown), None)


@click.group()
def models() -> None:
    """The models that come with lccost; any config.json works by path.

    \b
    Examples:
      lccost models list
      lccost models show qwen3-next-80b-a3b
    """


@models.command("list")
@FORMAT
@handle_errors
def models_list(form: str) -> None:
    """Every bundled model: parameters, layers, cache per token, fixed state.

    \b
    Example:
      lccost models list --format json
    """
    from lccost import model_catalogue as catalogue

    _print("models", catalogue.model_rows(), form, catalogue.MODEL_COLUMNS)


@models.command("show")
@click.argument("name")
@click.option("--assume", default=None, metavar="FAMILY", help="Read it as this family.")
@FORMAT
@handle_errors
def models_show(name: str, assume: str | None, form: str) -> None:
    """One model, layer kind by layer kind, with its source.

    \b
    Example:
      lccost models show ./config.json
    """
    from lccost import model_catalogue as catalogue

    shown = catalogue.model_details(name, assume)
    if form == "json":
        emit(to_json(_document("models show", [shown])), None)
    else:
        emit(catalogue.model_text(shown), None)


@click.group()
def gpus() -> None:
    """The GPU profiles that come with lccost; your own .toml works by path.

    \b
    Examples:
      lccost gpus list
      lccost gpus show h100-sxm
    """


@gpus.command("list")
@FORMAT
@handle_errors
def gpus_list(form: str) -> None:
    """Every profile: peaks, bandwidth, memory as the driver reports it, price.

    \b
    Example:
      lccost gpus list --format json
    """
    from lccost import gpu_catalogue as catalogue

    _print("gpus", catalogue.gpu_rows(), form, catalogue.GPU_COLUMNS)


@gpus.command("show")
@click.argument("name")
@FORMAT
@handle_errors
def gpus_show(name: str, form: str) -> None:
    """One profile, every number with its source and how sure it is.

    \b
    Example:
      lccost gpus show h200-sxm --format json
    """
    from lccost import gpu_catalogue as catalogue

    shown = catalogue.gpu_details(name)
    if form == "json":
        emit(to_json(_document("gpus show", [shown])), None)
    else:
        emit(catalogue.gpu_text(shown), None)


def _document(command: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    from costmodel.results import document
    from lccost import __version__

    return document(command, {}, [], results, __version__)


def _print(
    command: str, rows: list[dict[str, Any]], form: str, columns: dict[str, tuple[str, Any]]
) -> None:
    from lccost.catalogue_table import table

    if form == "json":
        emit(to_json(_document(f"{command} list", rows)), None)
    else:
        emit(table(rows, columns), None)

"""The command group. Commands live in ``lccost.commands`` and are imported when they are called, so
that ``--help`` starts without numpy and ``predict`` without torch, scipy or matplotlib.
"""

import importlib
from typing import Any

import click

from lccost import __version__

#: command -> (module and attribute, one line for the list of commands)
COMMANDS: dict[str, tuple[str, str]] = {
    "predict": (
        "predict:predict",
        "What a method costs on a model and a GPU: memory, time, money.",
    ),
    "measure": (
        "measure:measure",
        "Run the actual methods on this machine and record what happens.",
    ),
    "calibrate": (
        "calibrate:calibrate",
        "Measure this device once, so that predictions are about it.",
    ),
    "compare": ("compare:compare", "Join measurements with predictions and print the error."),
    "validate": ("validate:validate", "Judge predictions on a table of published measurements."),
    "plan": ("plan:plan", "How many of which GPUs, with which method, at what cost."),
    "report": ("report:report", "Turn records into tables, figures and one offline page."),
    "doctor": ("doctor:doctor", "What can be measured on this machine, what cannot, and why."),
    "init": ("init:init", "Write a commented plan file to start from."),
    "trace": ("trace:trace", "What is in a workload trace."),
    "methods": ("listing:methods", "List the methods, or show one with its formula and evidence."),
    "models": ("listing:models", "List the bundled models, or show one."),
    "gpus": ("listing:gpus", "List the GPU profiles, or show one with its sources."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order people need them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(f"lccost.commands.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with near matches for a misspelt command."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            import difflib

            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No such command {name!r}.{hint} Commands: {', '.join(COMMANDS)}.")
        return super().resolve_command(ctx, args)


CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=LazyGroup, context_settings=CONTEXT)
@click.version_option(__version__, message="lccost %(version)s")
def cli() -> None:
    """What long-context inference methods really cost: predicted, measured, compared.

    \b
    lccost predict --model llama-3.1-8b --gpu h100-sxm --context 8k,128k --method full,kivi,h2o
    lccost methods show kivi
    lccost measure --model llama-3.2-1b --layers 2 --context 1k,4k --output runs.jsonl
    """

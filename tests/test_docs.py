"""Documentation that cannot drift: generated pages are fresh, what the README says runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from costmodel.in_situ import in_situ
from lccost.cli import COMMANDS, cli

ROOT = Path(__file__).resolve().parents[1]


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_command_is_in_the_reference() -> None:
    text = (ROOT / "docs/cli.md").read_text("utf-8")
    for command in COMMANDS:
        assert f"## lccost {command}\n" in text


def _readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text("utf-8")
    lines = [line.partition("#")[0].strip() for line in re.findall(r"^lccost .*$", text, re.M)]
    fast = ("lccost predict", "lccost methods", "lccost models", "lccost gpus")
    return [x for x in lines if x.startswith(fast) and "./" not in x and ".toml" not in x]


@pytest.mark.parametrize("command", _readme_commands())
def test_readme_commands_run(command: str) -> None:
    result = CliRunner().invoke(cli, command.split()[1:])
    assert result.exit_code == 0, result.output


def test_readme_names_the_two_commands_and_links_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert "make demo" in text
    assert "make test" in text
    for page in ("README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))):
        base = (ROOT / page).parent
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text("utf-8")):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (base / target).exists(), f"{page} links to {target}"


def test_the_model_page_quotes_the_pooled_fit() -> None:
    page = " ".join((ROOT / "docs/model.md").read_text("utf-8").split())
    p = in_situ()
    for words in (
        f"compute-bound time takes {p.compute_factor:.2f} times",
        f"attention of a step {p.attention_memory_factor:.2f} of what",
        f"collectives {p.collective_factor:.2f} times",
        f"A step adds {p.step_s * 1e3:.1f} ms, every layer {p.layer_s * 1e6:.0f} us",
        f"a first token {p.first_token_s * 1e3:.1f} ms",
        f"the parameters of {p.n_runs} published runs",
    ):
        assert words in page

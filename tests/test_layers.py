"""The design held by tests: who may import whom, what start-up may load, where names may stand."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lccost", "costmodel", "measure", "hardware_profiles", "reports")
ALLOWED = {
    "costmodel": set(),
    "measure": {"costmodel"},
    "reports": {"costmodel"},
    "lccost": {"costmodel", "measure", "reports"},
    "hardware_profiles": set(),
}
#: What costmodel may import beside the standard library; scipy only inside functions (fits).
COSTMODEL_THIRD_PARTY = {"numpy", "msgspec"}
HEAVY = ("torch", "scipy", "matplotlib", "jinja2", "transformers", "pandas", "psutil", "pynvml")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(top-level module, at module level?) of every import in a file."""
    tree = ast.parse(path.read_text("utf-8"))
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        found += [(n.partition(".")[0], id(node) in top) for n in names]
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_leftwards(package: str) -> None:
    for path in sources(package):
        wrong = {
            name
            for name, _ in imports(path)
            if name in PACKAGES and name != package and name not in ALLOWED[package]
        }
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_costmodel_needs_numpy_and_msgspec_only() -> None:
    for path in sources("costmodel"):
        for name, at_top in imports(path):
            if name in sys.stdlib_module_names or name == "costmodel":
                continue
            allowed = name in COSTMODEL_THIRD_PARTY or (
                not at_top and name in {"scipy", "huggingface_hub", "ray"}
            )
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["predict", "--help"],
        [
            "predict",
            "--model",
            "llama-3-8b",
            "--gpu",
            "h100-sxm",
            "--context",
            "8k",
            "--method",
            "full,kivi",
        ],
        ["methods", "list"],
        ["methods", "show", "kivi"],
        ["models", "list"],
        ["gpus", "list"],
    ],
    ids=lambda a: " ".join(a[:2]),
)
def test_start_up_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from lccost.cli import cli\n"
        "try:\n    cli(sys.argv[1:], prog_name='lccost')\n"
        "except SystemExit as e:\n    assert not e.code, e.code\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_help_needs_no_numpy() -> None:
    code = (
        "import sys\nfrom lccost.cli import cli\n"
        "try:\n    cli(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'numpy' not in sys.modules and 'rich' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_method_names_stand_only_in_their_own_files() -> None:
    from costmodel.methods import method_names

    names = set(method_names()) - {"full"}  # "full" is also the baseline that tables compare with
    for package in ("costmodel", "lccost", "measure", "reports"):
        for path in sources(package):
            if "methods" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Compare):
                    literals = {
                        c.value
                        for c in ast.walk(node)
                        if isinstance(c, ast.Constant) and isinstance(c.value, str)
                    }
                    assert not literals & names, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_version_stands_once_in_effect() -> None:
    import tomllib

    from lccost import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == __version__

"""Triton kernels without a GPU: interpreted against their references, and compiled.

The tests proper are in ``tests/kernels`` and run in processes of their own, because whether kernels
are interpreted is decided when Triton is imported. A few processes share them out: each costs
its imports, and several keep two workers busy.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "kernels"
INTERPRETED = sorted(p.name for p in CASES.glob("interpreted_*.py"))

pytestmark = pytest.mark.triton


def run(*names: str, interpret: bool, cache: Path, only: str = "") -> None:
    variables = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}
    variables |= {"TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": str(cache)}
    variables |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-n",
                "0",
                "-p",
                "no:cacheprovider",
                "-k",
                only,
            ),
            *(str(CASES / name) for name in names),
        ],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("half", [0, 1])
def test_interpreted_kernels_equal_their_references(half: int, tmp_path: Path) -> None:
    run(*INTERPRETED[half::2], interpret=True, cache=tmp_path)


@pytest.mark.gpu
def test_kernels_of_dropping_methods_and_scans_on_the_device(tmp_path: Path) -> None:
    run("interpreted_dropping.py", interpret=False, cache=tmp_path)


@pytest.mark.gpu
def test_kernels_of_packed_caches_on_the_device(tmp_path: Path) -> None:
    """In 16 bits: every further type and shape takes seconds to compile."""
    names = (f"interpreted_{n}.py" for n in ("kivi_decode", "token_decode", "steps"))
    run(*names, interpret=False, cache=tmp_path, only="halves or float16")


@pytest.mark.parametrize("only", ["sm_80", "sm_90 or not sm_", "sm_100"])
def test_kernels_compile_for_every_architecture(only: str, tmp_path: Path) -> None:
    run("compiled.py", interpret=False, cache=tmp_path, only=only)


def test_every_kernel_is_interpreted() -> None:
    from measure.kernels import kernel_names

    assert {f"interpreted_{n}.py" for n in kernel_names()} <= set(INTERPRETED)

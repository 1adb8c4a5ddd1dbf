"""Triton kernels without a GPU: interpreted against their references, and compiled.

The tests proper are in ``tests/kernels``; each file runs in a process of its own, because whether
kernels are interpreted is decided when Triton is imported.
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


def run(name: str, *, interpret: bool, cache: Path) -> None:
    variables = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}
    variables |= {"TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": str(cache)}
    variables |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES / name)],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernels_equal_their_references(name: str, tmp_path: Path) -> None:
    run(name, interpret=True, cache=tmp_path)


@pytest.mark.gpu
def test_kernels_of_dropping_methods_and_scans_on_the_device(tmp_path: Path) -> None:
    run("interpreted_dropping.py", interpret=False, cache=tmp_path)


def test_kernels_compile_for_every_architecture(tmp_path: Path) -> None:
    run("compiled.py", interpret=False, cache=tmp_path)


def test_every_kernel_is_interpreted() -> None:
    from measure.kernels import kernel_names

    assert {f"interpreted_{n}.py" for n in kernel_names()} <= set(INTERPRETED)

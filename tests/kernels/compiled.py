"""Kernels compile and use what docs/kernels.md says: each for sm_80, sm_90 and sm_100, further
shapes and the kernels of its lesser launches for sm_90.
"""

import re
import sys
from pathlib import Path

import pytest

from measure.kernels import interpreted, kernel_names
from measure.kernels._compile import (
    ARCHITECTURES,
    SHARED_LIMIT_BYTES,
    THREAD_REGISTERS,
    compile_case,
    compile_cases,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import kernels_doc  # noqa: E402

assert not interpreted()
CASES = [
    (name, case, architecture)
    for name in kernel_names()
    for case in compile_cases(name)
    if case.tested
    for architecture in case.architectures
]
PAGE = kernels_doc.PAGE.read_text("utf-8")


def test_every_kernel_has_a_case() -> None:
    expected = {(name, x) for name in kernel_names() for x in ARCHITECTURES}
    assert expected <= {(name, x) for name, _, x in CASES}


@pytest.mark.parametrize(
    ("name", "case", "architecture"),
    CASES,
    ids=lambda x: f"sm_{x}" if isinstance(x, int) else getattr(x, "name", str(x)),
)
def test_compiles_and_fits(name, case, architecture) -> None:
    used = compile_case(case, architecture).resources
    assert used.loop_spills <= case.max_loop_spills
    assert 0 < used.registers <= THREAD_REGISTERS
    assert used.shared_bytes <= SHARED_LIMIT_BYTES[architecture]
    assert used.resident_blocks >= 1
    assert kernels_doc.row(case, architecture, used) in PAGE


def test_no_order_is_lost_where_it_matters() -> None:
    """Lanes reduce in no order, so steps of a recurrence may only be scanned; the interpreter does
    not tell, as it goes from the first to the last.
    """
    for case in compile_cases("rglru_scan"):
        text = compile_case(case, 90).asm["ttgir"]
        assert "tt.scan" in text
        assert not re.search(r'"tt\.reduce"\(%[^),]+,', text), case.name


def test_fp32_inputs_are_multiplied_in_three_products() -> None:
    made = {c.name: c for c in compile_cases("ssd_scan")}
    products = [
        compile_case(made[f"chunk states, {x}, P 64, N 128"], 90).asm["ptx"].count("mma")
        for x in ("bf16", "fp32")
    ]
    assert products[1] == 3 * products[0] > 0

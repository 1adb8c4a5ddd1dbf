"""KIVI's cache of Llama-3-8B at 10,000 tokens, byte for byte."""

import csv
from pathlib import Path

import pytest
from method_points import point, state_bytes

_TABLE = Path(__file__).parents[1] / "data" / "kivi_llama3_8b_at_10000.csv"
_LINES = [x for x in _TABLE.read_text("utf-8").splitlines() if not x.startswith("#")]


@pytest.mark.parametrize("row", list(csv.DictReader(_LINES)), ids=lambda r: r["method"])
@pytest.mark.parametrize("level", ["ideal", "reference"])
def test_state_bytes(row: dict[str, str], level: str) -> None:
    assert state_bytes(row["method"], point(10_000, level=level)) == int(row["state_bytes"])


def test_nominal_ratio_of_the_paper() -> None:
    # The paper's 5.05x has both residuals full; 10,111 tokens leave 127 keys and 128 values over.
    ratio = state_bytes("full", point(10_111)) / state_bytes("kivi", point(10_111))
    assert ratio == pytest.approx(5.05, abs=0.01)

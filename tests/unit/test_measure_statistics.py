"""Statistics of timed samples: figures worked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from measure.statistics import median_interval, summarise, warnings_of


def test_summary_of_nine_numbers():
    # Sorted 1..9: quartiles 3 and 7, deviations from 5 are 4 3 2 1 0 1 2 3 4 with median 2.
    found = summarise([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0])
    assert (found.n, found.min_s, found.median_s, found.mean_s) == (9, 1.0, 5.0, 5.0)
    assert (found.p25_s, found.p75_s, found.mad_s) == (3.0, 7.0, 2.0)
    assert found.iqr_fraction == pytest.approx(0.8)
    assert (found.mild_outliers, found.severe_outliers) == (0, 0)


def test_outliers_are_told_apart():
    # Quartiles 10 and 12: fences at 7..15 (mild) and 4..18 (severe).
    found = summarise([10.0, 10.0, 10.0, 11.0, 11.0, 12.0, 12.0, 12.0, 16.0, 30.0, 11.0])
    assert found.p25_s == 10.5
    assert found.p75_s == 12.0
    assert (found.mild_outliers, found.severe_outliers) == (1, 1)


def test_interval_of_the_median_from_binomial_ranks():
    # n = 6: only the extremes reach 95 %: P(all on one side) = 2 / 64 = 3.1 %.
    assert median_interval(6) == (0, 5)
    # Below 6 nothing does (n = 5: 6.3 % is left out), so the range itself is given.
    assert median_interval(5) == (0, 4)
    # n = 9: dropping two samples leaves 2 (1 + 9) / 512 = 3.9 % outside; three 2 (46) / 512 = 18 %.
    assert median_interval(9) == (1, 7)


def test_drift_is_the_change_of_the_fitted_line():
    # A line from 1.0 to 2.0: change 1.0 over a median of 1.5.
    assert summarise([1.0, 1.25, 1.5, 1.75, 2.0]).drift_fraction == pytest.approx(1.0 / 1.5)
    assert summarise([1.0, 1.0, 1.0]).drift_fraction == 0.0


def test_warnings_name_spread_and_slow_start():
    steady = [1.0, 1.01, 0.99, 1.0, 1.0]
    assert warnings_of(summarise(steady), steady) == ()
    wild = [5.0, 1.0, 1.5, 1.0, 2.0]
    text = " ".join(warnings_of(summarise(wild), wild))
    assert "IQR" in text
    assert "first" in text


@given(st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=60))
def test_the_interval_brackets_the_median(samples):
    found = summarise(samples)
    assert found.min_s <= found.ci_low_s <= found.median_s <= found.ci_high_s
    assert found.half_width_fraction >= 0

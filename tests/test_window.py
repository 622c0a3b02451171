"""Windows resolve to steps or say what is wrong."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.window import check_frequency, check_sparsity, resolve_moment, resolve_window

quick = settings(max_examples=100, deadline=None)
sparsities = st.floats(0.0, 1.0, exclude_max=True)


@quick
@given(st.floats(0.0, 1.0), st.integers(1, 10_000))
def test_a_fraction_is_the_nearest_step_of_the_run(fraction, total):
    step = resolve_moment(fraction, total, "begin")
    assert 0 <= step <= total
    assert abs(step - fraction * total) <= 0.5


@quick
@given(st.integers(1, 10_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_a_step_is_itself(case):
    step, total = case
    assert resolve_moment(step, total, "begin") == step


@pytest.mark.parametrize(
    ("moment", "error", "cure"),
    [
        (True, TypeError, "fraction of the run"),
        ("0.5", TypeError, "optimizer step"),
        (None, TypeError, "optimizer step"),
        (1.5, ValueError, "write an int for a step"),
        (-0.1, ValueError, r"\[0, 1\]"),
        (math.nan, ValueError, r"\[0, 1\]"),
        (math.inf, ValueError, r"\[0, 1\]"),
        (-1, ValueError, "at most 100"),
        (101, ValueError, "train longer .* at most 100 or to a fraction"),
    ],
)
def test_a_wrong_moment_is_named_with_its_cure(moment, error, cure):
    with pytest.raises(error, match=f"^begin .*{cure}"):
        resolve_moment(moment, 100, "begin")


def test_windows_resolve_fractions_and_steps():
    assert resolve_window((0.6, 0.7, 0.9), 50, ("observe", "round", "freeze")) == (30, 35, 45)
    assert resolve_window((3, 0.5), 50, ("begin", "end")) == (3, 25)
    assert resolve_window((0, 50), 50, ("begin", "end")) == (0, 50)


@pytest.mark.parametrize(
    ("window", "total", "message"),
    [
        ((0.1,), 100, r"window must be \(begin, end\), got \(0.1,\) with 1 entries"),
        ((0.1, 0.5, 0.7), 100, "with 3 entries"),
        ((0.7, 0.1), 100, "begin must come before end.* step 70 and step 10 of a run of 100"),
        ((5, 5), 100, "widen the window or train longer"),
        ((0.1, 0.2), 2, "step 0 and step 0 of a run of 2"),
        ((10, 200), 100, "window end is step 200, but the run has 100"),
    ],
)
def test_a_wrong_window_is_named_with_its_cure(window, total, message):
    with pytest.raises(ValueError, match=message):
        resolve_window(window, total, ("begin", "end"))


@quick
@given(sparsities)
def test_every_fraction_below_one_is_a_sparsity(value):
    assert check_sparsity(value) == value


@pytest.mark.parametrize("value", [-0.1, 1.0, 90, math.nan, math.inf, True])
def test_a_wrong_sparsity_is_named_with_its_cure(value):
    with pytest.raises(ValueError, match=r"\[0, 1\), got .*; write 0.9 for 90 %"):
        check_sparsity(value)


@pytest.mark.parametrize("value", [1, 500, 0.01, 1.0])
def test_positive_frequencies_pass(value):
    assert check_frequency(value) == value


@pytest.mark.parametrize("value", [0, -3, 0.0, -0.5, 1.5, math.nan, math.inf, True])
def test_a_wrong_frequency_is_named(value):
    with pytest.raises(ValueError, match=r"frequency is optimizer steps \(int >= 1\) or a fraction"):
        check_frequency(value)

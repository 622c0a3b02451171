"""Schedules hit their ends exactly, never turn back but where they say so, are values, and can be drawn."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import sys
from itertools import pairwise

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

import lightning_compress
from lightning_compress.schedule import (
    Alternating,
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    OneCycle,
    Schedule,
    Steps,
)

quick = settings(max_examples=100, deadline=None)
sparsities = st.floats(0.0, 1.0, exclude_max=True)
shares = st.floats(0.0, 1.0)
moments = st.lists(shares, min_size=2, max_size=8)
rates = st.none() | st.floats(-100.0, 100.0)
curves = st.one_of(
    st.builds(Linear, sparsities, sparsities),
    st.builds(Cubic, sparsities, sparsities),
    st.builds(Cosine, sparsities, sparsities),
    st.builds(Exponential, st.floats(0.0, 0.99), st.floats(0.0, 0.99), rates),
)
one_cycles = st.tuples(st.floats(1.0, 100.0), shares).flatmap(
    lambda drawn: st.builds(OneCycle, sparsities, sparsities, st.just(drawn[0]), st.just(drawn[0] * drawn[1]))
)
levels = st.dictionaries(shares, sparsities, min_size=1, max_size=5).map(lambda drawn: tuple(sorted(drawn.items())))
steps = levels.map(Steps)
alternations = st.builds(Alternating, sparsities, st.integers(1, 20), st.floats(0.0, 0.4), st.floats(0.0, 0.4))
schedules = st.one_of(st.builds(Constant, sparsities), curves, one_cycles, steps, alternations)


@quick
@given(curves)
def test_ends_are_exact(schedule):
    assert schedule(0.0) == schedule.initial
    assert schedule(1.0) == schedule.final


@quick
@given(st.one_of(one_cycles, alternations))
def test_the_end_is_exact(schedule):
    assert schedule(1.0) == schedule.final


@quick
@given(st.one_of(curves, one_cycles), moments)
def test_values_never_turn_back_and_stay_between_the_ends(schedule, moments):
    final, initial = schedule.final, schedule.initial
    values = [schedule(moment) for moment in sorted(moments)]
    rising = values if final >= initial else values[::-1]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(rising))
    assert min(initial, final) - 1e-12 <= min(values) <= max(values) <= max(initial, final) + 1e-12


def test_cubic_is_fast_first():
    schedule = Cubic(0.9)
    steps = [schedule(i / 10) - schedule((i - 1) / 10) for i in range(1, 11)]
    assert steps == sorted(steps, reverse=True)
    assert schedule(0.5) == pytest.approx(0.9 * (1 - 0.125))


@quick
@given(sparsities, sparsities, shares)
def test_cosine_is_half_a_turn_of_a_circle(final, initial, progress):
    turned = np.exp(1j * np.pi * progress).real
    assert Cosine(final, initial)(progress) == pytest.approx((initial + final) / 2 + (initial - final) / 2 * turned)


@pytest.mark.parametrize("rounds", [1, 5, 10])
@pytest.mark.parametrize("final", [0.2, 0.9, 0.99])
def test_exponential_without_a_rate_takes_the_same_share_of_what_is_left(final, rounds):
    left = 1.0
    kept = (1.0 - final) ** (1 / rounds)  # p^(1/n) of the weights survive each of n rounds
    for number in range(1, rounds + 1):
        left *= kept
        assert Exponential(final)(number / rounds) == pytest.approx(1.0 - left)


@quick
@given(sparsities, sparsities, shares)
def test_exponential_of_rate_zero_is_the_straight_line(final, initial, progress):
    assert Exponential(final, initial, 0.0)(progress) == Linear(final, initial)(progress)
    assert Exponential(final, initial, 1e-9)(progress) == pytest.approx(Linear(final, initial)(progress), abs=1e-6)


@quick
@given(sparsities, st.floats(0.1, 20.0), shares)
def test_exponential_solves_its_differential_equation(final, rate, progress):
    """s' = rate * (beyond - s), where `beyond` is what the curve would reach without an end."""
    schedule, h = Exponential(final, 0.0, rate), 1e-5
    beyond = final / (1.0 - np.exp(-rate))
    inside = min(max(progress, h), 1.0 - h)
    slope = (schedule(inside + h) - schedule(inside - h)) / (2 * h)
    assert slope == pytest.approx(rate * (beyond - schedule(inside)), abs=1e-4, rel=1e-4)


@quick
@given(levels, shares)
def test_steps_hold_the_last_level_that_began(levels, progress):
    begun = [moment for moment, _ in levels if moment <= progress + 1e-9]
    assert Steps(levels)(progress) == (dict(levels)[max(begun)] if begun else 0.0)


def test_a_step_on_a_boundary_belongs_to_what_begins():
    for count in range(1, 200):
        rounds = Steps(tuple((number / count, number / 1000) for number in range(count)))
        swings = Alternating(0.9, cycles=count)
        for number in range(count):
            assert rounds((number * 7) / (count * 7)) == number / 1000
            assert swings((2 * number) / (2 * count)) == 0.9
            assert swings((2 * number + 1) / (2 * count)) == 0.0


@quick
@given(one_cycles, shares)
def test_one_cycle_is_the_logistic_curve(schedule, progress):
    def logistic(x):
        return 1.0 / (1.0 + np.exp(-x))

    a, b = schedule.steepness, schedule.shift
    expected = schedule.initial + (schedule.final - schedule.initial) * logistic(a * progress - b) / logistic(a - b)
    assert schedule(progress) == pytest.approx(expected)


def test_one_cycle_begins_a_quarter_of_a_per_cent_on_the_way():
    assert OneCycle(1.0)(0.0) == pytest.approx(0.0025, abs=1e-4)


@quick
@given(alternations)
def test_alternating_has_the_phases_it_promises(schedule):
    values = np.array([schedule(progress) for progress in np.linspace(0.0, 1.0, 4001)])
    assert set(values) <= {schedule.final, 0.0}
    if schedule.final == 0.0:
        return
    changes = int((values[1:] != values[:-1]).sum())
    assert changes == 2 * schedule.cycles + (values[0] == 0.0)
    middle = 1.0 - schedule.warmup - schedule.last
    assert (values == 0.0).mean() == pytest.approx(schedule.warmup + middle / 2, abs=0.02)


def test_alternating_like_the_papers_imagenet_run():
    swings = Alternating(0.9, cycles=7, warmup=0.1, last=0.15)
    assert [swings(epoch / 100) for epoch in (0, 5, 9)] == [0.0] * 3
    assert [swings(epoch / 100) for epoch in (10, 14, 17, 20, 22)] == [0.9, 0.9, 0.0, 0.0, 0.9]
    assert [swings(epoch / 100) for epoch in (80, 84, 85, 99, 100)] == [0.0, 0.0, 0.9, 0.9, 0.9]


def test_constant_and_frozen():
    schedule = Constant(0.5)
    assert [schedule(moment) for moment in (0.0, 0.3, 1.0)] == [0.5] * 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.value = 0.1  # type: ignore[misc]


@quick
@given(schedules, shares)
def test_schedules_are_values(schedule, progress):
    twins = [
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
        eval(repr(schedule), dict(vars(lightning_compress))),
    ]
    for twin in twins:
        assert twin == schedule
        assert repr(twin) == repr(schedule)
        assert hash(twin) == hash(schedule)
        assert twin(progress) == schedule(progress)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, dataclasses.fields(schedule)[0].name, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exponential(1.0), "give one, or values below 1"),
        (lambda: Exponential(0.5, 1.0), "give one, or values below 1"),
        (lambda: Exponential(0.5, rate=1000), r"rate is a number in \[-100, 100\], got 1000"),
        (lambda: Exponential(0.5, rate=math.nan), "got nan"),
        (lambda: Steps(()), "rising progress, got ()"),
        (lambda: Steps(((0.5, 0.1), (0.5, 0.2))), "rising progress"),
        (lambda: Steps(((0.5, 0.1), (0.2, 0.2))), "rising progress"),
        (lambda: Steps(((100, 0.1),)), r"a level is progress through the window, in \[0, 1\], got 100"),
        (lambda: OneCycle(0.5, steepness=0.0), r"steepness is in \(0, 100\]"),
        (lambda: OneCycle(0.5, shift=20.0), r"shift in \[0, steepness\], got 14.0 and 20.0"),
        (lambda: Alternating(0.5, cycles=0), "leaves no cycle"),
        (lambda: Alternating(0.5, warmup=0.5, last=0.5), "leaves no cycle"),
        (lambda: Alternating(0.5, warmup=-0.1), "warmup is progress"),
        (lambda: Alternating(0.5, last=2), "last is progress .*, got 2"),
    ],
)
def test_a_schedule_that_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


IN_FILES = [
    (Constant(0.5), {"value": 0.5}),
    (Linear(0.5, 0.1), {"final": 0.5, "initial": 0.1}),
    (Cubic(0.5), {"final": 0.5}),
    (Cosine(0.5), {"final": 0.5}),
    (Exponential(0.5), {"final": 0.5}),
    (Exponential(0.5, rate=3.0), {"final": 0.5, "rate": 3.0}),
    (Steps(((0.0, 0.5), (0.5, 0.9))), {"levels": [[0.0, 0.5], [0.5, 0.9]]}),
    (OneCycle(0.5, steepness=10.0, shift=4.0), {"final": 0.5, "steepness": 10.0, "shift": 4.0}),
    (Alternating(0.5, cycles=3, last=0.2), {"final": 0.5, "cycles": 3, "last": 0.2}),
]


@pytest.mark.parametrize(("expected", "options"), IN_FILES, ids=lambda value: repr(value)[:30])
def test_files_name_schedules_by_their_class(expected, options, tmp_path):
    """As LightningCLI reads a callback's option: a number, or anything that turns progress into one."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--sparsity", type=float | Schedule)
    path = tmp_path / "recipe.yaml"
    named = {"class_path": f"lightning_compress.{type(expected).__name__}", "init_args": options}
    path.write_text(yaml.safe_dump({"sparsity": named}), encoding="utf-8")
    got = parser.instantiate_classes(parser.parse_args(["--config", str(path)])).sparsity
    assert got == expected
    assert repr(got) == repr(expected)


@pytest.mark.parametrize("schedule", [expected for expected, _ in IN_FILES], ids=lambda value: type(value).__name__)
def test_every_schedule_draws_itself(schedule, tmp_path):
    pytest.importorskip("matplotlib")
    (axes,) = schedule.plot().axes
    progress, values = axes.lines[0].get_data()
    np.testing.assert_array_equal(values, [schedule(moment) for moment in progress])
    assert (progress[0], progress[-1]) == (0.0, 1.0)
    assert axes.get_title().replace("\n", " ") == repr(schedule)
    path = tmp_path / "new" / "schedule.png"
    schedule.plot(path=path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("window", "where", "right"), [((0.1, 0.7), "fraction of the run", 1.0), ((100, 600), "optimizer step", 700.0)]
)
def test_a_window_moves_the_curve_into_the_run(window, where, right):
    pytest.importorskip("matplotlib")
    (axes,) = Cubic(0.9).plot(window).axes
    times, values = axes.lines[0].get_data()
    assert (times[0], times[-1], values[-1]) == (*window, 0.9)
    np.testing.assert_array_equal(axes.lines[1].get_data(), [[window[1], right], [0.9, 0.9]])
    assert axes.get_xlabel() == where
    assert axes.get_xlim() == (0.0, right)


@pytest.mark.parametrize("window", [(0.1, 700), (0.7, 0.1), (5, 5)])
def test_a_window_that_cannot_be_drawn_is_named(window):
    with pytest.raises(ValueError, match="two fractions or two steps, the earlier first, got"):
        Cubic(0.9).plot(window)


def test_drawing_leaves_pyplot_alone(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    Cubic(0.9).plot()
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_cure_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'charts need matplotlib: pip install "lightning-compress\[demo\]"'):
        Cubic(0.9).plot()

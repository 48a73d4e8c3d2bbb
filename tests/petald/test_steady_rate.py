from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petald.steady_rate import SHORT_RATIO, SteadyRate

rates = st.floats(1e-3, 1e6)


def measure(rng: random.Random) -> float:
    return 100.0 * math.exp(rng.gauss(0, 0.1))


def test_measurements_that_err_by_a_tenth_come_to_rest_near_what_is_so() -> None:
    changes, errors = [], []
    for seed in range(50):
        rng = random.Random(seed)
        rate = SteadyRate(measure(rng))
        told = [rate.value]
        for _ in range(12 * 60):
            rate.on_measured(measure(rng), 60.0)
            told.append(rate.value)
        after = told[30:]
        changes.append(sum(one != other for one, other in itertools.pairwise(after)))
        errors += [abs(math.log(one / 100)) for one in after]
    assert statistics.mean(changes) < 3  # in half a day
    assert statistics.mean(errors) < 0.03
    assert max(errors) < 0.11


@pytest.mark.parametrize("times", [0.3, 0.7, 1.5, 10.0])
def test_a_change_that_lasts_is_told_within_minutes_and_then_soon_no_more(times: float) -> None:
    rate = SteadyRate(100.0)
    for _ in range(60):
        rate.on_measured(100.0, 60.0)
    told = []
    for _ in range(120):
        rate.on_measured(100.0 * times, 60.0)
        told.append(rate.value)
    assert max(told[12] / (100 * times), 100 * times / told[12]) < SHORT_RATIO
    assert told[-1] == pytest.approx(100 * times, rel=0.06)
    assert len(set(told[60:])) <= 2


def test_a_moment_is_passed_over() -> None:
    rate = SteadyRate(100.0)
    for _ in range(10):
        rate.on_measured(100.0, 60.0)
    rate.on_measured(1.0, 5.0)
    assert rate.value == 100.0


@given(rates, st.lists(st.tuples(rates, st.floats(0, 1e5)), max_size=30))
def test_what_is_told_lies_between_what_was_measured(
    first: float, measured: list[tuple[float, float]]
) -> None:
    rate = SteadyRate(first)
    known = [first]
    for one, over_s in measured:
        rate.on_measured(one, over_s)
        known.append(one)
        assert min(known) * 0.999 <= rate.value <= max(known) * 1.001

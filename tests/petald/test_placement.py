"""How many blocks fit, and which are taken."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petald.errors import ConfigError
from petald.placement import choose_span, count_fitting_blocks, parse_blocks


@pytest.mark.parametrize(("text", "span"), [("0:10", (0, 10)), ("3:4", (3, 4))])
def test_blocks_are_read(text: str, span: tuple[int, int]) -> None:
    assert parse_blocks(text) == span


@pytest.mark.parametrize("text", ["", ":", "1", "1:", ":2", "2:1", "3:3", "-1:2", "a:b", "1:2:3"])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="START:END"):
        parse_blocks(text)


def test_blocks_that_fit_are_counted() -> None:
    sizes = [100, 100, 100, 100]
    assert count_fitting_blocks(sizes, memory_bytes=399) == 3
    assert count_fitting_blocks([200] * 4, memory_bytes=400) == 2
    assert count_fitting_blocks([200] * 4, memory_bytes=199) == 0
    assert count_fitting_blocks(sizes, memory_bytes=10**9) == 4


def test_the_least_covered_window_is_taken() -> None:
    coverage = [3, 3, 1, 0, 0, 1, 3, 3]
    assert choose_span(coverage, length=2, rng=random.Random(0)) == (3, 5)


def test_an_empty_swarm_is_spread_over() -> None:
    starts = {choose_span([0] * 8, length=2, rng=random.Random(seed))[0] for seed in range(64)}
    assert len(starts) > 3


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 40), st.integers())
def test_a_window_is_within_the_model(coverage: list[int], length: int, seed: int) -> None:
    start, end = choose_span(coverage, length=length, rng=random.Random(seed))
    assert 0 <= start < end <= len(coverage)
    assert end - start == min(length, len(coverage))

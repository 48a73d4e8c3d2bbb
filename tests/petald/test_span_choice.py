"""Which span a server takes that joins, against a search through all of them."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petald.block_load import Capacity, confirm_gaps, read_load, wants_whole
from petald.model_choice import ChoiceSettings, ModelChoice
from petald.move_actions import MoveSettings
from petald.move_planner import MovePlanner
from petald.reports import _server_status
from petald.span_choice import AS_GOOD, ModelOffer, choose_model, choose_span
from petald.span_scores import (
    FLOOR,
    HOP,
    HOP_SERVERS,
    LONE,
    LOSS,
    POWER,
    gain_limit,
    score_spans,
)
from tests.helpers.placement_world import announcement, load_of, view_of

spans = st.tuples(st.integers(0, 9), st.integers(1, 5), st.floats(0.1, 10.0)).map(
    lambda one: (one[0], min(10, one[0] + one[1]), one[2])
)
swarms = st.lists(spans, min_size=1, max_size=12)


def power_mean(relative: list[float]) -> float:
    return (sum((one + FLOOR) ** -POWER for one in relative) / len(relative)) ** (
        -1 / POWER
    ) - FLOOR


def plain_worth(
    swarm: list[tuple[int, int, float]], own: tuple[int, int, float], num_blocks: int
) -> float:
    """The power mean of the blocks' throughputs over their mean, less a loss, written down."""
    throughput = [0.0] * num_blocks
    for start, end, speed in [*swarm, own]:
        for block in range(start, end):
            throughput[block] += speed / (end - start)
    mean = sum(throughput) / num_blocks
    start, end, speed = own
    left = max(0.0, 1 - speed / (end - start) / mean)
    hole = 1 - power_mean([left] * (end - start) + [1.0] * (num_blocks - end + start))
    servers = [
        sum(one[0] <= block < one[1] for one in [*swarm, own]) for block in range(num_blocks)
    ]
    risk = LOSS * hole + LONE / (len(swarm) + 1) * sum(max(0, 2 - one) for one in servers)
    hop = HOP * len(swarm) ** 2 / (len(swarm) ** 2 + HOP_SERVERS**2)
    hops = hop * speed / sum(throughput) / (end - start)
    return power_mean([one / mean for one in throughput]) - risk - hops


def typical_speed(swarm: list[tuple[int, int, float]]) -> float:
    return float(np.median([speed for *_, speed in swarm]))


@settings(max_examples=40, deadline=None)
@given(swarms, st.integers(1, 6), st.floats(0.1, 5.0))
def test_every_span_is_worth_what_a_plain_sum_says(swarm, fit: int, speed: float) -> None:
    scores = score_spans(load_of(10, *swarm), Capacity(fit=fit, block_steps_per_s=speed))
    speed = min(speed, 100 * typical_speed(swarm))
    for start in range(10):
        for end in range(start + 1, min(10, start + fit) + 1):
            plain = plain_worth(swarm, (start, end, speed), 10)
            assert scores.worth(start, end) == pytest.approx(plain, rel=1e-4, abs=1e-6)
            covered = {block for one in swarm for block in range(one[0], one[1])}
            assert scores.newly_covered(start, end) == len(set(range(start, end)) - covered)


@settings(max_examples=40, deadline=None)
@given(swarms, st.integers(1, 12), st.floats(0.1, 5.0), st.integers())
def test_the_choice_covers_most_and_then_is_worth_most(swarm, fit, speed, seed: int) -> None:
    capacity = Capacity(fit=fit, block_steps_per_s=speed)
    load = load_of(10, *swarm)
    start, end = choose_span(load, capacity, rng=random.Random(seed))
    assert 0 <= start < end <= min(10, start + fit)
    scores = score_spans(load, capacity)
    every = [(s, e) for s in range(10) for e in range(s + 1, min(10, s + fit) + 1)]
    most = max(scores.newly_covered(*span) for span in every)
    assert scores.newly_covered(start, end) == most
    worths = [scores.worth(*span) for span in every if scores.newly_covered(*span) == most]
    least = max(worths) - AS_GOOD * (max(worths) - min(worths))
    assert scores.worth(start, end) >= least - 1e-9


@settings(max_examples=60, deadline=None)
@given(swarms, spans, st.integers(1, 6))
def test_no_move_gains_more_than_the_limit_says(swarm, own, fit: int) -> None:
    start, end, speed = own
    load = load_of(10, *swarm)
    capacity = Capacity(fit=max(fit, end - start), block_steps_per_s=speed)
    scores = score_spans(load, capacity)
    best = scores.worth_WS[scores.is_possible_WS].max()
    gain = (best - scores.worth(start, end)) / scores.share
    limit = gain_limit(load, capacity, (start, end))
    assert gain <= limit + 1e-3 * abs(limit) + 1e-6


def test_the_least_covered_blocks_are_taken() -> None:
    load = load_of(8, *[(0, 3)] * 3, *[(5, 8)] * 3)
    assert choose_span(load, Capacity(fit=2), rng=random.Random(0)) == (3, 5)


def test_fewer_blocks_than_fit_are_taken_where_that_balances() -> None:
    load = load_of(8, *[(0, 3)] * 6, *[(3, 5)] * 3, *[(5, 8)] * 6)
    chosen = choose_span(load, Capacity(fit=8, block_steps_per_s=1.0), rng=random.Random(0))
    assert chosen == (3, 5)


def test_servers_that_start_together_spread_over_all_blocks() -> None:
    counts = np.zeros(10)
    for seed in range(500):
        start, end = choose_span(load_of(10), Capacity(fit=4), rng=random.Random(seed))
        counts[start:end] += 1
    assert counts.min() > 0.7 * counts.max()


def test_claims_count_as_made_and_leaving_servers_not_at_all() -> None:
    said = {
        "mover": announcement(0, 4, claim=(4, 8, 1)),
        "leaver": announcement(0, 8, state="leaving"),
        "joiner": announcement(2, 4, state="joining", claim=(2, 4, 1)),
    }
    load = read_load(view_of(8, said))
    assert load.planned_L.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert load.throughput_L == pytest.approx([0, 0, 0.5, 0.5] + [0.25] * 4)
    assert load.settled_L.tolist() == [0] * 8
    assert load.num_servers == 2


@given(st.lists(st.tuples(spans, st.none() | spans, st.integers(0, 9)), max_size=8), st.integers())
@settings(max_examples=50)
def test_later_claims_are_undone(swarm, own_ms: int) -> None:
    own_ms = own_ms % 10

    def load(keeps):
        said = {}
        for number, ((start, end, speed), claimed, made_at_ms) in enumerate(swarm):
            claim = None if claimed is None else (*claimed[:2], made_at_ms)
            is_kept = claim is not None and keeps(made_at_ms, str(number))
            said[str(number)] = announcement(
                start, end, speed=speed, claim=claim if is_kept else None
            )
        return read_load(view_of(10, said))

    undone = load(lambda *_: True).without_claims_after(own_ms, "5")
    plain = load(lambda made_at_ms, peer: (made_at_ms, peer) <= (own_ms, "5"))
    assert undone.throughput_L == pytest.approx(plain.throughput_L, abs=1e-9)
    assert undone.planned_L.tolist() == plain.planned_L.tolist()
    assert undone.settled_L.tolist() == plain.settled_L.tolist()
    assert undone.claims == plain.claims


def test_what_was_not_measured_counts_as_typical_and_what_is_absurd_is_cut() -> None:
    said = {str(n): announcement(n, n + 1, speed=2.0) for n in range(5)}
    said["unmeasured"] = announcement(5, 6, speed=0.0)
    said["liar"] = announcement(6, 7, speed=1e12)
    load = read_load(view_of(7, said))
    assert load.throughput_L == pytest.approx([2.0] * 6 + [200.0])


def test_what_a_server_gives_is_what_it_says_and_not_its_last_step() -> None:
    said = {
        "told": replace(announcement(0, 4, speed=1.0), block_steps_per_s=8.0),
        "not told": announcement(4, 8, speed=4.0),
        "joiner": replace(
            announcement(4, 8, speed=0.0, state="loading", claim=(4, 8, 1)), block_steps_per_s=2.0
        ),
    }
    load = read_load(view_of(8, said))
    assert load.throughput_L == pytest.approx([2.0] * 4 + [1.5] * 4)


@pytest.mark.parametrize("told", [5e-324, 1e-300, 1e9])
def test_what_nobody_can_give_ends_no_decision_on_a_large_model(told: float) -> None:
    said = {
        str(number): replace(announcement(number, 250), block_steps_per_s=told)
        for number in range(3)
    }
    start, end = choose_span(read_load(view_of(250, said)), Capacity(fit=250), rng=random.Random(0))
    assert 0 <= start < end <= 250


announced_ms = st.sampled_from([0.0, 5e-324, 1e-308, 1e-300, 1e-9, 1e-3, 1.0, 1e6]) | st.floats(
    0.0, 1e6
)
announcements = st.tuples(spans, announced_ms, st.none() | spans, st.booleans())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(announcements, max_size=6),
    st.sampled_from([0.0, 5e-324, 1e-9, 1.0, 1e9]),
    st.sampled_from([1.0, 0.5, 1e-4]),
    st.sampled_from([0.0, 1e-9, 1.0, 1e9]),
    st.integers(1, 10),
)
def test_whatever_is_announced_what_is_decided_by_is_finite(
    said, told: float, share, speed, fit
) -> None:
    view = view_of(
        10,
        {
            str(number): replace(
                announcement(start, end, claim=None if claim is None else (*claim[:2], 1)),
                step_ms=step_ms,
                state="serving" if is_serving else "loading",
                block_steps_per_s=told if number % 2 else 0.0,
            )
            for number, ((start, end, _), step_ms, claim, is_serving) in enumerate(said)
        },
    )
    load = read_load(replace(view, share=share))
    assert np.isfinite(load.throughput_L).all()
    assert 0 < load.typical < np.inf
    assert all(np.isfinite(one.block_steps_per_s) for one in load.claims)
    assert all(np.isfinite(_server_status(one).steps_per_s) for one in view.servers)
    capacity, rng = Capacity(fit=fit, block_steps_per_s=speed), random.Random(0)
    choose_span(load, capacity, rng=rng)
    offers = {
        "own": ModelOffer(load=load_of(10, *[(0, 10)] * 3), capacity=capacity),
        "other": ModelOffer(load=load, capacity=capacity),
    }
    choose_model(offers, rng=rng)
    for current in offers:
        choice = ModelChoice(current, settings=ChoiceSettings(), now=0.0, rng=rng)
        choice.find_better((0, fit), offers, 1e5)
    planner = MovePlanner("me", (0, fit), capacity, settings=MoveSettings(), now=0.0, rng=rng)
    for at in (400.0, 5000.0, 6000.0):
        planner.on_load(load, at)


def test_the_model_with_uncovered_blocks_comes_first_and_then_the_hungriest() -> None:
    rng = random.Random(0)
    one = Capacity(fit=4)
    whole, half = load_of(8, (0, 8)), load_of(8, (0, 4))
    rich = load_of(8, *[(0, 8)] * 5)
    offers = {
        "whole": ModelOffer(load=whole, capacity=one),
        "half": ModelOffer(load=half, capacity=one),
    }
    assert choose_model(offers, rng=rng) == "half"
    offers = {
        "whole": ModelOffer(load=whole, capacity=one),
        "rich": ModelOffer(load=rich, capacity=one),
    }
    assert choose_model(offers, rng=rng) == "whole"
    offers["rich"] = ModelOffer(load=rich, capacity=one, demand=1000.0)
    assert choose_model(offers, rng=rng) == "rich"


def test_blocks_that_are_not_here_make_no_model_needier() -> None:
    partial = Capacity(fit=10, missing=frozenset(range(5)))
    lacking = ModelOffer(load=load_of(10, (5, 10)), capacity=partial)
    coverable = ModelOffer(load=load_of(10, (0, 7)), capacity=Capacity(fit=10))
    rng = random.Random(0)
    assert choose_model({"lacking": lacking, "coverable": coverable}, rng=rng) == "coverable"
    weak = ModelOffer(load=load_of(10, (0, 10)), capacity=Capacity(fit=10), demand=1.0)
    lacking = replace(lacking, demand=1.0)  # a fifth for each block that is here; a tenth
    assert choose_model({"lacking": lacking, "weak": weak}, rng=rng) == "weak"


def test_of_models_a_sampled_one_counts_for_all_its_servers() -> None:
    load = load_of(4, *[(0, 4)] * 10)
    sampled, whole = replace(load, share=0.1), load
    offers = {
        "sampled": ModelOffer(load=sampled, capacity=Capacity(fit=4), demand=10.0),
        "whole": ModelOffer(load=whole, capacity=Capacity(fit=4), demand=10.0),
    }
    assert {choose_model(offers, rng=random.Random(seed)) for seed in range(9)} == {"whole"}


def test_what_a_sample_lacks_is_no_gap_where_others_have_it() -> None:
    sample = replace(load_of(4, (0, 2)), share=0.1)
    assert wants_whole(sample)
    assert not wants_whole(load_of(4, (0, 2)))
    assert not wants_whole(replace(load_of(4, (0, 4)), share=0.1))
    assert wants_whole(replace(load_of(4, (0, 4)), share=0.1), is_urgent=True)
    confirmed = confirm_gaps(sample, load_of(4, (0, 2), (2, 4)))
    assert (confirmed.share, confirmed.has_gap) == (0.1, False)
    gap = load_of(4, (0, 2), (2, 3))
    assert confirm_gaps(sample, gap) is gap


@settings(max_examples=60, deadline=None)
@given(
    st.lists(spans, max_size=8),
    st.integers(1, 6),
    st.sets(st.integers(0, 9), min_size=1, max_size=9),
)
def test_only_blocks_that_are_here_are_taken(swarm, fit: int, missing: set[int]) -> None:
    capacity = Capacity(fit=fit, block_steps_per_s=1.0, missing=frozenset(missing))
    load = load_of(10, *swarm)
    start, end = choose_span(load, capacity, rng=random.Random(0))
    assert 0 < end - start <= fit
    assert not missing & set(range(start, end))
    here = [
        range(first, last)
        for first in range(10)
        for last in range(first + 1, min(10, first + fit) + 1)
        if not missing & set(range(first, last))
    ]
    empty = {block for block in range(10) if load.planned_L[block] == 0}
    assert len(empty & set(range(start, end))) == max(len(empty & set(span)) for span in here)

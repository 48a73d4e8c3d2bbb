"""When a server takes another of its models."""

from __future__ import annotations

import random

import pytest

from petald.block_load import Capacity, read_load
from petald.model_choice import ChoiceSettings, ModelChoice
from petald.span_choice import ModelOffer
from petald.swarm import Announcement, ServerState
from tests.helpers.placement_world import announcement, load_of, view_of

SETTINGS = ChoiceSettings()
OWN = (0, 10)
LATER = SETTINGS.stay_s + 1


def offer(*spans: tuple[int, int] | tuple[int, int, float], fit: int = 10) -> ModelOffer:
    return ModelOffer(load=load_of(10, *spans), capacity=Capacity(fit=fit, block_steps_per_s=10.0))


def offer_of(said: dict[str, Announcement]) -> ModelOffer:
    capacity = Capacity(fit=10, block_steps_per_s=10.0)
    return ModelOffer(load=read_load(view_of(10, said)), capacity=capacity)


def make(seed: int = 0) -> ModelChoice[str]:
    return ModelChoice("own", settings=SETTINGS, now=0.0, rng=random.Random(seed))


EVEN = offer((0, 10, 10.0), (0, 10, 10.0))
NOBODY = offer()


def test_another_model_that_nobody_serves_is_taken_after_a_second_look_by_chance() -> None:
    waits = set()
    for seed in range(20):
        choice = make(seed)
        offers = {"own": EVEN, "other": NOBODY}
        at = choice.next_deadline()
        assert choice.on_look(OWN, offers, at) is None
        waits.add(choice.next_deadline() - at)
        assert choice.on_look(OWN, offers, choice.next_deadline()) == "other"
    assert min(waits) < 0.7 * SETTINGS.confirm_s
    assert max(waits) > 1.3 * SETTINGS.confirm_s


def test_a_gap_that_somebody_claimed_between_the_two_looks_is_left_to_it() -> None:
    choice = make()
    at = choice.next_deadline()
    assert choice.on_look(OWN, {"own": EVEN, "other": NOBODY}, at) is None
    claim = announcement(0, 10, state=ServerState.LOADING, claim=(0, 10, 1))
    claimed = offer_of({"rival": claim})
    for _ in range(3):
        assert choice.on_look(OWN, {"own": EVEN, "other": claimed}, choice.next_deadline()) is None
    # and what was seen before counts no more
    assert choice.on_look(OWN, {"own": EVEN, "other": NOBODY}, choice.next_deadline()) is None


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (offer((0, 9)), "its last block has nobody else"),
        (offer((0, 10), (0, 5)), "half of its blocks have nobody else who stays"),
        (offer(), "nobody else is there"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_blocks_that_nobody_else_serves_are_not_left(own: ModelOffer, why: str) -> None:
    if why.startswith("half"):
        leaving = announcement(0, 10, claim=(0, 5, 1))
        own = offer_of({"leaves": leaving, "stays": announcement(0, 5)})
    choice = make()
    assert choice.find_better(OWN, {"own": own, "other": NOBODY}, LATER) is None


def test_a_gap_in_the_own_model_is_the_nearer_one() -> None:
    own = offer((0, 5), (0, 5))
    assert make().find_better((0, 5), {"own": own, "other": NOBODY}, LATER) is None
    assert make().find_better((5, 10), {"own": own, "other": NOBODY}, LATER) is None


def test_a_gap_in_blocks_that_are_not_here_keeps_nobody() -> None:
    capacity = Capacity(fit=10, block_steps_per_s=10.0, missing=frozenset(range(5)))
    own = ModelOffer(load=load_of(10, (5, 10, 10.0)), capacity=capacity)
    assert make().find_better((5, 10), {"own": own, "other": offer((0, 7))}, 61.0) == "other"
    unlike = {"own": EVEN, "other": own}
    assert make().find_better(OWN, unlike, LATER) is None


def test_a_model_is_kept_for_a_while_unless_another_one_has_a_gap() -> None:
    weak = offer((0, 10, 1.0))
    choice = make()
    early = SETTINGS.urgent_stay_s + 1
    assert choice.find_better(OWN, {"own": EVEN, "other": weak}, early) is None
    assert choice.find_better(OWN, {"own": EVEN, "other": weak}, LATER) == "other"
    assert choice.find_better(OWN, {"own": EVEN, "other": NOBODY}, early) == "other"
    at_once = SETTINGS.urgent_stay_s - 1
    assert choice.find_better(OWN, {"own": EVEN, "other": NOBODY}, at_once) is None


def test_what_would_weaken_the_own_model_as_much_is_not_done() -> None:
    alike = {"own": offer((0, 10, 10.0)), "other": offer((0, 10, 10.0))}
    assert make().find_better(OWN, alike, LATER) is None
    worse = {"own": offer((0, 10, 1.0)), "other": offer((0, 10, 5.0))}
    assert make().find_better(OWN, worse, LATER) is None
    better = {"own": offer((0, 10, 10.0)), "other": offer((0, 10, 5.0))}
    assert make().find_better(OWN, better, LATER) == "other"


def test_of_several_the_one_with_most_to_cover_comes_first() -> None:
    offers = {"own": EVEN, "half": offer((0, 5)), "none": NOBODY, "small": offer(fit=0)}
    assert make().find_better(OWN, offers, LATER) == "none"


def test_a_change_that_was_given_up_is_thought_over_anew() -> None:
    choice = make()
    offers = {"own": EVEN, "other": NOBODY}
    choice.on_look(OWN, offers, choice.next_deadline())
    assert choice.on_look(OWN, offers, choice.next_deadline()) == "other"
    choice.on_stayed(1000.0)
    assert choice.next_deadline() > 1000.0
    assert choice.on_look(OWN, offers, choice.next_deadline()) is None

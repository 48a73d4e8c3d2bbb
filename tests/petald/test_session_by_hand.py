"""Single cases of the session's state machine, event by event."""

from __future__ import annotations

import pytest

from petald import session_actions as do
from petald.session import OPEN_S
from tests.helpers.session_by_hand import SessionByHand, hop_at
from tests.helpers.session_rows import SimRows

A, B = hop_at("A", 0, 4), hop_at("B", 4, 8)
C, D, E = hop_at("C", 0, 3), hop_at("D", 3, 6), hop_at("E", 6, 8)


def test_a_session_that_fell_idle_rests_until_it_is_used() -> None:
    hand = SessionByHand()
    hops = hand.open(C, D, E)
    hand.fill(hops, 200)
    for hop in hops:
        hand.feed("on_step_failed", hop, 0, "session_idle", "it was idle for too long", None)
        assert not hand.found(do.NeedChain)
        assert not hand.found(do.Penalise)
    assert hand.session.next_deadline() == float("inf")
    hand.pass_time(3600.0)
    assert not hand.last
    hand.submit(200, 1)
    questions = hand.found(do.NeedChain)
    assert [(each.start, each.end) for each in questions] == [(0, 3), (3, 6), (6, 8)]
    hand.feed("on_chain", questions[0].question, (C,))
    opened = hand.asked()
    hand.feed("on_chain", questions[1].question, (D,))
    opened += hand.asked()
    hand.feed("on_chain", questions[2].question, (E,))
    opened += hand.asked()
    sent: list[do.SendStep] = []
    for hop in opened:
        sent += _steps(hand.link_all(hand.feed("on_opened", hop, 128)))
    # Each is replayed what crossed the border before it.
    assert sorted((step.hop, step.position) for step in sent) == [
        (hop, position) for hop in opened for position in (0, 128)
    ]
    for step in sent:
        hand.feed("on_result", step.hop, step.number, None, ())
    assert hand.session.is_running
    assert [step.position for step in hand.found(do.SendStep)] == [200]
    hand.answer(opened, hand.found(do.SendStep)[0])
    assert len(hand.found(do.StepDone)) == 1


def _steps(actions: list[do.Action]) -> list[do.SendStep]:
    return [action for action in actions if isinstance(action, do.SendStep)]


def test_a_leaver_that_a_better_chain_was_to_replace_is_replaced_when_that_fails() -> None:
    hand = SessionByHand()
    hops = hand.open(A, B)
    hand.fill(hops, 300)
    hand.feed("propose", [hop_at("N", 0, 8)])
    (better,) = hand.asked()
    hand.feed("on_leaving", hops[1])
    assert not hand.found(do.NeedChain)
    hand.feed("on_hop_failed", better, "overloaded", "full")
    (question,) = hand.found(do.NeedChain)
    assert (question.start, question.end) == (4, 8)
    assert "B" in question.excluded


def test_two_losses_of_one_link_that_worked_in_between_blame_nobody() -> None:
    hand = SessionByHand()
    hops = hand.open(A, B)
    hand.fill(hops, 10)
    for position in range(10, 500):
        hand.submit(position, 1)
        (step,) = hand.found(do.SendStep)
        if position in (10, 499):
            hand.feed("on_step_failed", hops[0], step.number, "next_hop_lost", "it broke", "B")
            assert not hand.found(do.Penalise)
            (step,) = _steps(hand.link_all(hand.last))
        hand.answer(hops, step)
        hand.now += 1.0
    assert hand.session.counts.relinks == 2
    # Without a step in between, it is held against the next hop.
    hand.submit(500, 1)
    (step,) = hand.found(do.SendStep)
    hand.feed("on_step_failed", hops[0], step.number, "next_hop_lost", "it broke", "B")
    (step,) = _steps(hand.link_all(hand.last))
    hand.feed("on_step_failed", hops[0], step.number, "next_hop_lost", "it broke", "B")
    assert [each.peer for each in hand.found(do.Penalise)] == ["B"]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_server_that_takes_single_tokens_only_is_not_used(is_first: bool) -> None:
    hand = SessionByHand()
    hand.feed("start")
    if is_first:
        asked = hand.choose(A, B, opens=False)
        hand.feed("on_opened", asked[0], 128)
        hand.feed("on_opened", asked[1], 1)
    else:
        hops = hand.choose(A, B)
        hand.fill(hops, 10)
        hand.feed("on_hop_failed", hops[1], "stream_broken", "it is gone")
        (asked_b,) = hand.choose(hop_at("F", 4, 8), opens=False)
        hand.feed("on_opened", asked_b, 1)
    assert not hand.session.is_running
    (question,) = hand.found(do.NeedChain)
    assert ("B" if is_first else "F") in question.excluded
    assert not hand.found(do.Penalise)


def test_a_step_that_begins_within_one_under_way_has_the_rest_of_that_done_first() -> None:
    hand = SessionByHand()
    hops = hand.open(A, B)
    hand.fill(hops, 100)
    lost = hand.submit(100, 16)
    (whole,) = hand.found(do.SendStep)
    ticket = hand.submit(110, 3)
    assert hand.found(do.StepLost) == [do.StepLost(lost)]
    rest, step = hand.found(do.SendStep)
    assert (rest.position, rest.hidden.shape[0], rest.wanted) == (100, 10, "none")
    assert (step.position, step.hidden.shape[0]) == (110, 3)
    hand.answer(hops, whole)  # it was on its way, and counts no more
    hand.answer(hops, rest)
    (done,) = [each for each in hand.answer(hops, step) if isinstance(each, do.StepDone)]
    assert done.ticket == ticket
    # All of it survives a failure.
    hand.feed("on_hop_failed", hops[1], "stream_broken", "it is gone")
    (new,) = hand.choose(hop_at("F", 4, 8))
    assert [step.hidden.shape[0] for step in _steps(hand.last)] == [113]
    hand.feed("on_result", new, _steps(hand.last)[0].number, None, ())
    assert hand.session.is_running
    assert not hand.found(do.SendStep)


def test_what_remains_of_a_taken_back_step_is_sent_before_the_next_after_a_failure() -> None:
    hand = SessionByHand()
    hops = hand.open(A, B)
    hand.fill(hops, 100)
    for position in (100, 116):
        hand.submit(position, 16)
    hand.submit(120, 3)
    hand.feed("on_hop_failed", hops[0], "stream_broken", "it is gone")
    (new,) = hand.choose(hop_at("F", 0, 4))
    (replayed,) = _steps(hand.last)
    hand.feed("on_result", new, replayed.number, None, ())
    assert [(step.position, step.hidden.shape[0]) for step in hand.found(do.SendStep)] == [
        (100, 16),
        (116, 4),
        (120, 3),
    ]


def test_a_step_that_was_lost_after_a_slow_hop_is_missed_at_the_next() -> None:
    hand = SessionByHand()
    hops = hand.open(A, B)
    for position in range(10):
        hand.submit(position, 1)
        (step,) = hand.found(do.SendStep)
        hand.now += 0.01
        hand.answer(hops, step)
    hand.submit(10, 1)
    (step,) = hand.found(do.SendStep)
    # The first hop is slow; the second one, which might be why, is asked too.
    hand.now = hand.session.next_deadline()
    hand.feed("on_timer")
    probes = hand.found(do.SendProbe)
    assert [each.hop for each in probes] == hops
    for probe in probes:
        hand.feed("on_probe_reply", probe.hop, probe.request, 11 if probe.hop == hops[0] else 10)
    # Then it is done there, but what it pushed is lost.
    hand.feed("on_output", hops[0], step.number, SimRows((1,)))
    began_at = hand.now
    while not hand.found(do.SendLinkNext):
        assert hand.session.next_deadline() < began_at + 10.0
        hand.now = hand.session.next_deadline()
        hand.feed("on_timer")
        for probe in hand.found(do.SendProbe):
            assert probe.hop == hops[1]
            hand.feed("on_probe_reply", probe.hop, probe.request, 10)
    assert not [each for each in hand.all if isinstance(each, do.Penalise)]
    (again,) = _steps(hand.link_all(hand.last))
    assert again.position == 10


def _lie_in_turn(hand: SessionByHand, peers: str) -> None:
    """Lets hops for the last blocks come one after the other, and each say nonsense."""
    for peer in peers:
        assert not hand.session.has_ended
        (hop,) = hand.choose(hop_at(peer, 4, 8))
        (step,) = _steps(hand.all)[-1:]
        hand.feed("on_result", hop, step.number, SimRows((1,) * 300), ())
        hand.now += 5.0


def test_one_that_lies_again_and_again_does_not_end_a_session_that_waits_for_others() -> None:
    hand = SessionByHand(max_wait_s=60.0)
    hops = hand.open(A, B)
    hand.submit(0, 10)
    hand.feed("on_result", hops[1], 1, SimRows((1,) * 300), ())
    _lie_in_turn(hand, "FGFGFGFG")
    assert not hand.session.has_ended
    (honest,) = hand.choose(B)
    (step,) = _steps(hand.all)[-1:]
    hand.answer([hops[0], honest], step)
    assert len(hand.found(do.StepDone)) == 1


@pytest.mark.parametrize(("peers", "max_wait_s"), [("FGHI", 60.0), ("FGFG", 10.0)])
def test_a_session_that_nobody_can_serve_ends(peers: str, max_wait_s: float) -> None:
    hand = SessionByHand(max_wait_s=max_wait_s)
    hops = hand.open(A, B)
    hand.submit(0, 10)
    hand.feed("on_result", hops[1], 1, SimRows((1,) * 300), ())
    _lie_in_turn(hand, peers)
    assert len(hand.found(do.Ended)) == 1


def test_a_hop_is_not_blamed_for_next_hops_that_were_lost_long_apart() -> None:
    hand = SessionByHand()
    hops = hand.open(A, B)
    position, blamed = 0, []
    for successor in "FG":
        for _ in range(20):
            hand.submit(position, 1)
            hand.answer(hops, hand.found(do.SendStep)[0])
            position += 1
        hand.submit(position, 1)
        (step,) = hand.found(do.SendStep)
        position += 1
        hand.feed("on_step_failed", hops[0], step.number, "next_hop_lost", "it is gone", None)
        (link,) = hand.found(do.SendLinkNext)
        hand.feed("on_link_failed", hops[0], link.request, "next_hop_lost", "nobody answers")
        blamed += [each.peer for each in hand.found(do.Penalise)]
        (hops[1],) = hand.choose(hop_at(successor, 4, 8))
        (replayed,) = _steps(hand.last)
        hand.feed("on_result", hops[1], replayed.number, None, ())
        hand.answer(hops, hand.found(do.SendStep)[0])
        hand.now += 3600.0
    assert blamed == ["B", "F"]


def test_a_hop_that_links_with_nobody_is_found_out_while_a_session_opens() -> None:
    hand = SessionByHand()
    hand.feed("start")
    for successor in "BF":
        opened = hand.choose(A, hop_at(successor, 4, 8), opens=False)
        for hop in opened:
            hand.feed("on_opened", hop, 128)
        (link,) = hand.found(do.SendLinkNext)
        hand.feed("on_link_failed", opened[0], link.request, "next_hop_lost", "a lie")
    assert [each.peer for each in hand.all if isinstance(each, do.Penalise)] == ["B", "A"]


def test_who_does_not_push_all_steps_is_found_out_by_what_the_next_hops_miss() -> None:
    hand = SessionByHand()
    hops = hand.open(A, B)
    hand.fill(hops, 100)
    hand.submit(100, 1)
    (step,) = hand.found(do.SendStep)
    for successor in "FG":
        # First the link is made anew, then it is held against the next hop.
        text = "a step at position 100 came, but only 64 tokens are cached"
        hand.feed("on_step_failed", hops[1], step.number, "bad_request", text, None)
        assert not hand.found(do.CloseHop)
        (step,) = _steps(hand.link_all(hand.last))
        hand.feed("on_step_failed", hops[1], step.number, "bad_request", text, None)
        (closed,) = hand.found(do.CloseHop)
        if successor == "G":
            assert closed.hop == hops[0]  # of two in turn
            break
        assert closed.hop == hops[1]
        (hops[1],) = hand.choose(hop_at(successor, 4, 8))
        (replayed,) = _steps(hand.last)
        hand.feed("on_result", hops[1], replayed.number, None, ())
        (step,) = hand.found(do.SendStep)


def test_a_number_that_was_never_sent_is_blamed_on_who_pushed_it_first() -> None:
    hand = SessionByHand()
    hops = hand.open(hop_at("evil", 0, 2), hop_at("B", 2, 4), hop_at("C", 4, 6), hop_at("D", 6, 8))
    hand.fill(hops, 10)
    hand.submit(10, 1)
    for hop in hops[1:3]:  # each passes on what it was pushed
        hand.feed("on_output", hop, 2**53, SimRows((1,)))
    hand.feed("on_result", hops[3], 2**53, SimRows((1,)), ())
    assert [each.peer for each in hand.all if isinstance(each, do.Penalise)] == ["evil"]
    # Those behind take no lower number now, and are made anew; the first victim needs only a link.
    closed = [each.hop for each in hand.all if isinstance(each, do.CloseHop)]
    assert closed == [hops[0], hops[2], hops[3]]


def test_a_hop_that_needs_something_first_has_the_time_for_it() -> None:
    for needs_s in (0.0, 30.0):
        hand = SessionByHand()
        hand.feed("start")
        (hop,) = hand.choose(hop_at("A", 0, 8), opens=False)
        if needs_s:
            hand.feed("on_opening_takes", hop, needs_s)
        hand.pass_time(needs_s + OPEN_S - 0.1)
        assert not hand.found(do.CloseHop)
        hand.pass_time(0.2)
        assert [closed.hop for closed in hand.found(do.CloseHop)] == [hop]
        hand.feed("on_opening_takes", hop, needs_s)  # too late: it is gone
        assert not hand.last

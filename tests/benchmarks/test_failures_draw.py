"""The failures that a benchmark draws: as many as are due, anywhere, the same each time."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.failures_draw import (
    HOPS,
    Failures,
    Strike,
    count_expected,
    draw_failures,
    match_moves,
)
from p2p.wire.control_messages import ChainMove


def count(failures: Failures) -> int:
    return sum(map(len, failures.values()))


@pytest.mark.parametrize("length", [1, 32, 128, 1024])
@pytest.mark.parametrize("probability", [0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_failures_are_as_many_as_are_due(length: int, probability: float, rounds: int) -> None:
    drawn = draw_failures(length, probability, rounds)
    counts = [count(failures) for failures in drawn]
    assert len(counts) == rounds
    assert sum(counts) == round(count_expected(length, probability, rounds))
    assert max(counts) - min(counts) <= 1
    for failures in drawn:
        for step, hops in failures.items():
            assert 0 <= step < length
            assert hops == sorted(set(hops))
            assert set(hops) <= set(range(HOPS))


def test_a_draw_is_repeated_by_its_seed() -> None:
    assert draw_failures(128, 1e-2, 8, seed=1) == draw_failures(128, 1e-2, 8, seed=1)
    assert draw_failures(128, 1e-2, 8, seed=1) != draw_failures(128, 1e-2, 8, seed=2)


def test_draws_reach_every_step_hop_and_round() -> None:
    seen = [
        (number, step, hop)
        for seed in range(300)
        for number, failures in enumerate(draw_failures(10, 0.02, 3, seed))
        for step, hops in failures.items()
        for hop in hops
    ]
    assert set(seen) == set(itertools.product(range(3), range(10), range(HOPS)))


def move(start: int, end: int, old: str, reason: str = "stream_broken") -> ChainMove:
    return ChainMove(
        start=start, end=end, old=tuple(old), new=("z",), reason=reason, silent_s=0.0, pause_s=0.1
    )


FIRST, SECOND = Strike(3, 0, 5, "a"), Strike(3, 1, 15, "b")


@pytest.mark.parametrize(
    ("strikes", "moves", "unseen", "unexplained"),
    [
        ([FIRST], [move(0, 10, "a")], [], 0),
        ([FIRST, SECOND], [move(0, 20, "ab")], [], 0),
        ([FIRST, SECOND], [move(10, 20, "b")], [FIRST], 0),
        ([FIRST, Strike(4, 0, 5, "a")], [move(0, 10, "a")], [Strike(4, 0, 5, "a")], 0),
        ([FIRST], [move(0, 10, "c")], [FIRST], 1),
        ([FIRST], [move(0, 10, "a", "better")], [FIRST], 1),
        ([FIRST], [move(0, 10, "a"), move(10, 20, "b")], [], 1),
        ([], [], [], 0),
    ],
    ids=[
        "shown",
        "one move shows two at once",
        "one of two is missing",
        "a second strike on who is gone",
        "another was moved",
        "moved by wish",
        "a move beside it",
        "nothing",
    ],
)
def test_moves_show_strikes(
    strikes: list[Strike], moves: list[ChainMove], unseen: list[Strike], unexplained: int
) -> None:
    left, others = match_moves(strikes, moves)
    assert left == unseen
    assert len(others) == unexplained

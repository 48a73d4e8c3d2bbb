"""Which hop fails at which step, and what of it a session's moves show; pure.

By independent chance a benchmark of a few runs draws far fewer failures, or more, than are to be
expected: three runs of 128 tokens at 0.001 often have none. Here the number in all rounds together
is the expected one, rounded. The failures are dealt to the rounds as evenly as can be; steps and
hops are random, one from each of as many equal parts of all there are.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from p2p.wire.control_messages import ChainMove

HOPS = 3

Failures = dict[int, list[int]]
"""For each step, the hops that fail in it."""

WISHES = frozenset({"better", "leaving"})
"""Reasons to move that are no failure."""


@dataclass(frozen=True)
class Strike:
    """A failure that was caused.

    Attributes:
        block: one that the hop ran.
        peer: the server that ran it.
    """

    step: int
    hop: int
    block: int
    peer: str


def count_expected(length: int, probability: float, rounds: int) -> float:
    """How many failures all rounds together have by chance, on average."""
    return HOPS * length * probability * rounds


def draw_failures(length: int, probability: float, rounds: int, seed: int = 0) -> list[Failures]:
    """Draws the failures of every round; the same for the same arguments."""
    rng = random.Random(f"{length} {probability} {rounds} {seed}")
    total = round(count_expected(length, probability, rounds))
    places = _draw_places(HOPS * length, total, rng)
    order = rng.sample(range(rounds), rounds)
    drawn: list[set[int]] = [set() for _ in range(rounds)]
    for place in places:
        chosen = min((n for n in order if place not in drawn[n]), key=lambda n: len(drawn[n]))
        drawn[chosen].add(place)
    return [_by_step(places) for places in drawn]


def _draw_places(places: int, total: int, rng: random.Random) -> list[int]:
    """One at random from each of ``total`` equal parts, in no order."""
    edges = [part * places // total for part in range(total + 1)] if total else []
    drawn = [rng.randrange(start, max(end, start + 1)) for start, end in itertools.pairwise(edges)]
    rng.shuffle(drawn)
    return drawn


def _by_step(places: Iterable[int]) -> Failures:
    failures: Failures = {}
    for place in sorted(places):
        failures.setdefault(place // HOPS, []).append(place % HOPS)
    return failures


def match_moves(
    strikes: Sequence[Strike], moves: Sequence[ChainMove]
) -> tuple[list[Strike], list[ChainMove]]:
    """Tells the strikes that no move shows, and the moves that no strike explains.

    A move shows a strike if it took the struck block from the struck peer. Of the strikes on one
    hop it shows the first that is left; of strikes on several hops at once it may show all.
    """
    unseen = list(strikes)
    unexplained = []
    for move in moves:
        shown: dict[int, Strike] = {}
        for strike in unseen:
            if move.start <= strike.block < move.end and strike.peer in move.old:
                shown.setdefault(strike.hop, strike)
        if not shown or move.reason in WISHES:
            unexplained.append(move)
        else:
            unseen = [strike for strike in unseen if strike not in shown.values()]
    return unseen, unexplained

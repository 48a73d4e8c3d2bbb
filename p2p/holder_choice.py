"""Which of a key's holders to ask, and how many at once.

Pure. Under a model's only key all are asked but liars and those that hang, as there are few
records; three at least, so that nobody who has the others taken for bad is asked alone. Of a
shard's a reader that remembers the shard asks one, drawn anew at each read: what that one
withholds, others have told shortly before or will tell at the next read. Who did badly is asked
last for a while.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import IntEnum

HOLDERS = 8
"""Peers that keep each record: with half of them gone between two announcements, as in the worst
churn that Kademlia's paper reports, one is left in 255 of 256 cases."""

COLD_ASKED = 3
"""Holders of a shard that a reader asks which knows nothing of it: with one in five lying, two good
ones are among them in 90 of 100 cases."""

WARM_ASKED = 1
MORE_ASKED = 2
"""At each further round, while those before have not told enough."""

REMEMBERED_S = 300.0
MAX_REMEMBERED = 4096


class Standing(IntEnum):
    """How a holder did lately; who did worse is asked later."""

    GOOD = 0
    LACKING = 1
    """It withheld, or has come near the key just now."""
    SILENT = 2
    """It did not answer, or listed what it then did not give in time."""
    LIAR = 3
    """It gave what no author signed, or what nobody asked for."""


class HolderBook:
    """Which holders did badly lately."""

    def __init__(self) -> None:
        self._bad: dict[str, tuple[Standing, float]] = {}

    def note(self, holder: str, standing: Standing, now: float) -> None:
        """How a holder did now."""
        self._bad.pop(holder, None)
        if standing == Standing.GOOD:
            return
        if len(self._bad) >= MAX_REMEMBERED:
            del self._bad[next(iter(self._bad))]
        self._bad[holder] = standing, now

    def standing(self, holder: str, now: float) -> Standing:
        """How a holder did when it was asked last."""
        standing, at = self._bad.get(holder, (Standing.GOOD, now))
        return standing if now - at < REMEMBERED_S else Standing.GOOD

    def order(self, holders: Sequence[str], now: float, *, rng: random.Random) -> list[str]:
        """In which order to ask: by how they did, and then by chance."""
        shuffled = rng.sample(holders, len(holders))
        return sorted(shuffled, key=lambda holder: self.standing(holder, now))


def asked_at_once(*, is_first: bool, is_cold: bool, is_shard: bool, trusted: int) -> int:
    """How many holders to ask in one round.

    Args:
        is_first: whether it is the first round of a read.
        is_cold: whether nothing is remembered of the key.
        is_shard: whether the key is one of several of its model.
        trusted: holders that are known neither as liars nor as silent.
    """
    if not is_shard:
        return max(trusted, COLD_ASKED) if is_first else HOLDERS
    if not is_first:
        return MORE_ASKED
    return COLD_ASKED if is_cold else WARM_ASKED

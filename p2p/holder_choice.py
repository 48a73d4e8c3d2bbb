"""Which of a key's holders to ask, and how many at once.

Pure. Under a model's only key all are asked, as there are few records. Of a shard's holders a
reader that remembers the shard asks one, drawn anew at each read: what that one withholds, others
have told shortly before or will tell at the next read. Who did badly is asked last for a while.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

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


class HolderBook:
    """Which holders did badly lately."""

    def __init__(self) -> None:
        self._bad_since: dict[str, float] = {}

    def note(self, good: Iterable[str], bad: Iterable[str], now: float) -> None:
        """How holders did: the bad ones did not answer, lied, or withheld."""
        for holder in good:
            self._bad_since.pop(holder, None)
        for holder in bad:
            if len(self._bad_since) >= MAX_REMEMBERED:
                del self._bad_since[next(iter(self._bad_since))]
            self._bad_since.pop(holder, None)
            self._bad_since[holder] = now

    def order(self, holders: Sequence[str], now: float, *, rng: random.Random) -> list[str]:
        """In which order to ask: by chance, and who did badly last."""
        shuffled = rng.sample(holders, len(holders))
        return sorted(shuffled, key=lambda holder: self._is_bad(holder, now))

    def _is_bad(self, holder: str, now: float) -> bool:
        return now - self._bad_since.get(holder, -REMEMBERED_S) < REMEMBERED_S


def asked_at_once(*, is_first: bool, is_cold: bool, is_shard: bool) -> int:
    """How many holders to ask in one round.

    Args:
        is_first: whether it is the first round of a read.
        is_cold: whether nothing is remembered of the key.
        is_shard: whether the key is one of several of its model.
    """
    if not is_shard:
        return HOLDERS
    if not is_first:
        return MORE_ASKED
    return COLD_ASKED if is_cold else WARM_ASKED

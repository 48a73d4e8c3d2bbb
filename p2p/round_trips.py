"""Round trips to other peers, as they were last measured. Pure and bounded.

What is wanted is how far a peer is. A busy machine at either end makes a round trip longer, and
nothing makes it shorter; so the least of the last few counts.
"""

from __future__ import annotations

from collections import OrderedDict, deque

MAX_PEERS = 4096
KEPT = 3
"""Measurements of a peer: a minute apart, a way that became longer is known after some minutes."""


class RoundTrips:
    """The least of the last few for each peer; the peer measured longest ago is forgotten first."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[str, deque[float]] = OrderedDict()

    def add(self, peer: str, seconds: float) -> None:
        """Takes a measurement."""
        measured = self._seconds.pop(peer, deque(maxlen=KEPT))
        measured.append(seconds)
        self._seconds[peer] = measured
        if len(self._seconds) > MAX_PEERS:
            self._seconds.popitem(last=False)

    def get(self, peer: str) -> float | None:
        """The round trip, in seconds; none where it was never measured."""
        measured = self._seconds.get(peer)
        return None if measured is None else min(measured)

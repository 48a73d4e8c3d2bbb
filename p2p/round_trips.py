"""Round trips to other peers, as they were last measured. Pure and bounded."""

from __future__ import annotations

from collections import OrderedDict

MAX_PEERS = 4096
WEIGHT = 0.5
"""Of the newest measurement; pings are rare, so the average must follow quickly."""


class RoundTrips:
    """A moving average for each peer; the peer measured longest ago is forgotten first."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[str, float] = OrderedDict()

    def add(self, peer: str, seconds: float) -> None:
        """Takes a measurement."""
        before = self._seconds.pop(peer, seconds)
        self._seconds[peer] = WEIGHT * seconds + (1 - WEIGHT) * before
        if len(self._seconds) > MAX_PEERS:
            self._seconds.popitem(last=False)

    def get(self, peer: str) -> float | None:
        """The average; none where it was never measured."""
        return self._seconds.get(peer)

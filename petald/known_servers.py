"""The servers of one model that were heard of, and for how long they are believed to be there.

Pure. One lookup may miss a record whose holders do not answer just now; so a server is remembered
until its announcement would have expired, whoever tells of it. Invariant: of a peer's announcements
the newest that was seen is kept, and none beyond its time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from petald.swarm import Announcement


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """An announcement, as it was heard first.

    Attributes:
        peer: whose.
        sequence: of two, the higher is the newer.
        announcement: what it said.
        heard_at: when.
    """

    peer: str
    sequence: int
    announcement: Announcement
    heard_at: float


class KnownServers:
    """What was heard of one model's servers.

    Args:
        ttl_s: for how long an announcement holds.
    """

    def __init__(self, *, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._heard: dict[str, Heard] = {}

    def take(self, told: Iterable[Heard], now: float) -> tuple[Heard, ...]:
        """Takes what a lookup gave; gives all that is known and holds now."""
        for one in told:
            before = self._heard.get(one.peer)
            if before is None or before.sequence < one.sequence:
                self._heard[one.peer] = one
        self._heard = {
            peer: one for peer, one in self._heard.items() if now - one.heard_at <= self._ttl_s
        }
        return tuple(self._heard.values())

"""Where peers listen: what each said itself, and what others say of it. Pure and bounded.

Two things are a peer's own word: its announcement in the directory, and the signed record of
libp2p. Each replaces the one before it of its kind; they are kept apart, since either may be the
older one, or an old one that somebody gave out again. What others say is a hint, and comes last.
Invariant: nothing that others say removes, or comes before, what a peer said itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from enum import Enum

from p2p.addresses import keep_dialable

MAX_ADDRESSES = 16
"""Of one peer, by its own word."""

MAX_HINTS = 4
"""Of one peer: each that is wrong costs those who dial it a fraction of a second."""

MAX_PEERS = 4096
"""For each source; the peer heard of longest ago is forgotten first."""


class Source(Enum):
    """Who says it, the most trustworthy first."""

    DIRECTORY = "directory"
    RECORD = "record"
    HINT = "hint"


class AddressBook:
    """Addresses of peers, each with its source and an end."""

    def __init__(self) -> None:
        self._known: dict[Source, OrderedDict[str, tuple[float, tuple[str, ...]]]] = {
            source: OrderedDict() for source in Source
        }

    def add(
        self, peer: str, addresses: Iterable[str], source: Source, *, now: float, ttl_s: float
    ) -> None:
        """Takes what was said of a peer; nothing changes where no address in it can be dialled.

        The peer's own word replaces what was known from the same source, and all hints. Hints are
        kept beside the last few, newest first.
        """
        limit = MAX_HINTS if source is Source.HINT else MAX_ADDRESSES
        kept = keep_dialable(addresses, limit)
        if not kept:
            return
        if source is Source.HINT:
            kept = tuple(dict.fromkeys((*kept, *self._get(peer, source, now))))[:limit]
        else:
            self.forget_hints(peer)
        table = self._known[source]
        table[peer] = (now + ttl_s, kept)
        table.move_to_end(peer)
        if len(table) > MAX_PEERS:
            table.popitem(last=False)

    def forget_hints(self, peer: str) -> None:
        """Drops what others said of a peer."""
        self._known[Source.HINT].pop(peer, None)

    def get(self, peer: str, *, now: float) -> tuple[str, ...]:
        """Where to dial a peer, best first, each address once."""
        found = (address for source in Source for address in self._get(peer, source, now))
        return tuple(dict.fromkeys(found))

    def _get(self, peer: str, source: Source, now: float) -> tuple[str, ...]:
        ends_at, addresses = self._known[source].get(peer, (now, ()))
        return addresses if now < ends_at else ()

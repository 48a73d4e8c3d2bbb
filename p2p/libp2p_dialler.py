"""Dialling with libp2p: which addresses of a peer to try, and in which order.

Upstream (py-libp2p 0.8.1) dials only the first TCP address that its peer store has of a peer, and
that store appends: what anybody says of a peer, through Kademlia too, stays beside, or before, what
the peer says itself, and one wrong address makes it unreachable; one failure, for a minute. So both
are replaced here, for all of libp2p. Remove when upstream tries every address, and knows a peer's
own word from hearsay. Invariant: a caller who gives up, or an address that hangs, ends no dial of
another caller or address.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache

import trio
from libp2p.abc import INetConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.envelope import Envelope
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore, PeerStoreError
from multiaddr import Multiaddr

from p2p.address_book import MAX_HINTS, AddressBook, Source
from p2p.addresses import keep_dialable

HEAD_START_S = 0.25
"""Of each address before the next one is tried too: RFC 8305's Connection Attempt Delay."""

ADDRESS_TTL_S = 3600.0

MAX_READ = 64
"""Addresses looked at in one message; most of them may be of kinds that cannot be dialled here."""

_parse_multiaddr = lru_cache(maxsize=4096)(Multiaddr)


class Peers(PeerStore):
    """Upstream's peer store, with addresses that are the peers' own word before all others."""

    def __init__(self) -> None:
        super().__init__()
        self._book = AddressBook()

    def learn(self, peer_id: ID, addresses: Sequence[str]) -> None:
        """Takes what a peer announced in the directory."""
        self._add(peer_id, addresses, Source.DIRECTORY, ADDRESS_TTL_S)

    def known_addresses(self, peer_id: ID) -> tuple[str, ...]:
        """Where to dial a peer, best first."""
        return self._book.get(str(peer_id), now=time.monotonic())

    # What libp2p calls.

    def addrs(self, peer_id: ID) -> list[Multiaddr]:
        """Where to dial a peer, best first."""
        known = self.known_addresses(peer_id)
        if not known and peer_id not in self.peer_data_map:
            raise PeerStoreError("this peer is not known")
        return [_parse_multiaddr(address) for address in known]

    def add_addrs(self, peer_id: ID, addrs: Sequence[Multiaddr], ttl: int = 0) -> None:
        """Takes hearsay: what Kademlia's other nodes say, and what was to be dialled."""
        self._add(peer_id, addrs, Source.HINT, min(ttl or ADDRESS_TTL_S, ADDRESS_TTL_S))

    def clear_addrs(self, peer_id: ID) -> None:
        """Drops hearsay: a dial that met somebody else asks for it, and so does identify."""
        self._book.forget_hints(str(peer_id))

    def consume_peer_record(self, envelope: Envelope, ttl: int) -> bool:
        """Takes a record with the peer's own signature, by identify or Kademlia."""
        if not super().consume_peer_record(envelope, ttl):
            return False
        record = envelope.record()
        self._add(record.peer_id, record.addrs, Source.RECORD, ADDRESS_TTL_S)
        return True

    def _add(
        self, peer_id: ID, addresses: Sequence[str | Multiaddr], source: Source, ttl_s: float
    ) -> None:
        texts = _readable(addresses)
        self._book.add(str(peer_id), texts, source, now=time.monotonic(), ttl_s=ttl_s)
        super().add_addrs(peer_id, [], int(ADDRESS_TTL_S))
        # The rest of upstream's store looks at a copy; it may just have forgotten this peer.
        if peer_id in self.peer_data_map:
            self.peer_data_map[peer_id].addrs = self.addrs(peer_id)


def _readable(addresses: Sequence[str | Multiaddr]) -> list[str]:
    """The addresses that libp2p and we understand alike, as text."""
    texts = []
    for address in addresses[:MAX_READ]:
        try:
            (text,) = keep_dialable((str(address),), 1)
            _parse_multiaddr(text)
        except Exception:  # multiaddr raises many classes for what it cannot read
            continue
        texts.append(text)
    return texts


class _Attempt:
    """A dial of one address, for which others may wait too."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.error: Exception | None = None


class Dialler:
    """Connects to peers, in place of the swarm's own `dial_peer`.

    Args:
        swarm: libp2p's; from now on it dials through this object.
        peers: its peer store.
    """

    def __init__(self, swarm: Swarm, peers: Peers) -> None:
        self._swarm = swarm
        self._peers = peers
        self._under_way: dict[tuple[ID, str], _Attempt] = {}
        swarm.dial_peer = self.dial  # type: ignore[method-assign]

    async def dial(self, peer_id: ID, hints: Sequence[str] = ()) -> list[INetConn]:
        """Gives the open connections to a peer, or makes one at the first address that answers.

        Args:
            peer_id: who must be there.
            hints: addresses to try after the known ones.

        Raises:
            SwarmException: no address is known, or none leads to the peer.
        """
        if connections := self._open_connections(peer_id):
            return connections
        hints = keep_dialable(hints, MAX_HINTS)
        addresses = tuple(dict.fromkeys((*self._peers.known_addresses(peer_id), *hints)))
        if not addresses:
            raise SwarmException(f"no address of {peer_id} is known")
        errors: list[Exception] = []
        async with trio.open_nursery() as nursery:

            async def attempt(address: str, failed: trio.Event) -> None:
                try:
                    connections.extend(await self._dial_address(peer_id, address))
                except Exception as error:  # libp2p raises a class of its own for each way to fail
                    errors.append(error)
                    failed.set()
                else:
                    nursery.cancel_scope.cancel()

            for address in addresses:
                failed = trio.Event()
                nursery.start_soon(attempt, address, failed)
                with trio.move_on_after(HEAD_START_S):
                    await failed.wait()
        if not connections:
            raise SwarmException(
                f"{peer_id} is at none of {', '.join(addresses)} ({errors[-1]})"
            ) from errors[-1]
        return connections

    async def _dial_address(self, peer_id: ID, address: str) -> list[INetConn]:
        """Dials one address, or waits for another caller's dial of it and takes its result."""
        key = (peer_id, address)
        while True:
            if connections := self._open_connections(peer_id):
                return connections
            other = self._under_way.get(key)
            if other is None:
                break
            await other.ended.wait()
            if other.error is not None:
                raise SwarmException(f"{address} did not answer") from other.error
        own = self._under_way[key] = _Attempt()
        try:
            return [await self._swarm.dial_addr(_parse_multiaddr(address), peer_id)]
        except Exception as error:  # as above
            own.error = error
            raise
        finally:
            del self._under_way[key]
            own.ended.set()

    def _open_connections(self, peer_id: ID) -> list[INetConn]:
        return [each for each in self._swarm.get_connections(peer_id) if not each.is_closed]

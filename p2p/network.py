"""What the daemon sees of the network, whichever it is.

`p2p.libp2p_network` makes it of libp2p, `p2p.memory_network` of memory, under a virtual clock. Both
pass one test suite. A peer is named by its peer id in text (base58), an address is a multiaddr in
text; a protocol's id ends in its version number, as in ``/petald/session/1``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """A peer, and where it was last known to listen.

    Attributes:
        peer: its peer id.
        addresses: multiaddrs without the ``/p2p/`` part, best first; may be empty.
    """

    peer: str
    addresses: tuple[str, ...] = ()


class Stream(Protocol):
    """An ordered, flow-controlled, encrypted stream of bytes to one peer."""

    @property
    def remote_peer(self) -> str:
        """The peer id that the other end proved to own."""

    @property
    def remote_host(self) -> str:
        """The address of the machine that the connection leads to; empty where none is known.

        It may be a relay's.
        """

    async def send_all(self, data: bytes) -> None:
        """Sends everything.

        Raises:
            StreamBroken: the stream or its connection is gone.

        Cancellation: some of the data may be sent; only `abort` is of use afterwards.
        """

    async def receive_some(self) -> bytes:
        """Gives at least one byte, as soon as there is one; ``b""`` after the other end's close.

        Raises:
            StreamBroken: it was aborted, or the connection is gone.
        """

    async def aclose(self) -> None:
        """Ends the sending side in order and gives the stream up. Never raises for a dead peer."""

    async def abort(self) -> None:
        """Ends both sides at once, unsent data lost; the other end sees `StreamBroken`."""


StreamHandler = Callable[[Stream], Awaitable[None]]
"""Serves one inbound stream; when it returns or raises, the stream is closed or aborted."""


class Network(Protocol):
    """One peer's place in a network of peers."""

    @property
    def peer(self) -> str:
        """The own peer id."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where this peer can be dialled, as far as it knows; empty when it does not listen."""

    def set_handler(self, protocol: str, handler: StreamHandler) -> None:
        """Serves inbound streams of a protocol, each in a task of its own."""

    async def open_stream(self, peer: str, protocol: str, *, hints: Sequence[str] = ()) -> Stream:
        """Opens a stream, over the connection that there is or a new one.

        All known addresses are tried, one after the other, until the peer itself answers at one.

        Args:
            peer: whose the other end must be; it proves it.
            protocol: what to speak.
            hints: where somebody else says that the peer listens; the first few are tried after all
                that is known, and forgotten.

        Raises:
            PeerUnreachable: there is no way to the peer, or it does not speak the protocol.
        """

    def learn(self, peer: PeerAddress) -> None:
        """Remembers where a peer says that it listens, in place of where it said so before.

        Only for the peer's own word, such as its signed record in the directory. What anybody else
        says of it belongs to the ``hints`` of `open_stream`: nobody can make a peer unreachable by
        what he says of it.
        """

    async def connect(self, address: str) -> str:
        """Dials a full multiaddr that ends in ``/p2p/PEER``, and gives the peer.

        Raises:
            PeerUnreachable: nobody answers there, or somebody else.
        """

    def connected_peers(self) -> tuple[PeerAddress, ...]:
        """The peers with an open connection now."""

    async def find_closest_peers(self, key: bytes, count: int) -> tuple[PeerAddress, ...]:
        """The peers nearest to a 32-byte key by Kademlia's distance, nearest first.

        The own peer is among them where it is near enough. Best effort: with no other peer known,
        it is the own peer alone.
        """

    def sign(self, data: bytes) -> bytes:
        """Signs with the identity's key."""

    def verify(self, peer: str, data: bytes, signature: bytes) -> bool:
        """Whether the peer's own key made the signature."""

    async def ping(self, peer: str) -> float:
        """Measures the round trip to a peer, in seconds, once a stream is open.

        Raises:
            PeerUnreachable, StreamBroken: it does not answer.
            RemoteProtocolError: it answers something else than what was asked; nothing is recorded.
        """

    def round_trip_s(self, peer: str) -> float | None:
        """The round trip to a peer, from pings so far; none where there was none."""

    def bytes_per_s(self, peer: str) -> float | None:
        """How fast bytes reach a peer over the connection there is; none where nobody knows yet."""

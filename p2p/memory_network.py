"""The network in memory: many peers in one process, with links that are slow, cut or hung.

The same interface, and the same test suite, as the real one; time is trio's, so under its virtual
clock a swarm's hour passes in seconds. Every stream is a pair of pipes
with a courier between them, who carries each piece when its time has come. Invariant: bytes of a
stream arrive in order, whole, or the stream breaks.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from p2p.errors import P2PError, PeerUnreachable, StreamBroken
from p2p.identity import Identity, verify
from p2p.network import PeerAddress, Stream, StreamHandler
from p2p.pipe import PipeStream, make_pipe
from p2p.round_trips import RoundTrips

log = logging.getLogger(__name__)

PIECES_UNDER_WAY = 12
"""Pieces of a stream between its ends at once; each is at most a pipe's window of 256 KiB."""


@dataclass(slots=True)
class Link:
    """The way between two peers, both directions alike.

    Attributes:
        latency_s: one way.
        bytes_per_s: of each stream.
        is_cut: streams hang, and new ones cannot be opened.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    is_cut: bool = False


class MemoryHub:
    """All peers of one network; made by `open_memory_hub`."""

    def __init__(self, nursery: trio.Nursery, default: Link) -> None:
        self._nursery = nursery
        self._default = default
        self._links: dict[frozenset[str], Link] = {}
        self._networks: dict[str, MemoryNetwork] = {}
        self._couriers: dict[str, set[_Courier]] = {}
        self._changed = trio.Event()
        self._frozen: set[str] = set()

    def make_network(self, name: str = "") -> MemoryNetwork:
        """A new peer; its name, or its place in the order, gives it the same identity always."""
        name = name or f"peer {len(self._couriers)}"
        identity = Identity(hashlib.sha256(name.encode()).digest())
        network = MemoryNetwork(self, identity)
        self._networks[network.peer] = network
        self._couriers[network.peer] = set()
        return network

    def link(self, one: str, other: str) -> Link:
        """The link between two peers; change it as you like, then call `wake`."""
        pair = frozenset((one, other))
        if pair not in self._links:
            default = self._default
            self._links[pair] = Link(default.latency_s, default.bytes_per_s, default.is_cut)
        return self._links[pair]

    def cut(self, one: str, other: str) -> None:
        """Partitions two peers: what is under way waits."""
        self.link(one, other).is_cut = True

    def heal(self, one: str, other: str) -> None:
        """Ends a partition."""
        self.link(one, other).is_cut = False
        self.wake()

    def freeze(self, peer: str) -> None:
        """Hangs a peer, as SIGSTOP does: nothing flows, nothing breaks."""
        self._frozen.add(peer)

    def thaw(self, peer: str) -> None:
        """Lets a hung peer go on."""
        self._frozen.discard(peer)
        self.wake()

    def kill(self, peer: str) -> None:
        """Ends a peer: its streams break at once, and nobody reaches it any more."""
        del self._networks[peer]
        for courier in list(self._couriers[peer]):
            courier.break_nowait()

    def wake(self) -> None:
        """Lets everything that waits look again."""
        self._changed.set()
        self._changed = trio.Event()

    def network_of(self, peer: str) -> MemoryNetwork:
        """A living peer's network."""
        return self._networks[peer]

    def peers(self) -> tuple[str, ...]:
        """Those that live."""
        return tuple(self._networks)

    def is_open(self, one: str, other: str) -> bool:
        """Whether bytes flow between two peers now."""
        return not ({one, other} & self._frozen or self.link(one, other).is_cut)

    async def wait_open(self, one: str, other: str) -> None:
        """Waits until bytes flow between two peers."""
        while not self.is_open(one, other):
            await self._changed.wait()

    async def open_stream(self, opener: MemoryNetwork, peer: str, protocol: str) -> Stream:
        """Opens a stream from one of the hub's peers to another."""
        await trio.lowlevel.checkpoint()
        far = self._networks.get(peer)
        if far is None or opener.peer not in self._networks:
            raise PeerUnreachable(f"{peer} is not there")
        await self.wait_open(opener.peer, peer)
        await trio.sleep(2 * self.link(opener.peer, peer).latency_s)
        handler = far.handlers.get(protocol)
        if handler is None:
            raise PeerUnreachable(f"{peer} does not speak {protocol}")
        near_end, near_inside = make_pipe(opener.peer, peer)
        far_inside, far_end = make_pipe(opener.peer, peer)
        near_end.remote_host, far_end.remote_host = far.host, opener.host
        courier = _Courier(self, opener.peer, peer, near_inside, far_inside)
        for name in (opener.peer, peer):
            self._couriers[name].add(courier)
        self._nursery.start_soon(self._carry, courier)
        self._nursery.start_soon(far.run_handler, handler, far_end)
        return near_end

    async def _carry(self, courier: _Courier) -> None:
        try:
            await courier.run()
        finally:
            for name in (courier.one, courier.other):
                self._couriers[name].discard(courier)


class _Courier:
    """Carries a stream's bytes between its two pipes."""

    def __init__(
        self, hub: MemoryHub, one: str, other: str, near: PipeStream, far: PipeStream
    ) -> None:
        self.one = one
        self.other = other
        self._hub = hub
        self._near = near
        self._far = far

    async def run(self) -> None:
        """Both directions, until both have ended or either has broken."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._carry, self._near, self._far)
            nursery.start_soon(self._carry, self._far, self._near)

    def break_nowait(self) -> None:
        """Breaks the stream at both ends."""
        self._near.break_nowait()
        self._far.break_nowait()

    async def _carry(self, source: PipeStream, target: PipeStream) -> None:
        into, out_of = trio.open_memory_channel[tuple[float, bytes]](PIECES_UNDER_WAY)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver, out_of, target)
            free_at = trio.current_time()
            try:
                while True:
                    data = await source.receive_some()
                    link = self._hub.link(self.one, self.other)
                    free_at = max(free_at, trio.current_time()) + len(data) / link.bytes_per_s
                    await into.send((free_at + link.latency_s, data))
                    if not data:
                        return
            except (StreamBroken, trio.BrokenResourceError):
                self.break_nowait()
                nursery.cancel_scope.cancel()

    async def _deliver(
        self, pieces: trio.MemoryReceiveChannel[tuple[float, bytes]], target: PipeStream
    ) -> None:
        with pieces:
            async for arrives_at, data in pieces:
                await trio.sleep_until(arrives_at)
                await self._hub.wait_open(self.one, self.other)
                if not data:
                    await target.end_sending()
                    return
                try:
                    await target.send_all(data)
                except StreamBroken:
                    self.break_nowait()
                    return


class MemoryNetwork:
    """A `p2p.network.Network`; made by `MemoryHub.make_network`.

    Attributes:
        host: the address of its machine, as others see it.
    """

    host = "127.0.0.1"

    def __init__(self, hub: MemoryHub, identity: Identity) -> None:
        self._hub = hub
        self._identity = identity
        self._peer = identity.peer
        self._round_trips = RoundTrips()
        self.handlers: dict[str, StreamHandler] = {}
        self.failed_handlers = 0

    @property
    def peer(self) -> str:
        """The own peer id."""
        return self._peer

    @property
    def addresses(self) -> tuple[str, ...]:
        """One made-up address, that nobody needs."""
        return ("/ip4/127.0.0.1/tcp/1",)

    def set_handler(self, protocol: str, handler: StreamHandler) -> None:
        """Serves inbound streams of a protocol."""
        self.handlers[protocol] = handler

    async def open_stream(self, peer: str, protocol: str, *, hints: Sequence[str] = ()) -> Stream:
        """Opens a stream; where the peer is, everybody knows."""
        return await self._hub.open_stream(self, peer, protocol)

    def learn(self, peer: PeerAddress) -> None:
        """Nothing: everybody knows everybody."""

    async def connect(self, address: str) -> str:
        """Finds the peer of a full multiaddr."""
        peer = address.rpartition("/p2p/")[2]
        if peer not in self._hub.peers():
            raise PeerUnreachable(f"{address} cannot be reached")
        return peer

    def connected_peers(self) -> tuple[PeerAddress, ...]:
        """Everybody else."""
        return tuple(
            PeerAddress(peer, self.addresses) for peer in self._hub.peers() if peer != self._peer
        )

    async def find_closest_peers(self, key: bytes, count: int) -> tuple[PeerAddress, ...]:
        """The peers nearest to a key."""
        await trio.lowlevel.checkpoint()

        def distance(peer: str) -> int:
            own = hashlib.sha256(peer.encode()).digest()
            other = hashlib.sha256(key).digest()
            return int.from_bytes(own) ^ int.from_bytes(other)

        nearest = sorted(self._hub.peers(), key=distance)[:count]
        return tuple(PeerAddress(peer, self.addresses) for peer in nearest)

    def sign(self, data: bytes) -> bytes:
        """Signs with the identity's key."""
        return self._identity.sign(data)

    def verify(self, peer: str, data: bytes, signature: bytes) -> bool:
        """Whether the peer's own key made the signature."""
        return verify(peer, data, signature)

    async def ping(self, peer: str) -> float:
        """Twice the link's latency, once it is open."""
        if peer not in self._hub.peers():
            raise PeerUnreachable(f"{peer} is not there")
        await self._hub.wait_open(self._peer, peer)
        seconds = 2 * self._hub.link(self._peer, peer).latency_s
        await trio.sleep(seconds)
        self._round_trips.add(peer, seconds)
        return seconds

    def round_trip_s(self, peer: str) -> float | None:
        """The round trip to a peer, as last measured; 0 to the own one."""
        return 0.0 if peer == self._peer else self._round_trips.get(peer)

    def bytes_per_s(self, peer: str) -> float | None:
        """What the link to a peer carries."""
        return self._hub.link(self._peer, peer).bytes_per_s

    async def run_handler(self, handler: StreamHandler, stream: PipeStream) -> None:
        """Serves one stream; what its handler raises ends it alone."""
        try:
            await handler(stream)
        except P2PError as error:
            log.info("a stream of %s ended: %s", stream.remote_peer, error)
            self.failed_handlers += 1
            await stream.abort()
        except Exception:  # the inbound handler, as on the real network
            log.exception("a stream of %s failed", stream.remote_peer)
            self.failed_handlers += 1
            await stream.abort()
        else:
            await stream.aclose()


@asynccontextmanager
async def open_memory_hub(
    *, latency_s: float = 0.0, bytes_per_s: float = math.inf
) -> AsyncIterator[MemoryHub]:
    """A network without peers; everything in it ends with the block.

    Args:
        latency_s: of links that are not set otherwise, one way.
        bytes_per_s: likewise.
    """
    async with trio.open_nursery() as nursery:
        yield MemoryHub(nursery, Link(latency_s, bytes_per_s))
        nursery.cancel_scope.cancel()

"""The network, made of libp2p: TCP, Noise, yamux, and Kademlia for finding the peers near a key.

With `p2p.libp2p_muxer` and `p2p.libp2p_dialler` the only importer of libp2p, and the place for what
must be worked around in it; each such place names what to remove when upstream mends it (seen in
py-libp2p 0.8.1). Foreign errors are translated here. Invariant: an exception in one inbound
stream's handler ends that stream alone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import cast

import libp2p.stream_muxer.muxer_multistream
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_keys
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.utils import sort_peer_ids_by_distance
from libp2p.network.stream.exceptions import StreamEOF, StreamError
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from p2p.address_book import MAX_ADDRESSES
from p2p.errors import (
    AddressInUse,
    P2PError,
    PeerUnreachable,
    RemoteProtocolError,
    StreamBroken,
)
from p2p.identity import Identity, verify
from p2p.libp2p_dialler import Dialler, Peers
from p2p.libp2p_muxer import Muxer
from p2p.network import PeerAddress, StreamHandler
from p2p.network import Stream as StreamProtocol
from p2p.pipe import make_pipe
from p2p.round_trips import RoundTrips

log = logging.getLogger(__name__)

READ_BYTES = 1 << 20
DIAL_DEADLINE_S = 10.0
LOOKUP_DEADLINE_S = 2.0
BOOTSTRAP_FIRST_RETRY_S = 0.5
BOOTSTRAP_LAST_RETRY_S = 60.0
CLOSE_DEADLINE_S = 0.5
MAX_STREAMS_PER_PEER = 512
MAX_STREAMS = 8192
PING_PROTOCOL = "/petald/ping/1"
PING_BYTES = 8
PINGS = 2
"""One after the other; the first may wait for what is still being set up."""

# The muxer's class is a global of upstream's; see `p2p.libp2p_muxer` for why it is replaced.
libp2p.stream_muxer.muxer_multistream.Yamux = Muxer  # type: ignore[attr-defined, assignment]

# Kademlia's handler reports, as an error, every stream that ends after its last request, which is
# every stream. Swarm and yamux report broken connections, which are our daily bread. What matters
# reaches us as an exception. Remove when these become debug messages.
for _name in ("libp2p", "multiaddr", "async_service", "noise"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


class _Stream:
    """A libp2p stream, as `p2p.network.Stream`."""

    def __init__(self, stream: INetStream, remote_peer: str) -> None:
        self._stream = stream
        self._remote_peer = remote_peer

    @property
    def remote_peer(self) -> str:
        return self._remote_peer

    @property
    def remote_host(self) -> str:
        address = self._stream.get_remote_address()
        return "" if address is None else address[0]

    async def send_all(self, data: bytes) -> None:
        try:
            await self._stream.write(data)
        except (StreamError, OSError, P2PError, trio.BrokenResourceError) as error:
            raise StreamBroken(f"the stream to {self._remote_peer} is gone") from error
        except trio.ClosedResourceError as error:
            raise StreamBroken(f"the connection to {self._remote_peer} is closed") from error

    async def receive_some(self) -> bytes:
        try:
            data: bytes = await self._stream.read(READ_BYTES)
        except StreamEOF:
            return b""
        except (StreamError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamBroken(f"the stream from {self._remote_peer} is gone") from error
        if not data:
            raise StreamBroken(f"the connection to {self._remote_peer} is gone")
        return data

    async def aclose(self) -> None:
        with contextlib.suppress(*_GONE), trio.move_on_after(CLOSE_DEADLINE_S):
            await self._stream.close()

    async def abort(self) -> None:
        with contextlib.suppress(*_GONE), trio.move_on_after(CLOSE_DEADLINE_S):
            await self._stream.reset()


_GONE = (StreamError, OSError, trio.BrokenResourceError, trio.ClosedResourceError, RuntimeError)


class Libp2pNetwork:
    """A `p2p.network.Network`; made by `open_libp2p_network`."""

    def __init__(
        self, identity: Identity, host: IHost, peers: Peers, dht: KadDHT, announce: Sequence[str]
    ) -> None:
        self._identity = identity
        self._peer = identity.peer
        self._host = host
        self._peers = peers
        self._dialler = Dialler(cast(Swarm, host.get_network()), peers)
        self._dht = dht
        self._announce = tuple(announce)
        self._handlers: dict[str, StreamHandler] = {}
        self._inbound: dict[str, int] = {}
        self._own_nursery: trio.Nursery | None = None
        self._round_trips = RoundTrips()
        self.set_handler(PING_PROTOCOL, _serve_ping)

    @property
    def peer(self) -> str:
        """The own peer id."""
        return self._peer

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where this peer can be dialled: what is announced by configuration, or what it hears."""
        if self._announce:
            return self._announce
        found: list[str] = []
        for address in self._host.get_transport_addrs():
            found += _reachable_forms(str(address))
        return tuple(dict.fromkeys(found))

    def set_handler(self, protocol: str, handler: StreamHandler) -> None:
        """Serves inbound streams of a protocol."""
        self._handlers[protocol] = handler
        serve = functools.partial(self._serve_stream, protocol)
        self._host.set_stream_handler(TProtocol(protocol), serve)

    async def open_stream(
        self, peer: str, protocol: str, *, hints: Sequence[str] = ()
    ) -> StreamProtocol:
        """Opens a stream; to the own peer, one that stays in the process."""
        if peer == self._peer:
            return self._open_own_stream(protocol)
        peer_id = _parse_peer(peer)
        with trio.move_on_after(DIAL_DEADLINE_S) as dialling:
            try:
                await self._dialler.dial(peer_id, hints)
                stream = await self._host.new_stream(peer_id, [TProtocol(protocol)])
                return _Stream(stream, peer)
            except Exception as error:  # libp2p raises a class of its own for each way to fail
                raise PeerUnreachable(
                    f"no stream for {protocol} to {peer} could be opened ({_describe(error)})"
                ) from error
        assert dialling.cancelled_caught
        raise PeerUnreachable(f"{peer} did not answer within {DIAL_DEADLINE_S:g} s")

    def learn(self, peer: PeerAddress) -> None:
        """Remembers where a peer says that it listens."""
        if peer.peer == self._peer:
            return
        with contextlib.suppress(PeerUnreachable):
            self._peers.learn(_parse_peer(peer.peer), peer.addresses)

    async def connect(self, address: str) -> str:
        """Dials a full multiaddr."""
        try:
            info = info_from_p2p_addr(Multiaddr(address))
        except Exception as error:  # multiaddr and libp2p raise many classes for bad text
            raise PeerUnreachable(
                f"{address!r} is no full address; /ip4/HOST/tcp/PORT/p2p/PEER was expected"
            ) from error
        with trio.move_on_after(DIAL_DEADLINE_S) as dialling:
            try:
                await self._host.connect(info)
                await self._dht.routing_table.add_peer(PeerInfo(info.peer_id, info.addrs))
            except Exception as error:  # as in open_stream
                raise PeerUnreachable(
                    f"{address} cannot be reached ({_describe(error)})"
                ) from error
        if dialling.cancelled_caught:
            raise PeerUnreachable(f"{address} did not answer within {DIAL_DEADLINE_S:g} s")
        return str(info.peer_id)

    def connected_peers(self) -> tuple[PeerAddress, ...]:
        """The peers with an open connection now."""
        return tuple(self._peer_address(peer) for peer in self._host.get_connected_peers())

    async def find_closest_peers(self, key: bytes, count: int) -> tuple[PeerAddress, ...]:
        """The peers nearest to a key, the own one among them where it is near enough."""
        found = self._dht.routing_table.find_local_closest_peers(key, count)
        # One peer that hangs holds the whole lookup up; what is known locally must do then.
        with trio.move_on_after(LOOKUP_DEADLINE_S):
            try:
                found = await self._dht.peer_routing.find_closest_peers_network(key, count)
            except Exception as error:
                log.debug("lookup failed: %s", _describe(error))
        own = self._host.get_id()
        nearest = sort_peer_ids_by_distance(key, list({own, *found}))
        return tuple(
            PeerAddress(self._peer, self.addresses) if peer == own else self._peer_address(peer)
            for peer in nearest[:count]
        )

    def sign(self, data: bytes) -> bytes:
        """Signs with the identity's key."""
        return self._identity.sign(data)

    def verify(self, peer: str, data: bytes, signature: bytes) -> bool:
        """Whether the peer's own key made the signature."""
        return verify(peer, data, signature)

    async def ping(self, peer: str) -> float:
        """Measures the round trip to a peer, in seconds; remembers it for `round_trip_s`."""
        if peer == self._peer:
            return 0.0
        stream = await self.open_stream(peer, PING_PROTOCOL)
        try:
            seconds = min([await _time_echo_s(stream) for _ in range(PINGS)])
        finally:
            with trio.CancelScope(shield=True):
                await stream.abort()
        self._round_trips.add(peer, seconds)
        return seconds

    def round_trip_s(self, peer: str) -> float | None:
        """The round trip to a peer, as last measured; 0 to the own one."""
        return 0.0 if peer == self._peer else self._round_trips.get(peer)

    def bytes_per_s(self, peer: str) -> float | None:
        """How fast bytes reach a peer, by the fastest of the connections to it."""
        rates = [
            connection.muxed_conn.bytes_per_s
            for connection in self._host.get_network().get_connections(_parse_peer(peer))
            if isinstance(connection.muxed_conn, Muxer)
        ]
        return max((rate for rate in rates if rate is not None), default=None)

    async def serve_own_streams(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Holds the handlers of streams that this peer opens to itself."""
        async with trio.open_nursery() as nursery:
            self._own_nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def keep_bootstrapped(self, bootstrap: Sequence[str]) -> None:
        """Dials the bootstrap addresses, again and again while none is connected."""
        delay_s = BOOTSTRAP_FIRST_RETRY_S
        while True:
            connected = {str(peer) for peer in self._host.get_connected_peers()}
            missing = [text for text in bootstrap if text.rpartition("/p2p/")[2] not in connected]
            reached = len(bootstrap) - len(missing)
            for address in missing:
                try:
                    await self.connect(address)
                    reached += 1
                except PeerUnreachable as error:
                    log.debug("bootstrap: %s", error)
            if reached:
                delay_s = BOOTSTRAP_LAST_RETRY_S
            else:
                if delay_s >= 4:
                    log.warning("no bootstrap peer answers; trying again in %.0f s", delay_s)
                delay_s = min(2 * delay_s, BOOTSTRAP_LAST_RETRY_S)
            await trio.sleep(delay_s)

    async def dial_bootstrap(self, bootstrap: Sequence[str]) -> None:
        """Dials every bootstrap address once, all at the same time."""

        async def dial(address: str) -> None:
            try:
                await self.connect(address)
            except PeerUnreachable as error:
                log.warning("bootstrap peer not reached: %s", error)

        async with trio.open_nursery() as nursery:
            for address in bootstrap:
                nursery.start_soon(dial, address)

    async def disconnect_all(self) -> None:
        """Closes every connection, so that others notice at once."""
        with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_DEADLINE_S):
            async with trio.open_nursery() as nursery:
                for peer_id in self._host.get_connected_peers():
                    nursery.start_soon(self._disconnect, peer_id)

    async def _disconnect(self, peer_id: ID) -> None:
        with contextlib.suppress(Exception):  # whatever is wrong with it, it is going
            await self._host.disconnect(peer_id)

    async def _serve_stream(self, protocol: str, stream: INetStream) -> None:
        peer = str(stream.muxed_conn.peer_id)
        wrapped = _Stream(stream, peer)
        count = self._inbound.get(peer, 0)
        if count >= MAX_STREAMS_PER_PEER or sum(self._inbound.values()) >= MAX_STREAMS:
            log.warning("stream refused: %s has %d open", peer, count)
            await wrapped.abort()
            return
        self._inbound[peer] = count + 1
        try:
            await self._run_handler(protocol, wrapped)
        finally:
            self._inbound[peer] -= 1
            if not self._inbound[peer]:
                del self._inbound[peer]

    async def _run_handler(self, protocol: str, stream: StreamProtocol) -> None:
        try:
            await self._handlers[protocol](stream)
        except P2PError as error:
            log.info("stream of %s for %s ended: %s", stream.remote_peer, protocol, error)
        except Exception:  # the inbound handler: whatever is wrong here ends this stream alone
            log.exception("stream of %s for %s failed", stream.remote_peer, protocol)
        else:
            with trio.CancelScope(shield=True):
                await stream.aclose()
            return
        with trio.CancelScope(shield=True):
            await stream.abort()

    def _open_own_stream(self, protocol: str) -> StreamProtocol:
        if protocol not in self._handlers or self._own_nursery is None:
            raise PeerUnreachable(f"this peer does not serve {protocol}")
        near, far = make_pipe(self._peer, self._peer)
        self._own_nursery.start_soon(self._run_handler, protocol, far)
        return near

    def _peer_address(self, peer_id: ID) -> PeerAddress:
        return PeerAddress(str(peer_id), self._peers.known_addresses(peer_id)[:MAX_ADDRESSES])


@asynccontextmanager
async def open_libp2p_network(
    identity: Identity,
    *,
    listen: Sequence[str],
    bootstrap: Sequence[str] = (),
    announce: Sequence[str] = (),
) -> AsyncIterator[Libp2pNetwork]:
    """Joins the network, and leaves it with the block's end.

    Args:
        identity: who this peer is.
        listen: multiaddrs; port 0 lets the system choose.
        bootstrap: full multiaddrs of peers to begin with; dialled again until one answers.
        announce: multiaddrs to be told to others instead of those listened on.

    Raises:
        AddressInUse: another process listens there.
    """
    for address in listen:
        _check_port_is_free(address)
    seed = Ed25519PrivateKey.from_bytes(identity.seed)
    keys = KeyPair(seed, seed.get_public_key())
    noise = NoiseTransport(keys, noise_privkey=create_noise_keys().private_key)
    peers = Peers()
    host = new_host(
        key_pair=keys,
        peerstore_opt=peers,
        muxer_preference="YAMUX",
        sec_opt={NOISE_PROTOCOL: noise},
        disable_identify_address_discovery=True,
        announce_addrs=[Multiaddr(address) for address in announce] or None,
    )
    dht = KadDHT(host, DHTMode.SERVER, enable_random_walk=False)
    async with (
        host.run([Multiaddr(address) for address in listen]),
        background_trio_service(dht),
        trio.open_nursery() as nursery,
    ):
        network = Libp2pNetwork(identity, host, peers, dht, announce)
        await nursery.start(network.serve_own_streams)
        if bootstrap:
            await network.dial_bootstrap(bootstrap)
            nursery.start_soon(network.keep_bootstrapped, tuple(bootstrap))
        try:
            yield network
        finally:
            await network.disconnect_all()
            nursery.cancel_scope.cancel()


def _parse_peer(peer: str) -> ID:
    try:
        return ID.from_base58(peer)
    except Exception as error:  # base58's and multihash's errors share no class
        raise PeerUnreachable(f"{peer[:64]!r} is no peer id") from error


def _describe(error: BaseException) -> str:
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__


def _parse_listen(address: str) -> tuple[str, int]:
    parts = address.split("/")
    return parts[2], int(parts[4])


def _check_port_is_free(address: str) -> None:
    """Refuses an address where another process listens.

    libp2p sets SO_REUSEPORT, under which two daemons of one user would share a port, and each lose
    half of its visitors, without an error. Remove when that can be switched off.
    """
    host, port = _parse_listen(address)
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AddressInUse(
                f"cannot listen on {address} ({error.strerror}); stop what listens there, "
                "or set [network] listen to another port"
            ) from error


def _reachable_forms(address: str) -> list[str]:
    """A listening address as others can dial it: a wildcard becomes this machine's addresses."""
    parts = address.partition("/p2p/")[0].split("/")
    if parts[2] not in ("0.0.0.0", "::"):
        return ["/".join(parts)]
    return ["/".join([*parts[:2], own, *parts[3:]]) for own in _own_addresses(parts[1])]


def _own_addresses(version: str) -> list[str]:
    """This machine's addresses towards the outside, or loopback where there is no outside."""
    family, anywhere = (
        (socket.AF_INET6, "2001:db8::1") if version == "ip6" else (socket.AF_INET, "192.0.2.1")
    )
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((anywhere, 9))  # sends nothing: it asks the routing table
            return [str(probe.getsockname()[0])]
        except OSError:
            return ["::1" if version == "ip6" else "127.0.0.1"]


async def _time_echo_s(stream: StreamProtocol) -> float:
    """Times the echo of random bytes: who sends them before they were asked cannot know them."""
    nonce = os.urandom(PING_BYTES)
    answer = b""
    started_at = time.perf_counter()
    await stream.send_all(nonce)
    while len(answer) < PING_BYTES:
        data = await stream.receive_some()
        if not data:
            raise StreamBroken(f"{stream.remote_peer} ended a ping")
        answer += data
    seconds = time.perf_counter() - started_at
    if answer != nonce:
        raise RemoteProtocolError(f"{stream.remote_peer} answered a ping with other bytes")
    return seconds


async def _serve_ping(stream: StreamProtocol) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data[:PING_BYTES])

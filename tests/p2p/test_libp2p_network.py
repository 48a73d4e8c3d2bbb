"""What only the real network must do: processes that die, ports, other libp2p nodes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from contextlib import AbstractAsyncContextManager

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair as new_keys
from libp2p.peer.envelope import Envelope
from libp2p.peer.id import ID
from libp2p.peer.peerstore import create_signed_peer_record
from multiaddr import Multiaddr

from p2p.errors import AddressInUse, PeerUnreachable, RemoteProtocolError, StreamBroken
from p2p.identity import create_identity
from p2p.libp2p_dialler import Peers
from p2p.libp2p_network import PING_PROTOCOL, Libp2pNetwork, open_libp2p_network
from p2p.network import Network, PeerAddress, Stream
from tests.p2p.test_network import (
    DEAD,
    ECHO,
    LOOPBACK,
    echo,
    open_libp2p_networks,
    receive_exactly,
)

OTHER_PROCESS = """
import trio
from p2p.identity import create_identity
from p2p.libp2p_network import open_libp2p_network

async def echo(stream):
    while data := await stream.receive_some():
        await stream.send_all(data)

async def main():
    async with open_libp2p_network(create_identity(), listen=["/ip4/127.0.0.1/tcp/0"]) as network:
        network.set_handler("/petald/test-echo/1", echo)
        print(f"{network.addresses[0]}/p2p/{network.peer}", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""

LIBP2P_HOST = """
import sys, trio
from libp2p import new_host
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

async def main():
    host = new_host()
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        info = info_from_p2p_addr(Multiaddr(sys.argv[1]))
        await host.connect(info)
        stream = await host.new_stream(info.peer_id, ["/petald/test-echo/1"])
        sent = bytes(range(256)) * 4000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, sent)
            received = b""
            while len(received) < len(sent):
                received += await stream.read(65536)
        print("same" if received == sent else "different", flush=True)

trio.run(main)
"""


@pytest.fixture
def other_process():
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


@pytest.fixture
def silent_address():
    """Where connections are taken, and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}"


def open_unknown() -> AbstractAsyncContextManager[Libp2pNetwork]:
    """A peer that has heard of nobody."""
    return open_libp2p_network(create_identity(), listen=LOOPBACK)


async def test_a_killed_process_breaks_a_pending_receive(other_process):
    process, address = other_process
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as network:
        peer = await network.connect(address)
        stream = await network.open_stream(peer, ECHO)
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"
        process.kill()
        with trio.fail_after(5), pytest.raises(StreamBroken):
            await stream.receive_some()
        with trio.fail_after(5), pytest.raises(PeerUnreachable):
            await network.open_stream(peer, ECHO)


async def test_a_stopped_process_does_not_hold_up_a_cancelled_send(other_process):
    process, address = other_process
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as network:
        peer = await network.connect(address)
        stream = await network.open_stream(peer, ECHO)
        process.send_signal(signal.SIGSTOP)
        try:
            with trio.fail_after(5):
                with trio.move_on_after(0.2) as sending:
                    await stream.send_all(bytes(64 * 1024 * 1024))
                assert sending.cancelled_caught
                await stream.abort()
        finally:
            process.send_signal(signal.SIGCONT)
        again = await network.open_stream(peer, ECHO)
        await again.send_all(b"unharmed")
        assert await receive_exactly(again, 8) == b"unharmed"


async def test_a_peer_that_vanished_without_a_word_is_noticed(other_process, monkeypatch):
    monkeypatch.setattr("p2p.libp2p_muxer.PING_PERIOD_S", 0.2)
    monkeypatch.setattr("p2p.libp2p_muxer.PING_DEADLINE_S", 0.2)
    process, address = other_process
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as network:
        stream = await network.open_stream(await network.connect(address), ECHO)
        process.send_signal(signal.SIGSTOP)
        with trio.fail_after(10), pytest.raises(StreamBroken):
            await stream.receive_some()


async def test_a_reader_may_pause_for_longer_than_upstreams_five_seconds():
    go_on = trio.Event()

    async def read_late(stream: Stream) -> None:
        await go_on.wait()
        await receive_exactly(stream, 4 * 1024 * 1024)
        await stream.send_all(b"done")

    async with open_libp2p_networks(2) as (a, b):
        b.set_handler(ECHO, read_late)
        stream = await a.open_stream(b.peer, ECHO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(4 * 1024 * 1024))
            await trio.sleep(6)
            go_on.set()
            assert await receive_exactly(stream, 4) == b"done"


async def test_an_unmodified_py_libp2p_host_talks_with_this_network():
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as network:
        network.set_handler(ECHO, echo)
        address = f"{network.addresses[0]}/p2p/{network.peer}"
        with trio.fail_after(30):
            result = await trio.run_process(
                [sys.executable, "-c", LIBP2P_HOST, address],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        assert result.stdout == b"same\n", result.stderr.decode()[-2000:]


async def test_a_peer_can_be_reached_at_once_after_failed_dials():
    identity = create_identity()
    with socket.create_server(("127.0.0.1", 0)) as server:
        listen = [f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}"]
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as network:
        network.learn(PeerAddress(identity.peer, tuple(listen)))
        for _ in range(2):
            with pytest.raises(PeerUnreachable):
                await network.open_stream(identity.peer, ECHO)
        async with open_libp2p_network(identity, listen=listen) as other:
            other.set_handler(ECHO, echo)
            stream = await network.open_stream(identity.peer, ECHO)
            await stream.send_all(b"back")
            assert await receive_exactly(stream, 4) == b"back"


async def reach(network: Network, peer: str, *, hints: tuple[str, ...] = ()) -> None:
    """Says something to a peer that echoes, over a connection that is new."""
    assert peer not in {each.peer for each in network.connected_peers()}
    stream = await network.open_stream(peer, ECHO, hints=hints)
    await stream.send_all(b"hello")
    assert await receive_exactly(stream, 5) == b"hello"


async def test_a_peer_that_starts_again_at_another_address_is_reached_there():
    identity = create_identity()
    async with open_unknown() as network:
        for _ in range(3):
            async with open_libp2p_network(identity, listen=LOOPBACK) as other:
                other.set_handler(ECHO, echo)
                network.learn(PeerAddress(other.peer, other.addresses))
                await reach(network, other.peer)
            with trio.fail_after(5):
                while network.connected_peers():  # noqa: ASYNC110  # nothing tells of it
                    await trio.sleep(0.01)


async def test_a_hint_helps_where_nothing_answers_at_the_known_address():
    async with open_unknown() as network, open_unknown() as other:
        other.set_handler(ECHO, echo)
        network.learn(PeerAddress(other.peer, (DEAD,)))
        await reach(network, other.peer, hints=other.addresses)


async def test_a_hint_is_forgotten():
    async with open_libp2p_networks(2) as (a, b), open_unknown() as stranger:
        for hint in (*a.addresses, DEAD):
            with pytest.raises(PeerUnreachable):
                await stranger.open_stream(b.peer, ECHO, hints=[hint])
        b.set_handler(ECHO, echo)
        with pytest.raises(PeerUnreachable, match="no address"):
            await stranger.open_stream(b.peer, ECHO)
        await reach(stranger, b.peer, hints=b.addresses)


async def test_a_hint_that_leads_to_somebody_else_takes_nothing_away():
    async with open_libp2p_networks(3) as (a, b, c):
        b.set_handler(ECHO, echo)
        peer_id = ID.from_base58(b.peer)
        a.learn(PeerAddress(b.peer, c.addresses))
        with pytest.raises(PeerUnreachable):
            await a.open_stream(b.peer, ECHO)
        assert a._peers.known_addresses(peer_id) == c.addresses
        a.learn(PeerAddress(b.peer, b.addresses))
        await reach(a, b.peer, hints=c.addresses)


async def test_hearsay_of_kademlia_comes_after_the_peers_own_word(silent_address):
    async with open_libp2p_networks(2) as (a, b):
        b.set_handler(ECHO, echo)
        peer_id = ID.from_base58(b.peer)
        hearsay = [Multiaddr(silent_address), Multiaddr("/ip4/10.255.0.1/tcp/1")]
        a._peers.add_addrs(peer_id, hearsay, 3600)
        assert a._peers.known_addresses(peer_id)[0] == b.addresses[0]
        await reach(a, b.peer)


async def test_a_signed_record_replaces_the_one_before_and_all_hearsay():
    keys = new_keys(bytes(range(32)))
    peer_id = ID.from_pubkey(keys.public_key)

    def record(address: str) -> Envelope:
        return create_signed_peer_record(peer_id, [Multiaddr(address)], keys.private_key)

    peers = Peers()
    old, new = record("/ip4/192.0.2.1/tcp/1"), record("/ip4/192.0.2.1/tcp/2")
    peers.add_addrs(peer_id, [Multiaddr("/ip4/192.0.2.9/tcp/1")], 3600)
    assert peers.consume_peer_record(old, 7200)
    assert peers.known_addresses(peer_id) == ("/ip4/192.0.2.1/tcp/1",)
    assert peers.consume_peer_record(new, 7200)
    assert not peers.consume_peer_record(old, 7200)
    assert peers.known_addresses(peer_id) == ("/ip4/192.0.2.1/tcp/2",)
    peers.learn(peer_id, ["/ip4/192.0.2.1/tcp/3", "/ip6/fe80::1%25x/tcp/1", "/dns4/a b/tcp/1"])
    assert str(peers.addrs(peer_id)[0]) == "/ip4/192.0.2.1/tcp/3"
    assert peers.peer_info(peer_id).addrs == peers.addrs(peer_id)
    assert peers.consume_peer_record(create_signed_peer_record(peer_id, [], keys.private_key), 7200)


async def test_an_address_that_hangs_holds_up_neither_the_next_nor_another_caller(silent_address):
    async with open_libp2p_networks(2) as (a, b), open_unknown() as stranger:
        b.set_handler(ECHO, echo)
        a.learn(PeerAddress(b.peer, (silent_address, *b.addresses)))
        with trio.fail_after(5):
            await reach(a, b.peer)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def hang() -> None:
                with pytest.raises(PeerUnreachable):
                    await stranger.open_stream(create_identity().peer, ECHO, hints=[silent_address])
                await stranger.open_stream(b.peer, ECHO, hints=[silent_address])

            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(5):
                await reach(stranger, b.peer, hints=(silent_address, *b.addresses))
            nursery.cancel_scope.cancel()


async def test_a_ping_with_another_answer_is_no_measurement():
    async def answer_early(stream: Stream) -> None:
        await stream.send_all(bytes(8))
        await trio.sleep_forever()

    async def answer_wrong(stream: Stream) -> None:
        while data := await stream.receive_some():
            await stream.send_all(data[::-1])

    async with open_libp2p_networks(2) as (a, b):
        for handler in (answer_early, answer_wrong):
            b.set_handler(PING_PROTOCOL, handler)
            with trio.fail_after(5), pytest.raises(RemoteProtocolError):
                await a.ping(b.peer)
            assert a.round_trip_s(b.peer) is None


async def test_a_port_in_use_is_said_so():
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as network:
        with pytest.raises(AddressInUse, match="another port"):
            async with open_libp2p_network(create_identity(), listen=network.addresses):
                pass

"""What every network must do: one suite, over libp2p on loopback and over memory."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from p2p.errors import PeerUnreachable, StreamBroken
from p2p.identity import create_identity
from p2p.libp2p_network import open_libp2p_network
from p2p.memory_network import open_memory_hub
from p2p.network import Network, PeerAddress, Stream

ECHO = "/petald/test-echo/1"
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@asynccontextmanager
async def open_libp2p_networks(
    count: int, *, are_acquainted: bool = True
) -> AsyncIterator[list[Network]]:
    async with AsyncExitStack() as stack:
        networks: list[Network] = [
            await stack.enter_async_context(open_libp2p_network(create_identity(), listen=LOOPBACK))
            for _ in range(count)
        ]
        for network in networks if are_acquainted else ():
            for other in networks:
                network.learn(PeerAddress(other.peer, other.addresses))
        yield networks


@asynccontextmanager
async def open_memory_networks(
    count: int, *, are_acquainted: bool = True
) -> AsyncIterator[list[Network]]:
    async with open_memory_hub() as hub:
        yield [hub.make_network() for _ in range(count)]


@pytest.fixture(params=["libp2p", "memory"])
def open_networks(request):
    return open_libp2p_networks if request.param == "libp2p" else open_memory_networks


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def receive_exactly(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive_some()
        assert piece, "the stream ended early"
        data += piece
    return data


async def receive_all(stream: Stream) -> bytes:
    pieces = []
    while piece := await stream.receive_some():
        pieces.append(piece)
    return b"".join(pieces)


async def test_echo(open_networks):
    async with open_networks(2) as (a, b):
        b.set_handler(ECHO, echo)
        stream = await a.open_stream(b.peer, ECHO)
        assert stream.remote_peer == b.peer
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"
        await stream.aclose()


async def test_remote_peer_is_known_to_the_handler(open_networks):
    seen = []

    async def handler(stream: Stream) -> None:
        seen.append(stream.remote_peer)

    async with open_networks(2) as (a, b):
        b.set_handler(ECHO, handler)
        stream = await a.open_stream(b.peer, ECHO)
        assert await receive_all(stream) == b""
        assert seen == [a.peer]


async def test_the_address_of_the_machine_is_known_to_the_handler(open_networks):
    async with open_networks(2) as (one, other):
        seen = []

        async def serve(stream: Stream) -> None:
            seen.append(stream.remote_host)

        other.set_handler(ECHO, serve)
        stream = await one.open_stream(other.peer, ECHO)
        assert stream.remote_host == "127.0.0.1"
        assert await stream.receive_some() == b""
        assert seen == ["127.0.0.1"]


async def test_large_transfer_both_ways(open_networks):
    data = bytes(range(256)) * (8 * 1024 * 1024 // 256)
    async with open_networks(2) as (a, b):
        b.set_handler(ECHO, echo)
        stream = await a.open_stream(b.peer, ECHO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            assert await receive_exactly(stream, len(data)) == data


async def test_close_delivers_what_was_sent(open_networks):
    received = []
    done = trio.Event()

    async def handler(stream: Stream) -> None:
        received.append(await receive_all(stream))
        done.set()

    async with open_networks(2) as (a, b):
        b.set_handler(ECHO, handler)
        stream = await a.open_stream(b.peer, ECHO)
        await stream.send_all(bytes(500_000))
        await stream.aclose()
        with trio.fail_after(5):
            await done.wait()
        assert received == [bytes(500_000)]


async def test_the_end_can_be_read_after_a_close(open_networks):
    async def handler(stream: Stream) -> None:
        await stream.send_all(b"answer")

    async with open_networks(2) as (a, b):
        b.set_handler(ECHO, handler)
        stream = await a.open_stream(b.peer, ECHO)
        assert await receive_all(stream) == b"answer"
        assert await stream.receive_some() == b""


async def test_use_after_own_close_is_broken(open_networks):
    async with open_networks(2) as (a, b):
        b.set_handler(ECHO, echo)
        stream = await a.open_stream(b.peer, ECHO)
        await stream.aclose()
        await stream.aclose()
        with pytest.raises(StreamBroken):
            await stream.send_all(b"x")
        with pytest.raises(StreamBroken):
            await stream.receive_some()
        await stream.abort()


async def test_abort_is_seen_as_broken(open_networks):
    outcome = []
    done = trio.Event()

    async def handler(stream: Stream) -> None:
        try:
            await receive_exactly(stream, 3)
            await stream.receive_some()
        except StreamBroken as error:
            outcome.append(error)
        done.set()

    async with open_networks(2) as (a, b):
        b.set_handler(ECHO, handler)
        stream = await a.open_stream(b.peer, ECHO)
        await stream.send_all(b"abc")
        await trio.sleep(0.01)
        await stream.abort()
        with trio.fail_after(5):
            await done.wait()
        assert len(outcome) == 1


async def test_abort_wakes_the_own_readers(open_networks):
    async with open_networks(2) as (a, b):
        b.set_handler(ECHO, echo)
        stream = await a.open_stream(b.peer, ECHO)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def read() -> None:
                with pytest.raises(StreamBroken):
                    await stream.receive_some()

            await trio.testing.wait_all_tasks_blocked()
            await stream.abort()


async def test_unknown_protocol(open_networks):
    async with open_networks(2) as (a, b):
        with pytest.raises(PeerUnreachable):
            await a.open_stream(b.peer, "/petald/nobody/1")
        with pytest.raises(PeerUnreachable):
            await a.open_stream(a.peer, "/petald/nobody/1")


@pytest.mark.parametrize("peer", ["", "x", "0OIl", create_identity().peer, "Q" * 500])
async def test_unknown_peer(open_networks, peer):
    async with open_networks(1) as (a,):
        with pytest.raises(PeerUnreachable):
            await a.open_stream(peer, ECHO)


@pytest.mark.parametrize(
    "address",
    ["", "/ip4/127.0.0.1/tcp/1", "nonsense", f"/ip4/127.0.0.1/tcp/1/p2p/{create_identity().peer}"],
)
async def test_connect_to_nobody(open_networks, address):
    async with open_networks(1) as (a,):
        with pytest.raises(PeerUnreachable):
            await a.connect(address)


async def test_connect(open_networks):
    async with open_networks(2) as (a, b):
        assert await a.connect(f"{b.addresses[0]}/p2p/{b.peer}") == b.peer
        assert [each.peer for each in a.connected_peers()] == [b.peer]
        with pytest.raises(PeerUnreachable):
            await a.connect(f"{b.addresses[0]}/p2p/{create_identity().peer}")


async def test_a_failing_handler_breaks_its_stream_alone(open_networks, caplog):
    async def fail(stream: Stream) -> None:
        raise ZeroDivisionError("the handler's own")

    async with open_networks(2) as (a, b):
        b.set_handler("/petald/fail/1", fail)
        b.set_handler(ECHO, echo)
        other = await a.open_stream(b.peer, ECHO)
        stream = await a.open_stream(b.peer, "/petald/fail/1")
        with pytest.raises(StreamBroken):
            await stream.receive_some()
        await other.send_all(b"still here")
        assert await receive_exactly(other, 10) == b"still here"
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert errors[0].exc_info is not None
    assert errors[0].exc_info[0] is ZeroDivisionError


async def test_many_streams_at_once(open_networks):
    async with open_networks(2) as (a, b):
        b.set_handler(ECHO, echo)

        async def talk(number: int) -> None:
            data = bytes([number]) * (1000 * number + 1)
            stream = await a.open_stream(b.peer, ECHO)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data)
                assert await receive_exactly(stream, len(data)) == data
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(talk, number)
        assert [each.peer for each in a.connected_peers()] == [b.peer]


async def test_simultaneous_open(open_networks):
    async with open_networks(2) as (a, b):
        for network in (a, b):
            network.set_handler(ECHO, echo)

        async def talk(one: Network, other: Network) -> None:
            stream = await one.open_stream(other.peer, ECHO)
            await stream.send_all(b"hello")
            assert await receive_exactly(stream, 5) == b"hello"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, a, b)
            nursery.start_soon(talk, b, a)


DEAD = "/ip4/127.0.0.1/tcp/9"


async def test_what_others_say_of_a_peer_does_not_keep_it_from_being_reached(open_networks):
    async with open_networks(2) as (a, b):
        b.set_handler(ECHO, echo)
        for hints in ((DEAD,), ("nonsense", ""), (f"/ip4/10.255.0.1/tcp/1/p2p/{a.peer}",) * 100):
            stream = await a.open_stream(b.peer, ECHO, hints=hints)
            await stream.send_all(b"hello")
            assert await receive_exactly(stream, 5) == b"hello"


async def test_a_peer_is_reached_where_it_last_said_to_listen(open_networks):
    async with open_networks(2, are_acquainted=False) as (a, b):
        b.set_handler(ECHO, echo)
        a.learn(PeerAddress(b.peer, (DEAD,)))
        a.learn(PeerAddress(b.peer, ()))
        a.learn(PeerAddress(b.peer, b.addresses))
        stream = await a.open_stream(b.peer, ECHO)
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"


async def test_a_peer_is_reached_at_its_second_address(open_networks):
    async with open_networks(2, are_acquainted=False) as (a, b):
        b.set_handler(ECHO, echo)
        a.learn(PeerAddress(b.peer, (DEAD, *b.addresses)))
        stream = await a.open_stream(b.peer, ECHO)
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"


async def test_stream_to_oneself(open_networks):
    async with open_networks(1) as (a,):
        a.set_handler(ECHO, echo)
        stream = await a.open_stream(a.peer, ECHO)
        assert stream.remote_peer == a.peer
        await stream.send_all(b"me")
        assert await receive_exactly(stream, 2) == b"me"
        await stream.abort()
        assert await a.ping(a.peer) == 0.0


async def test_cancelled_receive_loses_nothing(open_networks):
    async with open_networks(2) as (a, b):
        b.set_handler(ECHO, echo)
        stream = await a.open_stream(b.peer, ECHO)
        with trio.move_on_after(0.01) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught
        await stream.send_all(b"later")
        assert await receive_exactly(stream, 5) == b"later"


async def test_cancelled_send_harms_no_other_stream(open_networks):
    async def never_read(stream: Stream) -> None:
        await trio.sleep_forever()

    async with open_networks(2) as (a, b):
        b.set_handler("/petald/never/1", never_read)
        b.set_handler(ECHO, echo)
        other = await a.open_stream(b.peer, ECHO)
        for _ in range(3):
            stream = await a.open_stream(b.peer, "/petald/never/1")
            with trio.move_on_after(0.02) as scope:
                await stream.send_all(bytes(10_000_000))
            assert scope.cancelled_caught
            await stream.abort()
        await other.send_all(b"unharmed")
        assert await receive_exactly(other, 8) == b"unharmed"


async def test_a_slow_reader_holds_up_its_sender(open_networks):
    sent = []

    async def never_read(stream: Stream) -> None:
        await trio.sleep_forever()

    async with open_networks(2) as (a, b):
        b.set_handler(ECHO, never_read)
        stream = await a.open_stream(b.peer, ECHO)
        with trio.move_on_after(0.1):
            while True:
                await stream.send_all(bytes(65536))
                sent.append(65536)
        assert 0 < sum(sent) <= 4 * 1024 * 1024


async def test_nearest_peers_include_the_own_one(open_networks):
    async with open_networks(5) as networks:
        for network in networks[1:]:
            await network.connect(f"{networks[0].addresses[0]}/p2p/{networks[0].peer}")
        with trio.fail_after(5):
            while True:
                answers = [await each.find_closest_peers(b"k" * 32, 3) for each in networks]
                if len({tuple(found.peer for found in answer) for answer in answers}) == 1:
                    break
                await trio.sleep(0.02)
        assert [len(answer) for answer in answers] == [3] * 5
        everybody = await networks[2].find_closest_peers(b"k" * 32, 20)
        assert {each.peer for each in everybody} == {each.peer for each in networks}


async def test_alone_the_nearest_peer_is_oneself(open_networks):
    async with open_networks(1) as (a,):
        assert [each.peer for each in await a.find_closest_peers(bytes(32), 8)] == [a.peer]


async def test_ping(open_networks):
    async with open_networks(2) as (a, b):
        assert a.round_trip_s(b.peer) is None
        measured_s = await a.ping(b.peer)
        assert measured_s >= 0
        assert a.round_trip_s(b.peer) is not None


async def test_how_fast_a_peer_is_reached_is_known_after_much_was_sent():
    async with open_libp2p_networks(2) as (a, b):
        b.set_handler(ECHO, echo)
        stream = await a.open_stream(b.peer, ECHO)
        assert a.bytes_per_s(b.peer) is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(4 * 1024 * 1024))
            await receive_exactly(stream, 4 * 1024 * 1024)
        for network, other in ((a, b), (b, a)):
            assert network.bytes_per_s(other.peer) is not None
        await stream.abort()


async def test_how_fast_a_peer_in_memory_is_reached_is_what_the_link_carries():
    async with open_memory_hub() as hub:
        a, b = hub.make_network(), hub.make_network()
        assert a.bytes_per_s(b.peer) == math.inf
        hub.link(a.peer, b.peer).bytes_per_s = 5e5
        assert a.bytes_per_s(b.peer) == 5e5


async def test_signatures(open_networks):
    async with open_networks(2) as (a, b):
        signature = a.sign(b"data")
        assert len(signature) == 64
        assert b.verify(a.peer, b"data", signature)
        assert not b.verify(a.peer, b"other", signature)
        assert not b.verify(b.peer, b"data", signature)
        assert not b.verify("nobody", b"data", signature)
        assert not b.verify(a.peer, b"data", b"")

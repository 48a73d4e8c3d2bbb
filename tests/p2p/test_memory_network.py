"""What only the network in memory does: latency, bandwidth, hangs, cuts and deaths."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from p2p.errors import PeerUnreachable, StreamBroken
from p2p.memory_network import open_memory_hub
from p2p.network import Stream
from tests.p2p.test_network import ECHO, echo, receive_exactly


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


async def measure_echo_s(stream: Stream, size: int) -> float:
    started_at = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, bytes(size))
        await receive_exactly(stream, size)
    return trio.current_time() - started_at


async def test_latency_and_bandwidth_make_the_time(autojump_clock):
    async with open_memory_hub(latency_s=0.05, bytes_per_s=1e6) as hub:
        a, b = hub.make_network(), hub.make_network()
        b.set_handler(ECHO, echo)
        stream = await a.open_stream(b.peer, ECHO)
        assert await measure_echo_s(stream, 10) == pytest.approx(0.1, rel=0.01)
        # The echo's way back begins when the first piece is there, and takes as long.
        assert await measure_echo_s(stream, 1_000_000) == pytest.approx(1.1 + 0.25, abs=0.15)
        assert await a.ping(b.peer) == pytest.approx(0.1)


async def test_a_cut_link_holds_what_is_under_way_until_it_heals(autojump_clock):
    async with open_memory_hub() as hub:
        a, b = hub.make_network(), hub.make_network()
        b.set_handler(ECHO, echo)
        stream = await a.open_stream(b.peer, ECHO)
        hub.cut(a.peer, b.peer)
        await stream.send_all(b"later")
        with trio.move_on_after(60) as waiting:
            await stream.receive_some()
        assert waiting.cancelled_caught
        hub.heal(a.peer, b.peer)
        assert await receive_exactly(stream, 5) == b"later"


async def test_a_killed_peer_breaks_its_streams_at_once(autojump_clock):
    async with open_memory_hub() as hub:
        a, b = hub.make_network(), hub.make_network()
        b.set_handler(ECHO, echo)
        stream = await a.open_stream(b.peer, ECHO)
        hub.kill(b.peer)
        started_at = trio.current_time()
        with pytest.raises(StreamBroken):
            await stream.receive_some()
        assert trio.current_time() == started_at
        with pytest.raises(PeerUnreachable):
            await a.open_stream(b.peer, ECHO)
        assert a.connected_peers() == ()


async def test_a_frozen_peer_hangs_and_goes_on(autojump_clock):
    async with open_memory_hub() as hub:
        a, b = hub.make_network(), hub.make_network()
        b.set_handler(ECHO, echo)
        stream = await a.open_stream(b.peer, ECHO)
        hub.freeze(b.peer)
        with trio.move_on_after(60) as waiting:
            await a.ping(b.peer)
        assert waiting.cancelled_caught
        await stream.send_all(b"later")
        hub.thaw(b.peer)
        assert await receive_exactly(stream, 5) == b"later"


async def test_peers_have_the_same_names_in_every_run(autojump_clock):
    async with open_memory_hub() as one, open_memory_hub() as other:
        assert one.make_network().peer == other.make_network().peer
        assert one.make_network("x").peer == other.make_network("x").peer

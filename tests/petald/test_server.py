"""What strangers may make a server hold: nothing before they have said what they want."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from p2p.errors import StreamBroken
from p2p.memory_network import MemoryNetwork, open_memory_hub
from p2p.rpc import FIRST_MESSAGE_BYTES, MessageStream
from p2p.wire.frame import HEADER_BYTES
from p2p.wire.message import encode_message
from p2p.wire.replies import Ok
from p2p.wire.session_messages import (
    MAX_CACHE_ROWS_BYTES,
    MAX_HOPS,
    PUSH_PROTOCOL,
    SESSION_PROTOCOL,
    AttachCache,
    AttachPush,
    CacheRows,
    HopTime,
    OpenSession,
    SessionOpened,
    Step,
    StepResult,
    max_step_bytes,
)
from p2p.wire.tensor import WireTensor
from petald.cache_transfer import PIECE_BYTES
from petald.config import ServeConfig
from petald.server import HELLO_DEADLINE_S, Server
from petald.tensors import to_wire
from tests.helpers.fake_span import HIDDEN, FakeHostedSpan, to_rows

MODEL = bytes(range(32))
CONFIG = ServeConfig(model="tiny", cache_tokens=512, max_sessions=4, max_step_tokens=32)
MOST = max_step_bytes(CONFIG.max_step_tokens, HIDDEN)


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


@asynccontextmanager
async def open_server() -> AsyncIterator[tuple[MemoryNetwork, MemoryNetwork]]:
    """A server of four blocks, and a peer."""
    async with open_memory_hub() as hub:
        network, peer = hub.make_network("server"), hub.make_network("peer")
        hosted = cast(Any, FakeHostedSpan(0, 4, num_blocks=4, block_s=0.001))
        Server(network, hosted, fingerprint=MODEL, config=CONFIG).start()
        yield network, peer


async def expect_end(stream: Any, size: int) -> None:
    """Announces a message of a size, and sees the stream end before its body."""
    await stream.send_all(size.to_bytes(HEADER_BYTES, "big"))
    with trio.fail_after(1), contextlib.suppress(StreamBroken):
        while await stream.receive_some():
            pass


async def open_session(
    network: MemoryNetwork, peer: MemoryNetwork, session: bytes, **more: Any
) -> tuple[Any, MessageStream]:
    stream = await peer.open_stream(network.peer, SESSION_PROTOCOL)
    client = MessageStream(stream)
    await client.send(
        OpenSession(session=session, model=MODEL, start=0, end=4, max_tokens=64, **more)
    )
    assert isinstance(await client.receive(), SessionOpened)
    return stream, client


@pytest.mark.parametrize("protocol", [SESSION_PROTOCOL, PUSH_PROTOCOL])
async def test_a_silent_stream_is_ended_without_a_traceback(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    async with open_server() as (network, peer):
        stream = await peer.open_stream(network.peer, protocol)
        with trio.fail_after(HELLO_DEADLINE_S + 1), pytest.raises(StreamBroken):
            await stream.receive_some()
        assert network.failed_handlers == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("protocol", [SESSION_PROTOCOL, PUSH_PROTOCOL])
async def test_a_large_first_message_is_refused(autojump_clock: MockClock, protocol: str) -> None:
    async with open_server() as (network, peer):
        stream = await peer.open_stream(network.peer, protocol)
        await expect_end(stream, FIRST_MESSAGE_BYTES + 1)


async def test_a_session_takes_its_longest_step_and_no_more(autojump_clock: MockClock) -> None:
    times = (HopTime(queue_us=2**40, compute_us=2**40),) * MAX_HOPS
    hidden = to_wire(to_rows(list(range(CONFIG.max_step_tokens))))
    longest = Step(number=1, position=0, hidden=hidden, times=times)
    async with open_server() as (network, peer):
        session = os.urandom(16)
        stream, client = await open_session(network, peer, session, previous=peer.peer)
        push = await peer.open_stream(network.peer, PUSH_PROTOCOL)
        pusher = MessageStream(push)
        await pusher.send(AttachPush(session=session))
        assert await pusher.receive() == Ok()
        await pusher.send(longest)
        assert isinstance(await client.receive(), StepResult)
        await expect_end(push, MOST + 1)
        await expect_end(stream, MOST + 1)


async def test_a_hand_over_takes_its_largest_piece_and_no_more(autojump_clock: MockClock) -> None:
    async with open_server() as (network, peer):
        session = os.urandom(16)
        await open_session(network, peer, session, cache_from=peer.peer)
        push = await peer.open_stream(network.peer, PUSH_PROTOCOL)
        messages = MessageStream(push)
        await messages.send(AttachCache(session=session, tokens=3))
        assert await messages.receive() == Ok()
        await expect_end(push, MAX_CACHE_ROWS_BYTES + 1)


def test_the_largest_messages_fit_their_limits() -> None:
    for hidden_size, tokens in ((64, 1), (4096, 512)):
        rows = WireTensor("float32", (tokens, hidden_size), bytes(tokens * 4 * hidden_size))
        times = (HopTime(queue_us=2**40, compute_us=2**40),) * MAX_HOPS
        step = Step(number=2**40, position=2**20, hidden=rows, times=times)
        assert len(encode_message(step)) <= max_step_bytes(tokens, hidden_size)
    piece = WireTensor("float32", (8, PIECE_BYTES // 4096, 128), bytes(PIECE_BYTES))
    rows_message = CacheRows(block=1000, position=2**20, keys=piece, values=piece)
    assert len(encode_message(rows_message)) <= MAX_CACHE_ROWS_BYTES

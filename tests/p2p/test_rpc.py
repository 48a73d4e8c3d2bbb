"""Messages over streams, whole and torn, and calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import trio
from trio.testing import MockClock

from p2p.errors import (
    DeadlineExceeded,
    LocalProtocolError,
    MessageTooLarge,
    Overloaded,
    PeerUnreachable,
    Refused,
    RemoteProtocolError,
    StreamBroken,
)
from p2p.memory_network import open_memory_hub
from p2p.network import Stream
from p2p.pipe import make_pipe
from p2p.rpc import FIRST_MESSAGE_BYTES, MessageStream, call, receive_first
from p2p.wire.message import Bound, Message, encode_message, message
from p2p.wire.replies import Ok, Refusal

PROTOCOL = "/petald/test-rpc/1"


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


@message("test_rpc_blob")
@dataclass(frozen=True, kw_only=True, slots=True)
class Blob(Message):
    number: int
    data: Annotated[bytes, Bound(0, 2**24)] = b""


async def test_messages_arrive_whole_wherever_the_bytes_are_split():
    sent = [Blob(number=1), Blob(number=2, data=b"x" * 20), Blob(number=3)]
    wire = b"".join(map(encode_message, sent))
    for split in range(len(wire) + 1):
        ours, theirs = make_pipe("a", "b")
        async with MessageStream(theirs) as messages, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def write(split=split, ours=ours) -> None:
                await ours.send_all(wire[:split])
                await trio.testing.wait_all_tasks_blocked()
                await ours.send_all(wire[split:])
                await ours.aclose()

            received = []
            while (value := await messages.receive()) is not None:
                received.append(value)
            assert received == sent


async def test_an_end_inside_a_message_is_broken():
    wire = encode_message(Blob(number=1, data=b"abc"))
    for cut in range(1, len(wire)):
        ours, theirs = make_pipe("a", "b")
        await ours.send_all(wire[:cut])
        await ours.aclose()
        messages = MessageStream(theirs)
        with pytest.raises(StreamBroken):
            await messages.receive()
        await messages.abort()


async def test_a_frame_over_the_limit_is_refused_before_its_body_comes():
    ours, theirs = make_pipe("a", "b")
    await ours.send_all((1001).to_bytes(4, "big"))
    messages = MessageStream(theirs, max_frame_bytes=1000)
    with pytest.raises(MessageTooLarge):
        await messages.receive()


async def test_a_message_over_the_limit_is_not_sent():
    ours, theirs = make_pipe("a", "b")
    async with MessageStream(ours, max_frame_bytes=1000) as messages:
        with pytest.raises(LocalProtocolError):
            await messages.send(Blob(number=1, data=bytes(1000)))
        await messages.send(Blob(number=2))
    assert await MessageStream(theirs).receive() == Blob(number=2)


async def test_the_limit_of_what_is_taken_is_raised_after_the_first_message():
    ours, theirs = make_pipe("a", "b")
    large = Blob(number=2, data=bytes(1000))
    await ours.send_all(encode_message(Blob(number=1)) + encode_message(large) * 2)
    messages = MessageStream(theirs, max_received_bytes=100)
    assert await receive_first(messages, 1.0) == Blob(number=1)
    messages.limit_received(2000)
    assert await messages.receive() == large
    messages.limit_received(100)
    with pytest.raises(MessageTooLarge):
        await messages.receive()
    await messages.send(large)


async def test_a_large_first_message_is_refused_before_its_body_comes():
    ours, theirs = make_pipe("a", "b")
    await ours.send_all((FIRST_MESSAGE_BYTES + 1).to_bytes(4, "big"))
    messages = MessageStream(theirs, max_received_bytes=FIRST_MESSAGE_BYTES)
    with pytest.raises(MessageTooLarge):
        await receive_first(messages, 1.0)


async def test_a_peer_that_says_nothing_is_given_up(autojump_clock):
    ours, theirs = make_pipe("a", "b")
    with pytest.raises(DeadlineExceeded, match="a said nothing within 10 s"):
        await receive_first(MessageStream(theirs), 10.0)
    assert trio.current_time() == pytest.approx(10.0)
    await ours.aclose()
    with pytest.raises(RemoteProtocolError, match="before its first message"):
        await receive_first(MessageStream(theirs), 10.0)


async def test_messages_of_many_senders_are_not_mixed():
    ours, theirs = make_pipe("a", "b")
    sender, receiver = MessageStream(ours), MessageStream(theirs)
    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(sender.send, Blob(number=number, data=bytes([number]) * 300_000))
        received = [await receiver.receive() for _ in range(10)]
    assert {value.number for value in received} == set(range(10))
    assert all(set(value.data) == {value.number} for value in received)


async def test_after_a_cancelled_send_nothing_more_is_sent():
    ours, theirs = make_pipe("a", "b")
    sender = MessageStream(ours)
    with trio.move_on_after(0.01) as scope:
        await sender.send(Blob(number=1, data=bytes(4 * 1024 * 1024)))
    assert scope.cancelled_caught
    with pytest.raises(StreamBroken, match="in part"):
        await sender.send(Blob(number=2))
    await sender.aclose()
    with pytest.raises(StreamBroken):
        await MessageStream(theirs).receive()


async def test_a_cancelled_receive_loses_nothing():
    ours, theirs = make_pipe("a", "b")
    wire = encode_message(Blob(number=1, data=b"abc"))
    messages = MessageStream(theirs)
    for byte in wire[:-1]:
        await ours.send_all(bytes((byte,)))
        with trio.move_on_after(0.001):
            await messages.receive()
    await ours.send_all(wire[-1:])
    assert await messages.receive() == Blob(number=1, data=b"abc")


async def test_the_block_aborts_after_an_error_and_closes_otherwise():
    ours, theirs = make_pipe("a", "b")
    with pytest.raises(ZeroDivisionError):
        async with MessageStream(ours):
            raise ZeroDivisionError
    with pytest.raises(StreamBroken):
        await theirs.receive_some()
    ours, theirs = make_pipe("a", "b")
    async with MessageStream(ours):
        pass
    assert await theirs.receive_some() == b""


async def test_call():
    async def handler(stream: Stream) -> None:
        async with MessageStream(stream) as messages:
            request = await messages.receive()
            assert isinstance(request, Blob)
            replies: dict[int, Message] = {
                1: Blob(number=11),
                2: Refusal(code="no_way", text="because"),
                3: Refusal(code="overloaded", retry_after_s=7.0),
                4: Ok(),
            }
            if request.number in replies:
                await messages.send(replies[request.number])

    async with open_memory_hub() as hub:
        a, b = hub.make_network(), hub.make_network()
        b.set_handler(PROTOCOL, handler)

        async def ask(number: int) -> Message:
            return await call(a, b.peer, PROTOCOL, Blob(number=number), Blob)

        assert await ask(1) == Blob(number=11)
        with pytest.raises(Refused) as refused:
            await ask(2)
        assert (refused.value.remote_code, refused.value.remote_text) == ("no_way", "because")
        with pytest.raises(Overloaded) as overloaded:
            await ask(3)
        assert overloaded.value.retry_after_s == 7.0
        with pytest.raises(RemoteProtocolError):
            await ask(4)
        with pytest.raises(StreamBroken):
            await ask(5)
        with pytest.raises(PeerUnreachable):
            await call(a, b.peer, "/petald/none/1", Blob(number=1), Blob)

"""Yamux: two sessions back to back, and bytes that break its rules."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import LocalProtocolError, RemoteProtocolError, StreamBroken
from p2p.yamux import (
    ACK,
    FIN,
    HEADER,
    INITIAL_WINDOW_BYTES,
    RST,
    SYN,
    TYPE_DATA,
    TYPE_GO_AWAY,
    TYPE_PING,
    TYPE_WINDOW,
    WINDOW_BYTES,
    DataReceived,
    PongReceived,
    SendingEnded,
    StreamOpened,
    StreamReset,
    WentAway,
    WindowGrew,
    YamuxSession,
)


def frame(kind: int, flags: int, stream: int, length: int, body: bytes = b"") -> bytes:
    return HEADER.pack(0, kind, flags, stream, length) + body


def output_of(session: YamuxSession) -> bytes:
    return b"".join(session.take_output())


def make_pair() -> tuple[YamuxSession, YamuxSession]:
    return YamuxSession(is_client=True), YamuxSession(is_client=False)


def data_in(events) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, DataReceived))


def openings_in(events) -> list[int]:
    return [event.stream for event in events if isinstance(event, StreamOpened)]


def test_every_split():
    client, server = make_pair()
    stream = client.open_stream()
    client.send(stream, memoryview(b"hello"))
    client.ping(7)
    client.send(stream, memoryview(b", world"))
    client.give_up(stream)
    wire = output_of(client)
    for split in range(len(wire) + 1):
        server = YamuxSession(is_client=False)
        events = [*server.on_bytes(wire[:split]), *server.on_bytes(wire[split:])]
        assert events[0] == StreamOpened(stream)
        assert data_in(events) == b"hello, world"
        assert events[-1] == SendingEnded(stream)


def test_both_sides_open_streams_of_their_own():
    client, server = make_pair()
    ids = {client.open_stream(), client.open_stream(), server.open_stream()}
    assert len(ids) == 3
    assert openings_in(server.on_bytes(output_of(client))) == [1, 3]
    assert StreamOpened(2) in client.on_bytes(output_of(server))


def test_the_window_is_kept_and_grows_when_data_is_read():
    client, server = make_pair()
    stream = client.open_stream()
    server.on_bytes(output_of(client))
    assert WindowGrew(stream) in client.on_bytes(output_of(server))
    data = memoryview(bytes(3 * WINDOW_BYTES))
    assert client.send(stream, data) == WINDOW_BYTES
    assert client.send(stream, data) == 0
    events = server.on_bytes(output_of(client))
    assert len(data_in(events)) == WINDOW_BYTES
    assert not server.consume(stream, 1000)
    assert output_of(server) == b""
    assert server.consume(stream, WINDOW_BYTES - 1000)
    assert client.on_bytes(output_of(server)) == [WindowGrew(stream)]
    assert client.sendable_bytes(stream) == WINDOW_BYTES


def test_half_closed_both_ways():
    client, server = make_pair()
    stream = client.open_stream()
    client.send(stream, memoryview(b"question"))
    client.on_bytes(b"")
    server.on_bytes(output_of(client))
    server.send(stream, memoryview(b"answer"))
    server.give_up(stream)
    events = client.on_bytes(output_of(server))
    assert data_in(events) == b"answer"
    assert events[-1] == SendingEnded(stream)
    client.give_up(stream)
    server.on_bytes(output_of(client))
    assert client.streams == server.streams == 0
    with pytest.raises(StreamBroken):
        client.send(stream, memoryview(b"x"))


def test_data_for_a_stream_that_was_given_up_resets_it():
    client, server = make_pair()
    stream = client.open_stream()
    server.on_bytes(output_of(client))
    server.give_up(stream)
    client.on_bytes(output_of(server))
    client.send(stream, memoryview(b"anybody there?"))
    assert server.on_bytes(output_of(client)) == []
    assert client.on_bytes(output_of(server)) == [StreamReset(stream)]
    assert client.streams == server.streams == 0


def test_after_its_end_a_stream_cannot_be_sent_on():
    client, _ = make_pair()
    stream = client.open_stream()
    client.give_up(stream)
    with pytest.raises(LocalProtocolError):
        client.send(stream, memoryview(b"x"))


def test_a_reset_crosses_what_is_under_way():
    client, server = make_pair()
    stream = client.open_stream()
    client.send(stream, memoryview(b"data"))
    under_way = output_of(client)
    client.reset(stream)
    server.on_bytes(under_way)
    server.send(stream, memoryview(b"answer"))
    assert client.on_bytes(output_of(server)) == []
    assert server.on_bytes(output_of(client)) == [StreamReset(stream)]
    assert client.streams == server.streams == 0


def test_too_many_streams_are_reset():
    client = YamuxSession(is_client=True)
    server = YamuxSession(is_client=False, max_inbound_streams=2)
    for _ in range(3):
        client.open_stream()
    assert openings_in(server.on_bytes(output_of(client))) == [1, 3]
    assert StreamReset(5) in client.on_bytes(output_of(server))
    client.reset(1)
    client.open_stream()
    assert openings_in(server.on_bytes(output_of(client))) == [7]


def test_pings_are_answered():
    client, server = make_pair()
    client.ping(42)
    assert server.on_bytes(output_of(client)) == []
    assert client.on_bytes(output_of(server)) == [PongReceived(42)]


def test_an_unknown_reason_to_go_is_told():
    assert YamuxSession(is_client=True).on_bytes(frame(TYPE_GO_AWAY, 0, 0, 7)) == [WentAway(7)]


OPEN = frame(TYPE_WINDOW, SYN, 1, 0)
HOSTILE = {
    "another version": b"\x01" + bytes(11),
    "an unknown type": frame(4, 0, 0, 0),
    "our own parity": frame(TYPE_WINDOW, SYN, 2, 0),
    "stream zero": frame(TYPE_WINDOW, SYN, 0, 0),
    "one stream twice": OPEN + OPEN,
    "an older stream": frame(TYPE_WINDOW, SYN, 3, 0) + OPEN,
    "more than the window": OPEN + frame(TYPE_DATA, 0, 1, WINDOW_BYTES + 1),
    "more than the window in two": OPEN
    + frame(TYPE_DATA, 0, 1, WINDOW_BYTES, bytes(WINDOW_BYTES))
    + frame(TYPE_DATA, 0, 1, 1),
    "a huge frame": OPEN + frame(TYPE_DATA, 0, 1, 2**32 - 1),
    "a huge frame for nobody": OPEN + frame(TYPE_DATA, 0, 1, 0) + frame(TYPE_DATA, 0, 9, 2**31),
    "data for nobody": frame(TYPE_DATA, 0, 9, 1, b"x"),
    "data after the end": OPEN + frame(TYPE_WINDOW, FIN, 1, 0) + frame(TYPE_DATA, 0, 1, 1, b"x"),
    "a window beyond all bounds": OPEN + frame(TYPE_WINDOW, 0, 1, 2**32 - 1),
}


@pytest.mark.parametrize("wire", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_breaks_the_rules_is_refused(wire):
    with pytest.raises(RemoteProtocolError):
        YamuxSession(is_client=False).on_bytes(wire)


HARMLESS = {
    "a window for nobody": frame(TYPE_WINDOW, 0, 7, 5),
    "an end for nobody": frame(TYPE_WINDOW, FIN, 7, 0),
    "a reset for nobody": frame(TYPE_WINDOW, RST, 7, 0),
    "an acknowledgement for nobody": frame(TYPE_WINDOW, ACK, 2, 0),
    "a pong for nobody": frame(TYPE_PING, ACK, 0, 9),
    "an end twice": OPEN + frame(TYPE_WINDOW, FIN, 1, 0) + frame(TYPE_DATA, FIN, 1, 0),
    "data with the opening": frame(TYPE_DATA, SYN, 1, 3, b"abc"),
    "opened and reset": frame(TYPE_WINDOW, SYN | RST, 1, 0),
    "opened and ended": frame(TYPE_DATA, SYN | FIN, 1, 3, b"abc"),
}


@pytest.mark.parametrize("wire", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_is_odd_but_allowed_is_taken(wire):
    session = YamuxSession(is_client=False)
    session.on_bytes(wire)
    session.ping(1)
    assert output_of(session)


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_two_sessions_bring_everything_over(seed, steps):
    rng = random.Random(seed)
    client, server = make_pair()
    sent: dict[int, bytearray] = {}
    received: dict[int, bytearray] = {}
    unread: dict[int, int] = {}
    in_flight = {client: b"", server: b""}

    def deliver(source: YamuxSession, target: YamuxSession, size: int) -> None:
        in_flight[source] += output_of(source)
        wire, in_flight[source] = in_flight[source][:size], in_flight[source][size:]
        for event in target.on_bytes(wire):
            if isinstance(event, DataReceived):
                received.setdefault(event.stream, bytearray()).extend(event.data)
                unread[event.stream] = unread.get(event.stream, 0) + len(event.data)
                assert unread[event.stream] <= WINDOW_BYTES

    for _ in range(steps):
        action = rng.randrange(4)
        if action == 0 and len(sent) < 4:
            sent[client.open_stream()] = bytearray()
        elif action == 1 and sent:
            stream = rng.choice(sorted(sent))
            data = rng.randbytes(rng.choice((1, 1000, INITIAL_WINDOW_BYTES)))
            taken = client.send(stream, memoryview(data))
            sent[stream] += data[:taken]
        elif action == 2 and unread:
            stream = rng.choice(sorted(unread))
            server.consume(stream, unread.pop(stream))
        else:
            deliver(client, server, rng.choice((1, 11, 10_000, 10**7)))
            deliver(server, client, rng.choice((1, 13, 10**7)))
    deliver(client, server, 10**9)
    assert {stream: data for stream, data in sent.items() if data} == received


@given(st.lists(st.binary(max_size=40) | st.sampled_from(sorted(HARMLESS.values())), max_size=20))
def test_any_bytes(pieces):
    session = YamuxSession(is_client=False, max_inbound_streams=3)
    try:
        for piece in pieces:
            session.on_bytes(piece)
            assert session.streams <= 3
    except RemoteProtocolError:
        pass

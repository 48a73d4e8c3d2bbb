"""What a connection's other side can do to the muxer with bytes alone."""

from __future__ import annotations

import pytest
import trio
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable

from p2p.identity import create_identity
from p2p.libp2p_muxer import MuxedStream, Muxer
from p2p.libp2p_network import _parse_peer
from p2p.yamux import HEADER, MAX_INBOUND_STREAMS, RST, SYN, TYPE_DATA, TYPE_PING, TYPE_WINDOW


class Connection:
    """A secured connection of which the test plays the other side."""

    is_initiator = False

    def __init__(self, *, is_read: bool = True) -> None:
        self.send, self._incoming = trio.open_memory_channel[bytes](1)
        self.is_closed = False
        self._is_read = is_read

    async def read(self, n: int | None = None) -> bytes:
        return await self._incoming.receive()

    async def write(self, data: bytes) -> None:
        if not self._is_read:
            await trio.sleep_forever()

    async def close(self) -> None:
        self.is_closed = True


def make_muxer(connection: Connection) -> Muxer:
    return Muxer(connection, _parse_peer(create_identity().peer))


async def test_a_connection_that_never_started_is_closed_too():
    connection = Connection()
    muxer = make_muxer(connection)
    with trio.fail_after(0.4):
        await muxer.close()
    assert connection.is_closed
    await muxer.start()
    assert muxer.is_closed


async def test_streams_opened_and_reset_at_once_do_not_pile_up(nursery):
    connection = Connection()
    muxer = make_muxer(connection)
    nursery.start_soon(muxer.start)
    number = 1
    for _ in range(20):
        flood = b""
        for _ in range(100):
            flood += HEADER.pack(0, TYPE_WINDOW, SYN, number, 0)
            flood += HEADER.pack(0, TYPE_WINDOW, RST, number, 0)
            number += 2
        await connection.send.send(flood)
    await trio.testing.wait_all_tasks_blocked()
    assert muxer._opened_out.statistics().current_buffer_used == MAX_INBOUND_STREAMS
    assert not muxer.is_closed
    await muxer.close()


async def test_small_pieces_cost_little_more_than_their_bytes(nursery):
    connection = Connection()
    muxer = make_muxer(connection)
    nursery.start_soon(muxer.start)
    piece = HEADER.pack(0, TYPE_DATA, 0, 1, 2) + b"ab"
    await connection.send.send(HEADER.pack(0, TYPE_WINDOW, SYN, 1, 0) + piece * 10_000)
    stream = await muxer.accept_stream()
    assert isinstance(stream, MuxedStream)
    assert len(stream._chunks) <= 20
    assert await stream.read(1) == b"a"
    assert await stream.read(20_000) == b"b" + b"ab" * 9_999
    await muxer.close()


async def test_a_peer_that_asks_and_never_reads_is_dropped(nursery, monkeypatch):
    monkeypatch.setattr("p2p.libp2p_muxer.MAX_OUTPUT_BYTES", 100_000)
    connection = Connection(is_read=False)
    muxer = make_muxer(connection)
    nursery.start_soon(muxer.start)
    for _ in range(100):
        with trio.move_on_after(0.2) as sending:
            await connection.send.send(HEADER.pack(0, TYPE_PING, SYN, 0, 7) * 1000)
        if sending.cancelled_caught:
            break
    assert muxer.is_closed
    assert connection.is_closed
    with pytest.raises(MuxedConnUnavailable):
        await muxer.open_stream()


class SlowConnection(Connection):
    """One end of a connection that carries so many bytes a second, in messages as Noise's are.

    Of a message nothing can be read before all of it has come.
    """

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__()
        self.bytes_per_s = bytes_per_s
        self.far: SlowConnection | None = None

    async def write(self, data: bytes) -> None:
        assert self.far is not None
        for start in range(0, len(data), MAX_PLAINTEXT_LENGTH):
            piece = data[start : start + MAX_PLAINTEXT_LENGTH]
            await trio.sleep(len(piece) / self.bytes_per_s)
            await self.far.send.send(piece)


@pytest.mark.parametrize("size", [40_000, 70_000, 100_000])
async def test_it_tells_how_fast_the_connection_is_whatever_the_reader_does(
    nursery, autojump_clock, size
):
    near, far = SlowConnection(50_000.0), SlowConnection(1e9)
    near.far, far.far = far, near
    near.is_initiator = True
    muxers = [make_muxer(connection) for connection in (near, far)]
    for muxer in muxers:
        nursery.start_soon(muxer.start)
    stream = await muxers[0].open_stream()
    await stream.write(b"small")
    assert muxers[0].bytes_per_s is None
    await stream.write(bytes(size))  # which nobody reads
    await trio.sleep(10)
    measured = muxers[0].bytes_per_s
    assert measured is not None
    assert 45_000 < measured < 55_000
    nursery.cancel_scope.cancel()

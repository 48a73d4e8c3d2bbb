"""A libp2p connection's streams: `p2p.yamux` between py-libp2p's secured connection and its host.

It takes the place of py-libp2p's own muxer of the same protocol, which (in 0.8.1) breaks a stream
whose reader pauses for 5 s, looks for window in naps of 10 ms, leaves half a message on the
connection when a sender is cancelled, and tells a lost connection as an orderly end of its streams.
Remove when upstream mends these.

How it works: senders put frames into the session; one writer task sends them, so that nobody's
cancellation cuts a frame off, and what many streams have to say travels in one write. One reader
task hands what arrived to the streams. Invariant: when `Muxer.start` has ended, every stream of the
connection is broken, and whoever waited on one knows it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from p2p.bandwidth import Bandwidth
from p2p.errors import Overloaded, RemoteProtocolError
from p2p.yamux import (
    MAX_INBOUND_STREAMS,
    DataReceived,
    Event,
    PongReceived,
    SendingEnded,
    StreamOpened,
    StreamReset,
    WentAway,
    WindowGrew,
    YamuxSession,
)

BACKLOG_BYTES = 256 * 1024
"""Senders wait while more than this is unsent: enough to keep the socket busy meanwhile."""

MAX_OUTPUT_BYTES = 8 * 1024 * 1024
"""A peer that makes us answer and does not read the answers is dropped. Data waits long before."""

SMALL_CHUNK_BYTES = 1024

MAX_READ_TO_END_BYTES = 1024 * 1024
"""Of a read without a size, which libp2p's own small protocols use."""

PING_PERIOD_S = 15.0
PING_DEADLINE_S = 15.0
"""A peer that vanished without a word is noticed within the sum of the two."""

GIVEN_UP_S = 60.0
"""How long the other side has to end a stream that this side has ended."""

FLUSH_DEADLINE_S = 0.5


class MuxedStream(IMuxedStream):
    """One stream; see `p2p.network.Stream` for what its user may expect."""

    def __init__(self, muxer: Muxer, number: int) -> None:
        self.muxed_conn = muxer
        self._muxer = muxer
        self._number = number
        self._chunks: deque[bytes] = deque()
        self._head_read = 0
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()
        self._has_sent_end = False
        self._has_ended = False
        self._is_broken = False
        self._is_given_up = False

    async def write(self, data: bytes) -> None:
        """Sends everything.

        Cancellation: some of it may be sent.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        muxer = self._muxer
        view = memoryview(data)
        while view:
            if self._is_broken or muxer.is_closed:
                raise MuxedStreamReset("the stream broke")
            if self._has_sent_end:
                raise MuxedStreamClosed("the stream was closed on this side")
            if muxer.is_backlogged:
                await muxer.wait_not_backlogged()
                continue
            taken = muxer.session.send(self._number, view[:BACKLOG_BYTES])
            if not taken:
                await self._writable.park()
                continue
            muxer.flush()
            view = view[taken:]
            if view:
                await trio.lowlevel.checkpoint()

    async def read(self, n: int | None = None) -> bytes:
        """Gives at least one byte and at most ``n``; without a number, all until the end."""
        if n is None or n < 0:
            return await self._read_to_end()
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._chunks:
            if self._has_ended:
                raise MuxedStreamEOF("the other side has ended the stream")
            if self._is_broken or self._is_given_up:
                raise MuxedStreamReset("the stream broke")
            await self._readable.park()
        data = self._take(n)
        if self._muxer.session.consume(self._number, len(data)):
            self._muxer.flush()
        return data

    async def close_write(self) -> None:
        """Ends the own sending side; the other goes on."""
        if not self._has_sent_end:
            self._has_sent_end = True
            self._muxer.session.end_sending(self._number)
            self._muxer.flush()
            self._writable.unpark_all()
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        """Ends the own sending side in order, and gives the stream up."""
        if not self._is_given_up:
            self._is_given_up = True
            self._has_sent_end = True
            self._muxer.give_up(self._number)
            self._wake()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Ends both sides at once."""
        if not self._is_broken:
            self._muxer.reset(self._number)
            self._chunks.clear()
            self._has_ended = False
            self.on_reset()
        await trio.lowlevel.checkpoint()

    def set_deadline(self, ttl: int) -> None:
        """Not offered, as by upstream's muxer: trio's cancel scopes are the deadlines here."""
        raise NotImplementedError("use a cancel scope")

    def get_remote_address(self) -> tuple[str, int] | None:
        """Host and port of the connection."""
        return self._muxer.get_remote_address()

    async def __aenter__(self) -> MuxedStream:
        return self

    def on_data(self, data: bytes) -> None:
        """Takes what arrived; small pieces are joined, since each costs more than its bytes."""
        if self._chunks and len(self._chunks[-1]) + len(data) <= SMALL_CHUNK_BYTES:
            self._chunks[-1] += data
        else:
            self._chunks.append(data)
        self._readable.unpark_all()

    def on_end(self) -> None:
        """The other side will send no more."""
        self._has_ended = True
        self._readable.unpark_all()

    def on_window(self) -> None:
        """More may be sent."""
        self._writable.unpark_all()

    def on_reset(self) -> None:
        """The stream is gone; what had arrived can still be read."""
        self._is_broken = True
        self._wake()

    def _wake(self) -> None:
        self._readable.unpark_all()
        self._writable.unpark_all()

    def _take(self, size: int) -> bytes:
        if len(self._chunks) == 1 and not self._head_read and len(self._chunks[0]) <= size:
            return self._chunks.popleft()
        parts = []
        while size and self._chunks:
            head = self._chunks[0]
            part = head[self._head_read : self._head_read + size]
            parts.append(part)
            size -= len(part)
            self._head_read += len(part)
            if self._head_read == len(head):
                self._chunks.popleft()
                self._head_read = 0
        return b"".join(parts)

    async def _read_to_end(self) -> bytes:
        parts: list[bytes] = []
        left = MAX_READ_TO_END_BYTES
        while left:
            try:
                parts.append(await self.read(left))
            except MuxedStreamEOF:
                return b"".join(parts)
            left -= len(parts[-1])
        await self.reset()
        raise MuxedStreamReset(f"over {MAX_READ_TO_END_BYTES} bytes came, and no end")


class Muxer(IMuxedConn):
    """The streams of one connection.

    Args:
        conn: secured; is owned by this object.
        peer_id: what the other side proved to be.
        is_initiator: whether this side dialled; else the connection tells.
        on_close: part of upstream's interface, which sets it and does without the call.
    """

    def __init__(
        self,
        conn: ISecureConn,
        peer_id: ID,
        is_initiator: bool | None = None,
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.peer_id = peer_id
        self.event_started = trio.Event()
        self.on_close = on_close
        self._conn = conn
        self._is_initiator = conn.is_initiator if is_initiator is None else is_initiator
        self.session = YamuxSession(is_client=self._is_initiator)
        self._is_closed = False
        self._streams: dict[int, MuxedStream] = {}
        self._given_up: dict[int, float] = {}
        self._opened_in, self._opened_out = trio.open_memory_channel[MuxedStream](
            MAX_INBOUND_STREAMS
        )
        self._writing_bytes = 0
        self._has_output = trio.Event()
        self._drained = trio.lowlevel.ParkingLot()
        self._pong = trio.Event()
        self._bandwidth = Bandwidth()
        self._scope = trio.CancelScope()

    @property
    def is_initiator(self) -> bool:
        """Whether this side dialled."""
        return self._is_initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and not self._is_closed

    @property
    def is_closed(self) -> bool:
        """Whether the connection has ended."""
        return self._is_closed

    @property
    def is_backlogged(self) -> bool:
        """Whether senders should wait."""
        return self._writing_bytes + self.session.output_bytes > BACKLOG_BYTES

    @property
    def bytes_per_s(self) -> float | None:
        """How fast bytes reach the other side; none where nothing was measured yet."""
        return self._bandwidth.bytes_per_s

    async def wait_not_backlogged(self) -> None:
        """Waits until something was sent, or the connection ended."""
        await self._drained.park()

    async def start(self) -> None:
        """Serves the connection until it ends."""
        if self._is_closed:
            return
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self.event_started.set()
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._keep_alive)
                    await self._read()
                    nursery.cancel_scope.cancel()
        finally:
            self._end()
            with trio.CancelScope(shield=True), trio.move_on_after(FLUSH_DEADLINE_S):
                await self._close_connection()

    async def close(self) -> None:
        """Ends the connection in order: what was sent before goes out, within a short time."""
        if self._is_closed:
            return
        if not self.event_started.is_set():  # refused before it began: nobody else closes it
            self._end()
            with trio.CancelScope(shield=True), trio.move_on_after(FLUSH_DEADLINE_S):
                await self._close_connection()
            return
        with trio.CancelScope(shield=True), trio.move_on_after(FLUSH_DEADLINE_S):
            self.session.go_away()
            self.flush()
            while not self._is_closed and (self._writing_bytes or self.session.output_bytes):
                await self._drained.park()
        self._end()
        self._scope.cancel()

    async def open_stream(self) -> IMuxedStream:
        """Opens a stream; its opening travels with the first data."""
        if self._is_closed:
            raise MuxedConnUnavailable("the connection has ended")
        try:
            number = self.session.open_stream()
        except Overloaded as error:
            raise MuxedConnUnavailable(str(error)) from error
        stream = self._streams[number] = MuxedStream(self, number)
        await trio.lowlevel.checkpoint()
        return stream

    async def accept_stream(self) -> IMuxedStream:
        """Waits for a stream that the other side opens."""
        try:
            return await self._opened_out.receive()
        except trio.EndOfChannel as error:
            raise MuxedConnUnavailable("the connection has ended") from error

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The other side's addresses, as the connection below tells them."""
        return self._conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Whether it is direct or relayed."""
        return self._conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Host and port of the other side."""
        return self._conn.get_remote_address()

    def flush(self) -> None:
        """Lets the writer send what the session has to say."""
        if self.session.output_bytes:
            self._has_output.set()

    def give_up(self, number: int) -> None:
        """Ends a stream in order."""
        self.session.give_up(number)
        if self._streams.pop(number, None) is not None and self.session.has_stream(number):
            self._given_up[number] = trio.current_time()
        self.flush()

    def reset(self, number: int) -> None:
        """Aborts a stream."""
        self.session.reset(number)
        self._streams.pop(number, None)
        self._given_up.pop(number, None)
        self.flush()

    async def _write(self) -> None:
        while True:
            await self._has_output.wait()
            while self.session.output_bytes:
                if self.session.output_bytes > MAX_OUTPUT_BYTES:
                    self._scope.cancel()
                self._writing_bytes = self.session.output_bytes
                try:
                    for data in self._take_output():
                        await self._conn.write(data)
                except Exception:  # a class for each layer below; the connection is gone
                    self._scope.cancel()
                    return
                self._writing_bytes = 0
                self._drained.unpark_all()
            self._has_output = trio.Event()

    def _take_output(self) -> list[bytes]:
        """What is to be written now, a write each.

        The ping that begins a measurement has one of its own: what is written at once is one Noise
        message, up to 64 KiB of it, and the other side sees nothing of that before it has it all.
        """
        size_bytes = self.session.output_bytes
        output = self.session.take_output()
        if (values := self._bandwidth.on_write(size_bytes)) is None:
            return [b"".join(output)]
        pings = []
        for value in values:
            self.session.ping(value)
            pings.append(b"".join(self.session.take_output()))
        return [pings[0], b"".join([*output, pings[1]])]

    async def _read(self) -> None:
        while True:
            try:
                data = await self._conn.read()
            except Exception:  # as in `_write`
                return
            if not data:
                return
            try:
                events = self.session.on_bytes(data)
            except RemoteProtocolError:
                return
            for event in events:
                if isinstance(event, WentAway):
                    return
                self._carry_out(event)
            self.flush()
            if self._has_output.is_set() and self.session.output_bytes > MAX_OUTPUT_BYTES:
                return

    def _carry_out(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            if stream := self._streams.get(event.stream):
                stream.on_data(event.data)
        elif isinstance(event, WindowGrew):
            if stream := self._streams.get(event.stream):
                stream.on_window()
        elif isinstance(event, StreamOpened):
            self._on_opened(event.stream)
        elif isinstance(event, SendingEnded):
            self._given_up.pop(event.stream, None)
            if stream := self._streams.get(event.stream):
                stream.on_end()
        elif isinstance(event, StreamReset):
            self._given_up.pop(event.stream, None)
            if stream := self._streams.pop(event.stream, None):
                stream.on_reset()
        elif isinstance(event, PongReceived):
            self._pong.set()
            self._bandwidth.on_pong(event.value, trio.current_time())

    def _on_opened(self, number: int) -> None:
        stream = self._streams[number] = MuxedStream(self, number)
        try:
            self._opened_in.send_nowait(stream)
        except trio.WouldBlock:  # the peer opens and resets faster than streams are accepted
            self.reset(number)

    async def _keep_alive(self) -> None:
        number = 0
        while True:
            await trio.sleep(PING_PERIOD_S)
            number += 1
            self._pong = trio.Event()
            self.session.ping(number)
            self.flush()
            with trio.move_on_after(PING_DEADLINE_S) as waiting:
                await self._pong.wait()
            if waiting.cancelled_caught:
                self._scope.cancel()
            now = trio.current_time()
            for stream, given_up_at in list(self._given_up.items()):
                if now - given_up_at > GIVEN_UP_S:
                    self.reset(stream)

    async def _close_connection(self) -> None:
        try:
            await self._conn.close()
        except Exception:  # as in `_write`
            return

    def _end(self) -> None:
        self._is_closed = True
        self.event_started.set()
        self._opened_in.close()
        self.session.take_output()
        streams = list(self._streams.values())
        self._streams.clear()
        self._given_up.clear()
        for stream in streams:
            stream.on_reset()
        self._drained.unpark_all()

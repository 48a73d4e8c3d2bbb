"""Yamux: many flow-controlled streams over one ordered connection, without any input or output.

Bytes go in with `YamuxSession.on_bytes`, which gives events; bytes to send come out of
`take_output`. The wire is that of yamux/1.0.0 (hashicorp's spec, as libp2p uses it), so other
libp2p nodes understand it. Invariants: at most `max_inbound_streams` streams of the other side are
open; it never has more than the window of a stream unread with us (more is a `RemoteProtocolError`,
which ends the connection), and we never send beyond its window.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from p2p.errors import LocalProtocolError, Overloaded, RemoteProtocolError, StreamBroken

PROTOCOL = "/yamux/1.0.0"
HEADER = struct.Struct(">BBHII")
HEADER_BYTES = 12

TYPE_DATA, TYPE_WINDOW, TYPE_PING, TYPE_GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

INITIAL_WINDOW_BYTES = 256 * 1024
"""Of both directions of a new stream; from the specification."""

WINDOW_BYTES = 1024 * 1024
"""What a stream may have unread: 10 MB/s at 100 ms."""

MAX_INBOUND_STREAMS = 256
MAX_DATA_FRAME_BYTES = 65519 - HEADER_BYTES
"""A data frame fits one Noise message: noise specs, libp2p framing."""

MAX_WINDOW_BYTES = 2**32 - 1
MAX_STREAM_ID = 2**32 - 1


@dataclass(slots=True)
class StreamOpened:
    """The other side opened a stream."""

    stream: int


@dataclass(slots=True)
class DataReceived:
    """Data came; it counts against the window until `YamuxSession.consume`."""

    stream: int
    data: bytes


@dataclass(slots=True)
class SendingEnded:
    """The other side will send no more on the stream."""

    stream: int


@dataclass(slots=True)
class StreamReset:
    """The other side aborted the stream."""

    stream: int


@dataclass(slots=True)
class WindowGrew:
    """More may be sent on the stream."""

    stream: int


@dataclass(slots=True)
class PongReceived:
    """A ping of ours was answered."""

    value: int


@dataclass(slots=True)
class WentAway:
    """The other side takes no more streams, and is about to close."""

    code: int


Event = (
    StreamOpened | DataReceived | SendingEnded | StreamReset | WindowGrew | PongReceived | WentAway
)


@dataclass(slots=True)
class _StreamState:
    is_inbound: bool
    send_window: int = INITIAL_WINDOW_BYTES
    receive_window: int = INITIAL_WINDOW_BYTES
    consumed: int = 0
    has_sent_end: bool = False
    has_received_end: bool = False
    is_given_up: bool = False


class YamuxSession:
    """One side of a connection.

    Args:
        is_client: whether this side made the connection; it decides whose stream ids are odd.
        window_bytes: how much may be unread on each stream.
        max_inbound_streams: the streams of the other side beyond these are reset.
    """

    def __init__(
        self,
        *,
        is_client: bool,
        window_bytes: int = WINDOW_BYTES,
        max_inbound_streams: int = MAX_INBOUND_STREAMS,
    ) -> None:
        self._window_bytes = max(window_bytes, INITIAL_WINDOW_BYTES)
        self._max_inbound_streams = max_inbound_streams
        self._next_id = 1 if is_client else 2
        self._remote_parity = 0 if is_client else 1
        self._last_remote_id = 0
        self._inbound = 0
        self._streams: dict[int, _StreamState] = {}
        self._output: list[bytes | memoryview] = []
        self.output_bytes = 0
        self._partial = bytearray()
        self._body_left = 0
        self._body_stream = 0
        self._body_flags = 0

    @property
    def streams(self) -> int:
        """How many streams are open or half closed."""
        return len(self._streams)

    def has_stream(self, stream: int) -> bool:
        """Whether a stream is open on one side at least."""
        return stream in self._streams

    def take_output(self) -> list[bytes | memoryview]:
        """The pieces that are to be sent now, in order."""
        output = self._output
        self._output = []
        self.output_bytes = 0
        return output

    def open_stream(self) -> int:
        """Opens a stream, and gives its id.

        Raises:
            Overloaded: the connection has used up its ids.
        """
        stream = self._next_id
        if stream > MAX_STREAM_ID - 2:
            raise Overloaded("this connection has no stream ids left")
        self._next_id += 2
        self._streams[stream] = _StreamState(is_inbound=False, receive_window=self._window_bytes)
        self._put(TYPE_WINDOW, SYN, stream, self._window_bytes - INITIAL_WINDOW_BYTES)
        return stream

    def sendable_bytes(self, stream: int) -> int:
        """How much `send` would take now; 0 also where the stream is gone."""
        state = self._streams.get(stream)
        return 0 if state is None or state.has_sent_end else state.send_window

    def send(self, stream: int, data: memoryview) -> int:
        """Sends as much of the data as the window lets through, and gives how much that was.

        Raises:
            StreamBroken: the stream is gone.
            LocalProtocolError: its end was sent already.
        """
        state = self._streams.get(stream)
        if state is None:
            raise StreamBroken("the stream is gone")
        if state.has_sent_end:
            raise LocalProtocolError("data cannot follow a stream's end")
        taken = min(len(data), state.send_window)
        for start in range(0, taken, MAX_DATA_FRAME_BYTES):
            piece = data[start : min(start + MAX_DATA_FRAME_BYTES, taken)]
            self._put(TYPE_DATA, 0, stream, len(piece))
            self._output.append(piece)
            self.output_bytes += len(piece)
        state.send_window -= taken
        return taken

    def consume(self, stream: int, size: int) -> bool:
        """Says that received data was read; true when that made something to send."""
        state = self._streams.get(stream)
        if state is None or state.has_received_end:
            return False
        state.consumed += size
        if state.consumed < self._window_bytes // 2:
            return False
        self._grant(stream, state, state.consumed)
        state.consumed = 0
        return True

    def end_sending(self, stream: int) -> None:
        """Ends the own sending side; receiving goes on."""
        state = self._streams.get(stream)
        if state is None or state.has_sent_end:
            return
        state.has_sent_end = True
        self._put(TYPE_WINDOW, FIN, stream, 0)

    def give_up(self, stream: int) -> None:
        """Ends the own sending side; what comes on the stream from now on resets it."""
        self.end_sending(stream)
        state = self._streams.get(stream)
        if state is None:
            return
        state.is_given_up = True
        if state.has_received_end:
            self._forget(stream, state)

    def reset(self, stream: int) -> None:
        """Ends both sides at once."""
        state = self._streams.get(stream)
        if state is not None:
            self._put(TYPE_WINDOW, RST, stream, 0)
            self._forget(stream, state)

    def ping(self, value: int) -> None:
        """Asks for a `PongReceived` of the same value."""
        self._put(TYPE_PING, SYN, 0, value)

    def go_away(self) -> None:
        """Tells the other side that the connection ends, in order."""
        self._put(TYPE_GO_AWAY, 0, 0, 0)

    def on_bytes(self, data: bytes) -> list[Event]:
        """Takes what arrived, and gives what it means.

        Raises:
            RemoteProtocolError: the other side broke the protocol; the connection is of no use.
        """
        events: list[Event] = []
        position = 0
        size = len(data)
        while True:
            if self._body_left:
                if position == size:
                    return events
                piece = data[position : position + self._body_left]
                position += len(piece)
                self._body_left -= len(piece)
                self._on_data(piece, events)
                if self._body_left:
                    return events
                self._on_flags(self._body_stream, self._body_flags, events)
            if not self._partial and size - position >= HEADER_BYTES:
                header = HEADER.unpack_from(data, position)
                position += HEADER_BYTES
            else:
                missing = HEADER_BYTES - len(self._partial)
                self._partial += data[position : position + missing]
                position += missing
                if len(self._partial) < HEADER_BYTES:
                    return events
                header = HEADER.unpack(self._partial)
                self._partial.clear()
            version, kind, flags, stream, length = header
            self._on_header(version, kind, flags, stream, length, events)

    def _on_header(
        self, version: int, kind: int, flags: int, stream: int, length: int, events: list[Event]
    ) -> None:
        if version != 0 or kind > TYPE_GO_AWAY:
            raise RemoteProtocolError(f"a yamux frame of version {version} and type {kind} came")
        if kind == TYPE_PING:
            if flags & SYN:
                self._put(TYPE_PING, ACK, 0, length)
            else:
                events.append(PongReceived(length))
        elif kind == TYPE_GO_AWAY:
            events.append(WentAway(length))
        else:
            if flags & SYN:
                self._on_open(stream, events)
            if kind == TYPE_DATA:
                self._on_data_header(stream, flags, length)
                if length == 0:
                    self._on_flags(stream, flags, events)
            else:
                self._on_window(stream, length, events)
                self._on_flags(stream, flags, events)

    def _on_open(self, stream: int, events: list[Event]) -> None:
        if stream % 2 != self._remote_parity or stream <= self._last_remote_id:
            raise RemoteProtocolError(f"a yamux stream was opened with the wrong id {stream}")
        self._last_remote_id = stream
        if self._inbound >= self._max_inbound_streams:
            self._put(TYPE_WINDOW, RST, stream, 0)
            return
        self._inbound += 1
        state = self._streams[stream] = _StreamState(is_inbound=True)
        self._put(TYPE_WINDOW, ACK, stream, self._window_bytes - INITIAL_WINDOW_BYTES)
        state.receive_window = self._window_bytes
        events.append(StreamOpened(stream))

    def _on_data_header(self, stream: int, flags: int, length: int) -> None:
        state = self._streams.get(stream)
        if state is not None:
            if state.has_received_end and length:
                raise RemoteProtocolError("data came on a yamux stream after its end")
            if length > state.receive_window:
                raise RemoteProtocolError(
                    f"{length} bytes came on a yamux stream whose window is {state.receive_window}"
                )
            state.receive_window -= length
        elif length > self._window_bytes or stream > max(self._last_remote_id, self._next_id):
            raise RemoteProtocolError(f"{length} bytes came for a yamux stream that never was")
        self._body_left, self._body_stream, self._body_flags = length, stream, flags

    def _on_data(self, piece: bytes, events: list[Event]) -> None:
        state = self._streams.get(self._body_stream)
        if state is None:
            return  # it was reset while this was under way
        if state.is_given_up:
            self.reset(self._body_stream)
            return
        events.append(DataReceived(self._body_stream, piece))

    def _on_window(self, stream: int, increment: int, events: list[Event]) -> None:
        state = self._streams.get(stream)
        if state is None or not increment:
            return
        state.send_window += increment
        if state.send_window > MAX_WINDOW_BYTES:
            raise RemoteProtocolError("a yamux window grew beyond 4 GB")
        events.append(WindowGrew(stream))

    def _on_flags(self, stream: int, flags: int, events: list[Event]) -> None:
        state = self._streams.get(stream)
        if state is None:
            return
        if flags & RST:
            self._forget(stream, state)
            events.append(StreamReset(stream))
        elif flags & FIN and not state.has_received_end:
            state.has_received_end = True
            events.append(SendingEnded(stream))
            if state.is_given_up:
                self._forget(stream, state)

    def _forget(self, stream: int, state: _StreamState) -> None:
        del self._streams[stream]
        self._inbound -= state.is_inbound

    def _grant(self, stream: int, state: _StreamState, size: int) -> None:
        state.receive_window += size
        self._put(TYPE_WINDOW, 0, stream, size)

    def _put(self, kind: int, flags: int, stream: int, length: int) -> None:
        self._output.append(HEADER.pack(0, kind, flags, stream, length))
        self.output_bytes += HEADER_BYTES

"""Messages over streams, and calls of one question and one answer."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Self, TypeVar

import trio

from p2p.errors import DeadlineExceeded, Overloaded, Refused, RemoteProtocolError, StreamBroken
from p2p.network import Network, Stream
from p2p.wire.frame import MAX_FRAME_BYTES, FrameParser
from p2p.wire.message import Message, decode_message, encode_message, expect
from p2p.wire.replies import Refusal

M = TypeVar("M", bound=Message)

FIRST_MESSAGE_BYTES = 16 * 1024
"""The largest first message to take from a stranger: a directory's record of 4 KiB, with room."""


class MessageStream:
    """A stream that carries messages.

    One task receives; any may send. As a context manager it ends the stream: in order after the
    block's normal end, at once after an error or a cancellation.

    Whoever serves streams of strangers gives ``max_received_bytes=FIRST_MESSAGE_BYTES``, takes the
    first message with `receive_first`, and then calls `limit_received` with what that message
    entitles the peer to.

    Args:
        stream: given up to this object.
        max_frame_bytes: the largest message to send, and to take where nothing else is said.
        max_received_bytes: the largest message to take, until `limit_received`.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        max_received_bytes: int | None = None,
    ) -> None:
        self._stream = stream
        self._max_frame_bytes = max_frame_bytes
        limit = max_frame_bytes if max_received_bytes is None else max_received_bytes
        self._parser = FrameParser(max_frame_bytes=limit)
        self._bodies: Iterator[bytes] = iter(())
        self._send_lock = trio.Lock()
        self._is_torn = False

    @property
    def remote_peer(self) -> str:
        """The peer at the other end."""
        return self._stream.remote_peer

    def limit_received(self, max_received_bytes: int) -> None:
        """Sets the largest message to take, from the next one on."""
        self._parser.max_frame_bytes = max_received_bytes

    async def send(self, message: Message) -> None:
        """Sends a message, whole, after those that were being sent.

        Raises:
            StreamBroken: the stream is gone, or a cancelled call sent a message in part.
            LocalProtocolError: the message is too large; nothing was sent.

        Cancellation: a part may have been sent; end the stream.
        """
        frame = encode_message(message, max_frame_bytes=self._max_frame_bytes)
        async with self._send_lock:
            if self._is_torn:
                raise StreamBroken(f"a message to {self.remote_peer} was sent in part")
            self._is_torn = True
            await self._stream.send_all(frame)
            self._is_torn = False

    async def receive(self) -> Message | None:
        """The next message; none when the other end has ended the stream in order.

        Raises:
            RemoteProtocolError: what came is no message.
            StreamBroken: the stream broke, or ended within a message.
        """
        while (body := next(self._bodies, None)) is None:
            data = await self._stream.receive_some()
            if not data:
                if not self._parser.is_between_frames:
                    raise StreamBroken(f"the stream from {self.remote_peer} ended in a message")
                return None
            self._bodies = self._parser.feed(data)
        return decode_message(body)

    async def aclose(self) -> None:
        """Ends the stream in order; at once, where a message was sent in part."""
        if self._is_torn:
            await self._stream.abort()
        else:
            await self._stream.aclose()

    async def abort(self) -> None:
        """Ends the stream at once."""
        await self._stream.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with trio.CancelScope(shield=True):
            if kind is None:
                await self.aclose()
            else:
                await self.abort()


async def receive_first(messages: MessageStream, deadline_s: float) -> Message:
    """The first message of an inbound stream.

    Raises:
        DeadlineExceeded: it did not come in time; a peer that says nothing is to hold nothing.
        RemoteProtocolError: what came is no message, or the stream ended before it.
        StreamBroken: as `MessageStream.receive`.
    """
    with trio.move_on_after(deadline_s):
        received = await messages.receive()
        if received is None:
            raise RemoteProtocolError("the stream ended before its first message")
        return received
    raise DeadlineExceeded(f"{messages.remote_peer} said nothing within {deadline_s:g} s")


async def call(
    network: Network,
    peer: str,
    protocol: str,
    request: Message,
    reply_class: type[M],
    *,
    max_frame_bytes: int = MAX_FRAME_BYTES,
) -> M:
    """Asks a peer one question, on a stream of its own.

    Raises:
        PeerUnreachable, StreamBroken: the question or the answer did not get through.
        Refused, Overloaded: the peer said no.
        RemoteProtocolError: the answer is none that was asked for.
    """
    stream = await network.open_stream(peer, protocol)
    async with MessageStream(stream, max_frame_bytes=max_frame_bytes) as messages:
        await messages.send(request)
        reply = await messages.receive()
    if reply is None:
        raise StreamBroken(f"{peer} ended the stream without an answer")
    if isinstance(reply, Refusal):
        if reply.code == Overloaded.code:
            raise Overloaded(f"{peer} has no room now: {reply.text!r}", reply.retry_after_s)
        raise Refused(peer, reply.code, reply.text, reply.retry_after_s)
    return expect(reply, reply_class)

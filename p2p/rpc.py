"""Messages over streams, and calls of one question and one answer."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Self, TypeVar

import trio

from p2p.errors import Overloaded, Refused, StreamBroken
from p2p.network import Network, Stream
from p2p.wire.frame import MAX_FRAME_BYTES, FrameParser
from p2p.wire.message import Message, decode_message, encode_message, expect
from p2p.wire.replies import Refusal

M = TypeVar("M", bound=Message)


class MessageStream:
    """A stream that carries messages.

    One task receives; any may send. As a context manager it ends the stream: in order after the
    block's normal end, at once after an error or a cancellation.

    Args:
        stream: given up to this object.
        max_frame_bytes: the largest message to take or send.
    """

    def __init__(self, stream: Stream, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._stream = stream
        self._max_frame_bytes = max_frame_bytes
        self._parser = FrameParser(max_frame_bytes=max_frame_bytes)
        self._bodies: deque[bytes] = deque()
        self._send_lock = trio.Lock()
        self._is_torn = False

    @property
    def remote_peer(self) -> str:
        """The peer at the other end."""
        return self._stream.remote_peer

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
        while not self._bodies:
            data = await self._stream.receive_some()
            if not data:
                if not self._parser.is_between_frames:
                    raise StreamBroken(f"the stream from {self.remote_peer} ended in a message")
                return None
            self._bodies.extend(self._parser.feed(data))
        return decode_message(self._bodies.popleft())

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

"""Frames: how messages are cut out of a stream of bytes.

A frame is a 4-byte big-endian length and that many bytes of body. The parser is fed with whatever
arrived and gives back whole bodies; it looks at a length before it keeps a single byte of the body.
It knows neither sockets nor msgpack. Invariant: it never holds more than one frame's limit plus the
piece that it was last fed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from p2p.errors import LocalProtocolError, MessageTooLarge

HEADER_BYTES = 4
MAX_FRAME_BYTES = 64 * 1024 * 1024
"""The hard limit of any frame: 512 tokens of float32 hidden states 32,768 wide."""

_HEADER = struct.Struct(">I")


def format_header(body_bytes: int, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """The header of a body of that size.

    Raises:
        LocalProtocolError: the body is over the limit; the sender must cut it up.
    """
    if body_bytes > max_frame_bytes:
        raise LocalProtocolError(
            f"a message of {body_bytes} bytes is over the limit of {max_frame_bytes}; "
            "send it in smaller pieces"
        )
    return _HEADER.pack(body_bytes)


class FrameParser:
    """Cuts a stream of bytes into frame bodies.

    Attributes:
        max_frame_bytes: a longer frame is refused as soon as its header is seen. It may be changed
            at any time, also between two bodies of one piece, and counts from the next header on.
    """

    def __init__(self, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()
        self._body_bytes: int | None = None

    @property
    def is_between_frames(self) -> bool:
        """Whether a stream that ends now ends cleanly."""
        return self._body_bytes is None and not self._buffer

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """Takes what arrived and gives every body that is now whole, in order.

        Nothing is taken before the first body is asked for, nor the next piece before the last one.

        Raises:
            MessageTooLarge: a header announces more than the limit. The stream cannot be used on.
        """
        self._buffer += data
        position = 0
        try:
            while True:
                if self._body_bytes is None:
                    if len(self._buffer) - position < HEADER_BYTES:
                        return
                    (body_bytes,) = _HEADER.unpack_from(self._buffer, position)
                    if body_bytes > self.max_frame_bytes:
                        raise MessageTooLarge(
                            f"a frame of {body_bytes} bytes was announced; "
                            f"at most {self.max_frame_bytes} are taken"
                        )
                    self._body_bytes = body_bytes
                    position += HEADER_BYTES
                if len(self._buffer) - position < self._body_bytes:
                    return
                end = position + self._body_bytes
                with memoryview(self._buffer) as view:
                    body = bytes(view[position:end])
                position = end
                self._body_bytes = None
                yield body
        finally:
            del self._buffer[:position]

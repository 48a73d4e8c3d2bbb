"""Attacks the cutting of a stream into frames.

Invariant: however a stream of bytes is cut, `FrameParser` gives the bodies that a plain reading
of the whole gives, raises nothing but `MessageTooLarge`, and holds no more than one frame; a limit
that is raised after the first body counts from the next one on.

The first byte says how the rest is cut, and whether the first body has a limit of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from fuzz.campaign import main
from p2p.errors import MessageTooLarge
from p2p.wire.frame import HEADER_BYTES, FrameParser

MAX_FRAME_BYTES = 64
FIRST_FRAME_BYTES = 8
HAS_FIRST_LIMIT = 0x10


def check(data: bytes) -> None:
    stride = data[0] % 16 + 1 if data else 1
    stream = data[1:]
    first_limit = FIRST_FRAME_BYTES if data and data[0] & HAS_FIRST_LIMIT else MAX_FRAME_BYTES
    expected, is_refused = read_plainly(stream, first_limit)
    parser = FrameParser(max_frame_bytes=first_limit)
    found: list[bytes] = []
    try:
        for start in range(0, len(stream), stride):
            for body in parser.feed(stream[start : start + stride]):
                found.append(body)
                parser.max_frame_bytes = MAX_FRAME_BYTES
            assert len(parser._buffer) <= MAX_FRAME_BYTES + HEADER_BYTES + stride
    except MessageTooLarge:
        assert is_refused
    else:
        assert not is_refused
        whole = sum(len(body) + HEADER_BYTES for body in expected)
        assert parser.is_between_frames == (whole == len(stream))
    assert found == expected


def read_plainly(stream: bytes, limit: int) -> tuple[list[bytes], bool]:
    """The bodies, and whether a header over the limit stopped the reading."""
    bodies: list[bytes] = []
    while len(stream) >= HEADER_BYTES:
        size = int.from_bytes(stream[:HEADER_BYTES], "big")
        if size > (MAX_FRAME_BYTES if bodies else limit):
            return bodies, True
        if len(stream) < HEADER_BYTES + size:
            break
        bodies.append(stream[HEADER_BYTES : HEADER_BYTES + size])
        stream = stream[HEADER_BYTES + size :]
    return bodies, False


if __name__ == "__main__":
    main(check, "fuzz_frame")

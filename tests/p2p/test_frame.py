"""Frames, with the bytes split at every place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import LocalProtocolError, MessageTooLarge
from p2p.wire.frame import FrameParser, format_header


def frame(body: bytes) -> bytes:
    return format_header(len(body)) + body


def test_every_split():
    bodies = [b"", b"a", b"bc" * 10, b"", b"end"]
    wire = b"".join(map(frame, bodies))
    for first in range(len(wire) + 1):
        for second in range(first, len(wire) + 1):
            parser = FrameParser()
            got = []
            for piece in (wire[:first], wire[first:second], wire[second:]):
                got += map(bytes, parser.feed(piece))
            assert got == bodies
            assert parser.is_between_frames


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(1, 50), min_size=1))
def test_any_pieces(bodies, sizes):
    wire = b"".join(map(frame, bodies))
    parser = FrameParser()
    got = []
    position = 0
    turn = 0
    while position < len(wire):
        size = sizes[turn % len(sizes)]
        turn += 1
        got += map(bytes, parser.feed(wire[position : position + size]))
        position += size
    assert got == bodies
    assert parser.is_between_frames


def test_between_frames():
    parser = FrameParser()
    assert parser.is_between_frames
    for count in range(1, 7):
        assert list(parser.feed(frame(b"abc")[count - 1 : count])) == []
        assert not parser.is_between_frames
    assert [bytes(body) for body in parser.feed(b"c")] == [b"abc"]
    assert parser.is_between_frames


@pytest.mark.parametrize("announced", [11, 2**31, 2**32 - 1])
def test_too_large_is_refused_with_the_header(announced):
    parser = FrameParser(max_frame_bytes=10)
    assert [bytes(body) for body in parser.feed(frame(bytes(10)))] == [bytes(10)]
    with pytest.raises(MessageTooLarge):
        list(parser.feed(announced.to_bytes(4, "big")))


def test_own_frames_have_the_same_limit():
    assert format_header(10, max_frame_bytes=10) == bytes((0, 0, 0, 10))
    with pytest.raises(LocalProtocolError):
        format_header(11, max_frame_bytes=10)


def test_a_limit_that_is_changed_counts_from_the_next_header_on():
    parser = FrameParser(max_frame_bytes=2)
    bodies = parser.feed(frame(b"ab") + frame(b"abcd") + frame(b"abc")[:4])
    assert next(bodies) == b"ab"
    parser.max_frame_bytes = 4
    assert list(bodies) == [b"abcd"]
    parser.max_frame_bytes = 1
    assert list(parser.feed(b"abc")) == [b"abc"]
    with pytest.raises(MessageTooLarge):
        list(parser.feed(frame(b"ab")))

from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import MessageTooLarge, RemoteProtocolError
from p2p.wire import outline
from p2p.wire.message import decode_message
from p2p.wire.outline import check_outline

values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(),
        st.binary(max_size=70_000),
        st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=300)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=20), st.dictionaries(st.text(max_size=40), inner, max_size=20)
    ),
    max_leaves=40,
)


def count(value: object) -> int:
    if isinstance(value, list):
        return 1 + sum(map(count, value))
    if isinstance(value, dict):
        return 1 + sum(1 + count(item) for item in value.values())
    return 1


@given(values)
def test_outline_counts_what_msgpack_packs(value):
    body = msgpack.packb(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outline, "MAX_DEPTH", 100)
        patch.setattr(outline, "MAX_VALUES", count(value))
        check_outline(body)
        patch.setattr(outline, "MAX_VALUES", count(value) - 1)
        if isinstance(value, list | dict) and value:
            with pytest.raises(MessageTooLarge):
                check_outline(body)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\xdd\xff\xff\xff\xff", id="list of billions"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="map of billions"),
        pytest.param(b"\x91" * 18 + b"\xc0", id="too deep"),
        pytest.param(
            b"\xdd" + struct.pack(">I", 300_000) + b"\x80" * 300_000, id="many small maps"
        ),
        pytest.param((b"\xdc\xff\xff" * 12) + b"\xdd\x00\x20\x00\x00", id="lists within lists"),
    ],
)
def test_outline_refuses_what_takes_far_more_memory_than_bytes(body):
    with pytest.raises(MessageTooLarge):
        check_outline(body)


def test_outline_passes_the_longest_prompt():
    check_outline(msgpack.packb({"t": "generate", "tokens": [7] * 2**20}))


def test_outline_passes_a_large_binary_that_looks_like_lists():
    check_outline(msgpack.packb({"data": b"\xdd\xff\xff\xff\xff" * 1000}))


def test_message_with_a_deep_name_is_refused():
    """Its refusal once failed itself, over showing the name."""
    with pytest.raises(RemoteProtocolError):
        decode_message(b"\x81\xa1t" + b"\x91" * 1000 + b"\x01")


def test_message_of_many_small_maps_is_refused_before_it_is_made():
    body = b"\x82\xa1t\xa4step\xa1x\xdd" + struct.pack(">I", 1 << 22)
    with pytest.raises(MessageTooLarge):
        decode_message(body + b"\x80" * (1 << 22))

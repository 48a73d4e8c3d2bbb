"""Messages: what goes through unchanged, and what is refused."""

from __future__ import annotations

import contextlib
import math
import struct
from dataclasses import dataclass
from typing import Annotated

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.wire.message import (
    Bound,
    Message,
    decode_message,
    encode_message,
    expect,
    message,
)
from p2p.wire.replies import Ok, Refusal
from p2p.wire.session_messages import HopTime, Step, StepResult
from p2p.wire.tensor import DTYPE_BYTES, WireTensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    size: Annotated[int, Bound(0, 9)] = 0
    name: str = ""


@message("test_everything")
@dataclass(frozen=True, kw_only=True, slots=True)
class Everything(Message):
    whole: Annotated[int, Bound(-5, 5)]
    real: Annotated[float, Bound(0, 1)] = 0.5
    flag: bool = False
    text: Annotated[str, Bound(0, 10)] = ""
    data: Annotated[bytes, Bound(0, 10)] = b""
    maybe: Annotated[int, Bound(0, 3)] | None = None
    many: Annotated[tuple[Annotated[int, Bound(0, 9)], ...], Bound(0, 3)] = ()
    inner: Inner = Inner()
    inners: Annotated[tuple[Inner, ...], Bound(0, 2)] = ()
    tensor: WireTensor | None = None


inners = st.builds(Inner, size=st.integers(0, 9), name=st.text(max_size=5))
tensors = st.builds(
    lambda dtype, shape: WireTensor(dtype, shape, bytes(DTYPE_BYTES[dtype] * math.prod(shape))),
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
)
everything = st.builds(
    Everything,
    whole=st.integers(-5, 5),
    real=st.floats(0, 1),
    flag=st.booleans(),
    text=st.text(max_size=10),
    data=st.binary(max_size=10),
    maybe=st.none() | st.integers(0, 3),
    many=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    inner=inners,
    inners=st.lists(inners, max_size=2).map(tuple),
    tensor=st.none() | tensors,
)


def body_of(value: Message) -> bytes:
    wire = encode_message(value)
    assert int.from_bytes(wire[:4], "big") == len(wire) - 4
    return wire[4:]


@given(everything)
def test_round_trip(value):
    assert decode_message(body_of(value)) == value


@given(
    st.builds(
        Step,
        number=st.integers(0, 2**53),
        position=st.integers(0, 2**31),
        hidden=tensors,
        times=st.lists(
            st.builds(HopTime, queue_us=st.integers(0, 2**40), compute_us=st.integers(0, 2**40)),
            max_size=3,
        ).map(tuple),
    )
)
def test_round_trip_of_a_step(step):
    assert decode_message(body_of(step)) == step


def test_defaults_are_not_sent():
    assert msgpack.unpackb(body_of(Everything(whole=1))) == {"t": "test_everything", "whole": 1}


def test_an_unknown_key_is_passed_over():
    packed = msgpack.packb({"t": "ok", "new_in_version_2": [1, {"a": b"b"}]})
    assert decode_message(packed) == Ok()


def pack(**fields: object) -> bytes:
    return msgpack.packb({"t": "test_everything", "whole": 1, **fields})


HUGE_LIST = b"\xdd\xff\xff\xff\xff"
HUGE_MAP = b"\xdf\xff\xff\xff\xff"
HUGE_BYTES = b"\xc6\xff\xff\xff\xff"
HOSTILE = {
    "nothing": b"",
    "a number": b"\x01",
    "a list": msgpack.packb(["t", "ok"]),
    "no name": msgpack.packb({}),
    "a name that is a number": msgpack.packb({"t": 1}),
    "a name that is a list": msgpack.packb({"t": ["ok"]}),
    "an unknown name": msgpack.packb({"t": "nobody"}),
    "a dunder name": msgpack.packb({"t": "__class__"}),
    "more after the end": msgpack.packb({"t": "ok"}) + b"\x00",
    "cut off": msgpack.packb({"t": "ok"})[:-1],
    "a reserved byte": b"\xc1",
    "a key that is a number": b"\x81\x01\x02",
    "a key that is a list": b"\x81\x90\x02",
    "deep lists": b"\x91" * 100_000,
    "deep maps": b"\x81\xa1t" * 100_000,
    "a huge list": HUGE_LIST,
    "a huge map": HUGE_MAP,
    "huge bytes": HUGE_BYTES,
    "a huge list inside": b"\x82\xa1t\xa2ok\xa1x" + HUGE_LIST,
    "text that is no text": b"\x81\xa1t\xa2\xff\xfe",
    "an unknown extension": b"\x82\xa1t\xa2ok\xa1x\xd4\x63\x00",
    "a broken timestamp": b"\x82\xa1t\xa2ok\xa1x\xc7\x03\xff\x00\x00\x00",
    "whole missing": msgpack.packb({"t": "test_everything"}),
    "whole too large": pack(whole=6),
    "whole huge": pack(whole=2**63),
    "whole a bool": pack(whole=True),
    "whole a float": pack(whole=1.0),
    "whole text": pack(whole="1"),
    "whole none": pack(whole=None),
    "real not a number": pack(real=math.nan),
    "real infinite": pack(real=math.inf),
    "real too large": pack(real=1.5),
    "real a bool": pack(real=True),
    "flag a number": pack(flag=1),
    "text too long": pack(text="x" * 11),
    "text bytes": pack(text=b"x"),
    "data text": pack(data="x"),
    "data too long": pack(data=bytes(11)),
    "maybe too large": pack(maybe=4),
    "many too many": pack(many=[1, 2, 3, 4]),
    "many a map": pack(many={"a": 1}),
    "many of none": pack(many=[None]),
    "inner a list": pack(inner=[]),
    "inner none": pack(inner=None),
    "inner wrong": pack(inner={"size": 10}),
    "inners wrong": pack(inners=[{"size": 1}, {"size": "x"}]),
    "tensor bytes": pack(tensor=b"x"),
    "tensor empty": b"\x83\xa1t\xaftest_everything\xa5whole\x01\xa6tensor\xc7\x00\x01",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused(body):
    with pytest.raises(RemoteProtocolError):
        decode_message(body)


ACCEPTED = {
    "a whole number for a real one": (pack(real=1), Everything(whole=1, real=1.0)),
    "a default that is sent": (pack(real=0.5), Everything(whole=1)),
    "none for maybe": (pack(maybe=None), Everything(whole=1)),
    "an inner with a new key": (
        pack(inner={"size": 2, "new": 1}),
        Everything(whole=1, inner=Inner(size=2)),
    ),
}


@pytest.mark.parametrize(("body", "value"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_lawful_bytes_are_taken(body, value):
    assert decode_message(body) == value


def tensor_body(header: bytes, data: bytes) -> bytes:
    content = header + data
    return (
        b"\x83\xa1t\xaftest_everything\xa5whole\x01\xa6tensor"
        + struct.pack(">BIb", 0xC9, len(content), 1)
        + content
    )


def tensor_header(*parts: object) -> bytes:
    packed = msgpack.packb(parts)
    return bytes((len(packed),)) + packed


HOSTILE_TENSORS = {
    "unknown dtype": tensor_body(tensor_header("object", [1], "raw"), bytes(8)),
    "dtype a number": tensor_body(tensor_header(1, [1], "raw"), bytes(4)),
    "negative size": tensor_body(tensor_header("uint8", [-1], "raw"), b""),
    "size a bool": tensor_body(tensor_header("uint8", [True], "raw"), b"x"),
    "size a float": tensor_body(tensor_header("uint8", [1.0], "raw"), b"x"),
    "too many elements": tensor_body(tensor_header("uint8", [2**31, 2**31], "zip"), b""),
    "too many dimensions": tensor_body(tensor_header("uint8", [1] * 9, "raw"), b"x"),
    "too little data": tensor_body(tensor_header("float32", [2], "raw"), bytes(7)),
    "too much data": tensor_body(tensor_header("float32", [2], "raw"), bytes(9)),
    "codec a number": tensor_body(tensor_header("uint8", [1], 5), b"x"),
    "codec too long": tensor_body(tensor_header("uint8", [1], "x" * 33), b"x"),
    "two parts": tensor_body(tensor_header("uint8", [1]), b"x"),
    "header cut off": tensor_body(b"\xff" + tensor_header("uint8", [1], "raw"), b""),
    "header no list": tensor_body(b"\x01\x01", b""),
    "header deep": tensor_body(b"\xff" + b"\x91" * 255, b""),
}


@pytest.mark.parametrize("body", HOSTILE_TENSORS.values(), ids=HOSTILE_TENSORS.keys())
def test_hostile_tensors_are_refused(body):
    with pytest.raises(RemoteProtocolError):
        decode_message(body)


def test_a_tensor_that_breaks_the_rules_is_not_sent():
    for tensor in (
        WireTensor("float32", (2,), bytes(7)),
        WireTensor("complex64", (1,), bytes(8)),
        WireTensor("uint8", (-1,), b""),
    ):
        with pytest.raises(LocalProtocolError):
            encode_message(StepResult(number=1, hidden=tensor))


def test_a_message_over_the_limit_is_not_sent():
    with pytest.raises(LocalProtocolError):
        encode_message(Refusal(code="x", text="y" * 100), max_frame_bytes=50)


def test_two_messages_cannot_have_one_name():
    with pytest.raises(LocalProtocolError):
        message("ok")(type("Other", (Message,), {}))


def test_expect():
    assert expect(Ok(), Ok) == Ok()
    with pytest.raises(RemoteProtocolError, match="refusal"):
        expect(Refusal(code="x"), Ok)


@given(st.binary(max_size=200))
def test_any_bytes(body):
    with contextlib.suppress(RemoteProtocolError):
        decode_message(body)

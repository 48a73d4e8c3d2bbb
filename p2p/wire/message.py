"""Messages: frozen dataclasses to and from msgpack, with every field checked on arrival.

A message is a class made with `@message("name")`. On the wire it is a map of its fields under short
string keys, with the name under ``"t"``. Only fields that differ from their default are sent; a key
that the receiver does not know is passed over (so a newer peer can add one), a missing or wrong one
is a `RemoteProtocolError`. Bounds stand in the annotation: ``Annotated[int, Bound(0, 7)]``.
Invariant: a decoded message satisfies its annotations, all the way down.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, TypeVar

import msgpack

from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.wire.frame import MAX_FRAME_BYTES, format_header
from p2p.wire.outline import SMALL_BODY_BYTES, check_outline
from p2p.wire.tensor import TENSOR_EXTENSION, WireTensor, decode_tensor, encode_tensor_header

TYPE_KEY = "t"
_EXT32 = struct.Struct(">BIb")
_MAP16 = struct.Struct(">BH")

Check = Callable[[Any], Any]
"""Takes what msgpack read, gives the field's value, or raises `_Mismatch`."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Limits of a field: of the value of a number, of the length of everything else."""

    least: float
    most: float


Text = Annotated[str, Bound(0, 4096)]
Name = Annotated[str, Bound(1, 256)]
Count = Annotated[int, Bound(0, 2**53)]
BlockNumber = Annotated[int, Bound(0, 4096)]
Tokens = Annotated[int, Bound(0, 2**31)]
Seconds = Annotated[float, Bound(0, 1e9)]
PeerName = Annotated[str, Bound(1, 128)]
Digest = Annotated[bytes, Bound(32, 32)]
Address = Annotated[str, Bound(1, 512)]
Addresses = Annotated[tuple[Address, ...], Bound(0, 16)]


class _Mismatch(Exception):
    pass


class Message:
    """What every message class has; made by `message`."""

    MESSAGE_NAME: ClassVar[str]


M = TypeVar("M", bound=Message)

_classes: dict[str, type[Message]] = {}
_checks: dict[type, list[tuple[str, Check, bool]]] = {}
_defaults: dict[type, tuple[tuple[str, bytes, Any], ...]] = {}
_packed_names: dict[type, bytes] = {}


def message(name: str) -> Callable[[type[M]], type[M]]:
    """Registers a frozen dataclass as the message of that name.

    The dataclass decorator stands below this one. Names are global to the process, because peers
    and the Unix socket speak the same framing.
    """

    def register(cls: type[M]) -> type[M]:
        if name in _classes:
            raise LocalProtocolError(f"two messages are called {name!r}")
        cls.MESSAGE_NAME = name
        _classes[name] = cls
        _packed_names[cls] = msgpack.packb(TYPE_KEY) + msgpack.packb(name)
        return cls

    return register


def encode_message(value: Message, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """The message as one frame, header included.

    A tensor's data is copied exactly once, into the frame.

    Raises:
        LocalProtocolError: it is larger than a frame may be.
    """
    parts: list[bytes | memoryview] = [b"", b"", _packed_names[type(value)]]
    pack = msgpack.Packer(default=_plain).pack
    fields = 1
    for name, key, default in _defaults_of(type(value)):
        content = getattr(value, name)
        if type(content) is WireTensor:
            head = encode_tensor_header(content)
            data = content.data
            size = len(head) + len(data)
            parts += (key, _EXT32.pack(0xC9, size, TENSOR_EXTENSION), head, data)
        elif content != default:
            parts += (key, pack(content))
        else:
            continue
        fields += 1
    parts[1] = _MAP16.pack(0xDE, fields) if fields > 15 else bytes((0x80 | fields,))
    parts[0] = format_header(sum(map(len, parts)), max_frame_bytes=max_frame_bytes)
    return b"".join(parts)


def decode_message(body: bytes | memoryview) -> Message:
    """Reads one frame's body as the message that it names.

    Raises:
        RemoteProtocolError: it is no msgpack, no known message, or a field is not as declared.
        MessageTooLarge: it would take far more memory than it has bytes.
    """
    if len(body) > SMALL_BODY_BYTES:
        check_outline(body)
    try:
        raw = msgpack.unpackb(body, ext_hook=_decode_extension, use_list=False, strict_map_key=True)
    except RemoteProtocolError:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"a message of {len(body)} bytes is not msgpack") from error
    name = raw.get(TYPE_KEY) if isinstance(raw, dict) else None
    cls = _classes.get(name) if isinstance(name, str) else None
    if cls is None:
        shown = repr(name[:64]) if isinstance(name, str) else "without a name"
        raise RemoteProtocolError(f"a message of an unknown kind came ({shown})")
    try:
        return typing.cast(Message, _build(cls, raw))
    except _Mismatch as error:
        raise RemoteProtocolError(f"in a message {name!r}, {error}") from None


def expect(value: Message, cls: type[M]) -> M:
    """The message, if it is of the class that the conversation calls for.

    Raises:
        RemoteProtocolError: it is another.
    """
    if not isinstance(value, cls):
        raise RemoteProtocolError(
            f"a message {value.MESSAGE_NAME!r} came where {cls.MESSAGE_NAME!r} was expected"
        )
    return value


class Record:
    """A dataclass that stands inside messages, or is encoded alone, without a frame or a name."""

    def encode(self) -> bytes:
        """The record as msgpack."""
        packed: bytes = msgpack.packb(self, default=_plain)
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads and checks a record.

        Raises:
            RemoteProtocolError: it is not one.
        """
        try:
            raw = msgpack.unpackb(data, use_list=False, strict_map_key=True)
            return typing.cast(Self, _build(cls, raw))
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            raise RemoteProtocolError(f"a {cls.__name__} is not msgpack") from error
        except _Mismatch as error:
            raise RemoteProtocolError(f"in a {cls.__name__}, {error}") from None


def _plain(content: Any) -> dict[str, Any]:
    """What msgpack packs in the place of a dataclass."""
    if isinstance(content, WireTensor) or not dataclasses.is_dataclass(content):
        raise LocalProtocolError(f"a {type(content).__name__} cannot stand there in a message")
    plain = {}
    for name, _, default in _defaults_of(type(content)):
        value = getattr(content, name)
        if value != default:
            plain[name] = value
    return plain


def _defaults_of(cls: type) -> tuple[tuple[str, bytes, Any], ...]:
    """For each field: its name, the name in msgpack, and its default."""
    defaults = _defaults.get(cls)
    if defaults is None:
        defaults = _defaults[cls] = tuple(
            (field.name, msgpack.packb(field.name), field.default)
            for field in dataclasses.fields(cls)
        )
    return defaults


def _decode_extension(code: int, data: bytes) -> WireTensor:
    if code != TENSOR_EXTENSION:
        raise RemoteProtocolError(f"a msgpack extension of the unknown type {code} came")
    return decode_tensor(data)


def _build(cls: type, raw: Any) -> Any:
    if not isinstance(raw, dict):
        raise _Mismatch(f"a {cls.__name__} is no map")
    values = {}
    for name, check, is_needed in _checks_of(cls):
        if name in raw:
            try:
                values[name] = check(raw[name])
            except _Mismatch as error:
                raise _Mismatch(f"{name} {error}") from None
        elif is_needed:
            raise _Mismatch(f"{name} is missing")
    return cls(**values)


def _checks_of(cls: type) -> list[tuple[str, Check, bool]]:
    checks = _checks.get(cls)
    if checks is None:
        hints = typing.get_type_hints(cls, include_extras=True)
        checks = _checks[cls] = [
            (
                field.name,
                _make_check(hints[field.name]),
                field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING,
            )
            for field in dataclasses.fields(cls)
        ]
    return checks


def _make_check(hint: Any, bound: Bound | None = None) -> Check:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *extras = typing.get_args(hint)
        return _make_check(inner, next((e for e in extras if isinstance(e, Bound)), bound))
    if origin in (typing.Union, types.UnionType):
        inner_check = _make_check(
            next(arg for arg in typing.get_args(hint) if arg is not type(None)), bound
        )
        return lambda raw: None if raw is None else inner_check(raw)
    if origin is tuple:
        return _tuple_check(_make_check(typing.get_args(hint)[0]), bound)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint is not WireTensor:
        return lambda raw: _build(hint, raw)
    if hint in (int, float):
        return _number_check(hint, bound)
    if hint in (str, bytes, bool, WireTensor):
        return _value_check(hint, bound)
    raise LocalProtocolError(f"a message field cannot be a {hint}")


def _tuple_check(item_check: Check, bound: Bound | None) -> Check:
    most = int(bound.most) if bound else 4096

    def check(raw: Any) -> tuple[Any, ...]:
        if not isinstance(raw, tuple):
            raise _Mismatch("is no list")
        if len(raw) > most:
            raise _Mismatch(f"has {len(raw)} items, more than {most}")
        return tuple(item_check(item) for item in raw)

    return check


def _number_check(kind: type[int] | type[float], bound: Bound | None) -> Check:
    least, most = (bound.least, bound.most) if bound else (-(2.0**53), 2.0**53)

    def check(raw: Any) -> int | float:
        if kind is float and type(raw) is int:
            raw = float(raw)
        if type(raw) is not kind:
            raise _Mismatch(f"is no {kind.__name__}")
        if not math.isfinite(raw) or not (least <= raw <= most):
            raise _Mismatch(f"is {raw}, not within {least:g} and {most:g}")
        return raw

    return check


def _value_check(kind: type, bound: Bound | None) -> Check:
    def check(raw: Any) -> Any:
        if not isinstance(raw, kind):
            raise _Mismatch(f"is no {kind.__name__}")
        if bound is not None and not bound.least <= len(raw) <= bound.most:  # type: ignore[arg-type]
            raise _Mismatch(
                f"has a length of {len(raw)}, "  # type: ignore[arg-type]
                f"not within {bound.least:g} and {bound.most:g}"
            )
        return raw

    return check

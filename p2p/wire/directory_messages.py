"""The directory's conversation: ``/petald/directory/1``.

One stream, a few questions, each answered before the next: `PutRecord` and `PutBeat` with ``ok`` or
a ``refusal``, `ListRecords` with a `RecordList`, `GetRecords` with `Records`. A list says of each
record in 35 bytes whose and which it is, and how fresh; the records themselves are fetched where
they are not known.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import msgpack

from p2p.errors import RemoteProtocolError
from p2p.wire.message import Bound, Count, Digest, Message, PeerName, message

DIRECTORY_PROTOCOL = "/petald/directory/1"

MAX_BODY_BYTES = 4096
MAX_TTL_S = 60.0
MAX_RECORDS_PER_MESSAGE = 128

MAX_ROWS = 512
"""Of a list. A shard has 192 servers at most while estimates agree; from a key with more, which is
one that a swarm is about to split, a part chosen by chance is listed."""

AGE_UNIT_S = 0.25
"""So that `MAX_TTL_S` fits in a byte."""

_ROW = struct.Struct(">8sQHB16s")
ROW_BYTES = _ROW.size

BeatNumber = Annotated[int, Bound(0, 65535)]
Beat = Annotated[bytes, Bound(16, 16)]
PeerDigest = Annotated[bytes, Bound(8, 8)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedRecord:
    """A peer's statement under a key.

    Attributes:
        peer: whose it is, and whose signature it has.
        key: 32 bytes.
        sequence: of two records of a peer under a key, the higher is the newer.
        issued_at: seconds since the epoch, by the peer's own clock.
        ttl_s: for how long it holds, from its arrival or from that of its newest beat.
        body: what is stated; opaque here.
        beat: beat 0; see `p2p.beats`.
        signature: over everything else.
    """

    peer: PeerName
    key: Digest
    sequence: Count
    issued_at: Annotated[float, Bound(0, 2**40)]
    ttl_s: Annotated[float, Bound(0, MAX_TTL_S)]
    body: Annotated[bytes, Bound(0, MAX_BODY_BYTES)]
    beat: Beat
    signature: Annotated[bytes, Bound(64, 64)]

    def signed_bytes(self) -> bytes:
        """What the signature is over."""
        return signed_bytes(
            peer=self.peer,
            key=self.key,
            sequence=self.sequence,
            issued_at=self.issued_at,
            ttl_s=self.ttl_s,
            body=self.body,
            beat=self.beat,
        )


def signed_bytes(
    *,
    peer: str,
    key: bytes,
    sequence: int,
    issued_at: float,
    ttl_s: float,
    body: bytes,
    beat: bytes,
) -> bytes:
    """The bytes that are signed; the first word keeps them from meaning anything else."""
    packed: bytes = msgpack.packb(
        ("petald-record-1", peer, key, sequence, float(issued_at), float(ttl_s), body, beat)
    )
    return packed


@dataclass(frozen=True, slots=True)
class Row:
    """One record in a list.

    Attributes:
        peer: the digest of whose it is.
        sequence: of the record.
        number: of its newest beat; 0 where it had none since it was signed.
        age_s: for how long the holder has had that beat.
        beat: of that number.
    """

    peer: bytes
    sequence: int
    number: int
    age_s: float
    beat: bytes


def encode_rows(rows: Iterable[Row]) -> bytes:
    """A list's rows, one behind the other."""
    return b"".join(
        _ROW.pack(
            row.peer, row.sequence, row.number, min(int(row.age_s / AGE_UNIT_S), 255), row.beat
        )
        for row in rows
    )


def decode_rows(data: bytes) -> list[Row]:
    """The rows of a list.

    Raises:
        RemoteProtocolError: it ends within a row.
    """
    if len(data) % ROW_BYTES:
        raise RemoteProtocolError(f"a list of {len(data)} bytes ends within a row")
    return [
        Row(peer, sequence, number, age * AGE_UNIT_S, beat)
        for peer, sequence, number, age, beat in _ROW.iter_unpack(data)
    ]


@message("put_record")
@dataclass(frozen=True, kw_only=True, slots=True)
class PutRecord(Message):
    """Keep this record; it must be the asking peer's own.

    Attributes:
        number: of the newest beat.
        beat: of that number; nothing for beat 0, which the record holds.
    """

    record: SignedRecord
    number: BeatNumber = 0
    beat: Annotated[bytes, Bound(0, 16)] = b""


@message("put_beat")
@dataclass(frozen=True, kw_only=True, slots=True)
class PutBeat(Message):
    """The asking peer's record under this key still holds."""

    key: Digest
    sequence: Count
    number: BeatNumber
    beat: Beat


@message("list_records")
@dataclass(frozen=True, kw_only=True, slots=True)
class ListRecords(Message):
    """Which records are kept under this key?"""

    key: Digest


@message("record_list")
@dataclass(frozen=True, kw_only=True, slots=True)
class RecordList(Message):
    """What is kept under a key, or a part of it.

    Attributes:
        rows: for `decode_rows`.
    """

    rows: Annotated[bytes, Bound(0, MAX_ROWS * ROW_BYTES)]


@message("get_records")
@dataclass(frozen=True, kw_only=True, slots=True)
class GetRecords(Message):
    """The records of these peers under this key."""

    key: Digest
    peers: Annotated[tuple[PeerDigest, ...], Bound(1, MAX_RECORDS_PER_MESSAGE)]


@message("records")
@dataclass(frozen=True, kw_only=True, slots=True)
class Records(Message):
    """Those of the records that were asked for which are kept."""

    records: Annotated[tuple[SignedRecord, ...], Bound(0, MAX_RECORDS_PER_MESSAGE)]

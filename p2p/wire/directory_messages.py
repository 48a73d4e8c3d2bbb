"""The directory's conversation: ``/petald/directory/1``.

One stream, one question: `PutRecord` is answered with ``ok`` or a ``refusal``, `GetRecords` with
`Records`, as many of them as it takes, the last one marked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgpack

from p2p.wire.message import Bound, Count, Digest, Message, PeerName, message

DIRECTORY_PROTOCOL = "/petald/directory/1"

MAX_BODY_BYTES = 4096
MAX_TTL_S = 60.0
MAX_RECORDS_PER_MESSAGE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedRecord:
    """A peer's statement under a key.

    Attributes:
        peer: whose it is, and whose signature it has.
        key: 32 bytes.
        sequence: of two records of a peer under a key, the higher is the newer.
        issued_at: seconds since the epoch, by the peer's own clock.
        ttl_s: for how long it holds.
        body: what is stated; opaque here.
        signature: over everything else.
    """

    peer: PeerName
    key: Digest
    sequence: Count
    issued_at: Annotated[float, Bound(0, 2**40)]
    ttl_s: Annotated[float, Bound(0, MAX_TTL_S)]
    body: Annotated[bytes, Bound(0, MAX_BODY_BYTES)]
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
        )


def signed_bytes(
    *, peer: str, key: bytes, sequence: int, issued_at: float, ttl_s: float, body: bytes
) -> bytes:
    """The bytes that are signed; the first word keeps them from meaning anything else."""
    packed: bytes = msgpack.packb(
        ("petald-record-1", peer, key, sequence, float(issued_at), float(ttl_s), body)
    )
    return packed


@message("put_record")
@dataclass(frozen=True, kw_only=True, slots=True)
class PutRecord(Message):
    """Keep this record; it must be the asking peer's own."""

    record: SignedRecord


@message("get_records")
@dataclass(frozen=True, kw_only=True, slots=True)
class GetRecords(Message):
    """Which records are kept under this key?"""

    key: Digest


@message("records")
@dataclass(frozen=True, kw_only=True, slots=True)
class Records(Message):
    """Some of a key's records.

    Attributes:
        is_last: whether no more messages follow.
    """

    records: Annotated[tuple[SignedRecord, ...], Bound(0, MAX_RECORDS_PER_MESSAGE)]
    is_last: bool = True

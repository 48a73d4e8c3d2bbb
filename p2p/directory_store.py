"""The records that this peer keeps for others.

Pure. Per key, one record for each peer, the newest by sequence number, until it expires. Every
table has a bound. Full tables refuse newcomers rather than drop what they hold: a flooder with many
identities can fill a key that nobody used before, but cannot push out those who are there. (Against
that flood, a reader asks several holders; what is not defended is a flood of all of them.) Expiry
is counted from the arrival of a record, on this peer's own clock, so that a wrong clock at the
author neither prolongs nor shortens it.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2p.errors import RecordRejected
from p2p.wire.directory_messages import SignedRecord


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bounds of a store.

    Attributes:
        keys: distinct keys.
        records_per_key: peers under one key.
        records: of all keys together.
        keys_per_peer: under which one peer has a record.
        body_bytes: of all records together.
    """

    keys: int = 4096
    records_per_key: int = 16_384
    records: int = 65_536
    keys_per_peer: int = 64
    body_bytes: int = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Kept:
    record: SignedRecord
    expires_at: float


class DirectoryStore:
    """Records by key and peer.

    Args:
        limits: bounds of its tables.
    """

    def __init__(self, limits: StoreLimits | None = None) -> None:
        self._limits = limits or StoreLimits()
        self._keys: dict[bytes, dict[str, _Kept]] = {}
        self._keys_of_peer: dict[str, int] = {}
        self._records = 0
        self._body_bytes = 0

    def __len__(self) -> int:
        return self._records

    def put(self, record: SignedRecord, *, now: float) -> None:
        """Keeps a record whose signature was checked.

        Raises:
            RecordRejected: it is older than what is kept, or there is no room.
        """
        self._expire(record.key, now)
        known = self._keys.get(record.key, {}).get(record.peer)
        if known is not None and record.sequence <= known.record.sequence:
            if record == known.record:
                return
            raise RecordRejected(
                f"sequence number {record.sequence} is not over {known.record.sequence}"
            )
        grown_bytes = len(record.body) - (len(known.record.body) if known else 0)
        if known is None and not self._has_room(record.key, now):
            raise RecordRejected("this holder's table is full")
        if known is None and self._keys_of_peer.get(record.peer, 0) >= self._limits.keys_per_peer:
            raise RecordRejected(
                f"this holder keeps {self._limits.keys_per_peer} records of the peer already"
            )
        if self._body_bytes + grown_bytes > self._limits.body_bytes:
            raise RecordRejected("this holder's memory for records is full")
        self._body_bytes += grown_bytes
        if known is None:
            self._records += 1
            self._keys_of_peer[record.peer] = self._keys_of_peer.get(record.peer, 0) + 1
        self._keys.setdefault(record.key, {})[record.peer] = _Kept(record, now + record.ttl_s)

    def get(self, key: bytes, *, now: float) -> tuple[SignedRecord, ...]:
        """The records under a key that hold now."""
        self._expire(key, now)
        return tuple(kept.record for kept in self._keys.get(key, {}).values())

    def _has_room(self, key: bytes, now: float) -> bool:
        limits = self._limits
        known = self._keys.get(key)
        if known is not None and len(known) >= limits.records_per_key:
            return False
        is_full = self._records >= limits.records
        if is_full or (known is None and len(self._keys) >= limits.keys):
            for other in list(self._keys):
                self._expire(other, now)
        has_key = key in self._keys or len(self._keys) < limits.keys
        return has_key and self._records < limits.records

    def _expire(self, key: bytes, now: float) -> None:
        records = self._keys.get(key)
        if records is None:
            return
        for peer in [peer for peer, kept in records.items() if kept.expires_at <= now]:
            self._body_bytes -= len(records.pop(peer).record.body)
            self._records -= 1
            self._keys_of_peer[peer] -= 1
            if not self._keys_of_peer[peer]:
                del self._keys_of_peer[peer]
        if not records:
            del self._keys[key]

"""Attacks the store of the directory's records.

Invariant: whatever is put, `DirectoryStore` keeps within its limits, gives only what holds, of
each peer the newest, and refuses with `RecordRejected` alone; who is in it is not pushed out.

Each six bytes of the input are one put or one passing of time.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from fuzz.campaign import main
from p2p.directory_store import DirectoryStore, StoreLimits
from p2p.errors import RecordRejected
from p2p.wire.directory_messages import SignedRecord

LIMITS = StoreLimits(keys=3, records_per_key=4, body_bytes=400)
STEP_BYTES = 6


def check(data: bytes) -> None:
    store = DirectoryStore(LIMITS)
    newest: dict[tuple[bytes, str], tuple[SignedRecord, float]] = {}
    now = 0.0
    for start in range(0, len(data) - STEP_BYTES + 1, STEP_BYTES):
        step = data[start : start + STEP_BYTES]
        now += step[0] / 16
        record = SignedRecord(
            peer=f"peer {step[1] % 8}",
            key=bytes((step[2] % 6,)) * 32,
            sequence=step[3] % 16,
            issued_at=now,
            ttl_s=step[4] / 4,
            body=bytes(step[5]),
            signature=bytes(64),
        )
        place = (record.key, record.peer)
        held = newest.get(place)
        try:
            store.put(record, now=now)
        except RecordRejected:
            pass
        else:
            is_newer = held is None or held[1] <= now or record.sequence > held[0].sequence
            assert is_newer or record == held[0], "an older record was taken"
            if is_newer:
                newest[place] = (record, now + record.ttl_s)
        check_content(store, newest, now)


def check_content(
    store: DirectoryStore, newest: dict[tuple[bytes, str], tuple[SignedRecord, float]], now: float
) -> None:
    kept: list[SignedRecord] = []
    keys = 0
    for number in range(6):
        found = store.get(bytes((number,)) * 32, now=now)
        assert len(found) <= LIMITS.records_per_key
        keys += bool(found)
        kept += found
    assert keys <= LIMITS.keys
    assert sum(len(record.body) for record in kept) <= LIMITS.body_bytes
    expected = [record for record, expires_at in newest.values() if expires_at > now]
    assert len(kept) == len(store) == len(expected), "a record was lost, or outlived its time"
    assert all(record in expected for record in kept), "a record is not the newest"


if __name__ == "__main__":
    main(check, "fuzz_directory")

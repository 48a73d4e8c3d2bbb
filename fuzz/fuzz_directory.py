"""Attacks the store of the directory's records.

Invariant: whatever is put, `DirectoryStore` keeps within its limits, gives only what holds, of
each peer the newest, refuses with `RecordRejected` alone, and drops what holds only for others of
fewer in their neighbourhood.

Each eight bytes of the input are one put of a record or a beat, or one passing of time.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from fuzz.campaign import main
from p2p.beats import BeatChain
from p2p.directory_store import RECORD_BYTES, DirectoryStore, StoreLimits
from p2p.errors import RecordRejected
from p2p.shards import peer_digest
from p2p.wire.directory_messages import SignedRecord

LIMITS = StoreLimits(records_per_key=4, keys_per_peer=3, total_bytes=9 * RECORD_BYTES + 400)
STEP_BYTES = 8
KEYS = [bytes((number,)) * 32 for number in range(6)]
CHAIN = BeatChain(bytes(16))

Newest = dict[tuple[bytes, str], tuple[SignedRecord, float, int]]
"""What was taken last, when, and with which beat."""


def check(data: bytes) -> None:
    store = DirectoryStore(LIMITS)
    newest: Newest = {}
    now = 0.0
    for start in range(0, len(data) - STEP_BYTES + 1, STEP_BYTES):
        step = data[start : start + STEP_BYTES]
        now += step[0] / 16
        key, peer = KEYS[step[2] % 6], f"peer {step[1] % 8}"
        if step[6] % 2:
            beat(store, newest, key, peer, step, now)
        else:
            put(store, newest, key, peer, step, now)
        check_content(store, newest, now)


def put(
    store: DirectoryStore, newest: Newest, key: bytes, peer: str, step: bytes, now: float
) -> None:
    record = SignedRecord(
        peer=peer,
        key=key,
        sequence=step[3] % 16,
        issued_at=0.0,
        ttl_s=step[4] / 4,
        body=bytes(step[5]),
        beat=CHAIN.end,
        signature=bytes(64),
    )
    held = newest.get((key, peer))
    was_kept = peer in {each.peer for each in store.get(key, now=now)}
    number = step[6] // 2 % 4
    try:
        store.put(
            record,
            now=now,
            number=number,
            beat=CHAIN.beat(number),
            neighbourhood=str(step[7] % 4),
        )
    except RecordRejected:
        return
    if held is None or not was_kept or record.sequence > held[0].sequence:
        newest[key, peer] = (record, now, number)
    else:
        assert record == held[0], "an older record was taken"
        if number > held[2]:
            newest[key, peer] = (record, now, number)


def beat(
    store: DirectoryStore, newest: Newest, key: bytes, peer: str, step: bytes, now: float
) -> None:
    number, value = step[6] // 2 % 8, CHAIN.beat(step[5] % 8)
    try:
        store.put_beat(key, peer, sequence=step[3] % 16, number=number, beat=value, now=now)
    except RecordRejected:
        return
    record, _, before = newest[key, peer]
    assert value == CHAIN.beat(number), "a forged beat was taken"
    assert record.sequence == step[3] % 16
    if number > before:
        newest[key, peer] = (record, now, number)
    else:
        assert number == before, "an old beat was taken"


def check_content(store: DirectoryStore, newest: Newest, now: float) -> None:
    count, size = 0, 0
    for key in KEYS:
        found = store.get(key, now=now)
        rows = {row.peer: row for row in store.list_rows(key, now=now)}
        assert len(found) == len(rows) <= LIMITS.records_per_key
        count += len(found)
        size += sum(RECORD_BYTES + len(record.body) for record in found)
        for record in found:
            expected, at, number = newest[key, record.peer]
            assert record == expected, "a record is not the newest"
            assert now < at + record.ttl_s, "a record outlived its time"
            row = rows[peer_digest(record.peer)]
            assert (row.sequence, row.number) == (record.sequence, number)
            assert abs(row.age_s - (now - at)) < 1e-6
    assert len(store) == count
    assert store.total_bytes == size <= LIMITS.total_bytes


if __name__ == "__main__":
    main(check, "fuzz_directory")

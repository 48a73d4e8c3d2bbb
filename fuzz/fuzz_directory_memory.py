"""Attacks what a reader makes of holders' answers.

Invariant: whatever holders list and give, `KeyMemory` raises nothing, believes only what authors
signed, of each the newest that it was told, for no longer than its time after the newest beat that
the author made, and keeps and fetches no more than its bounds.

Each ten bytes of the input are one answer of one of three holders, or one passing of time.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from fuzz.campaign import main
from p2p.beats import BEAT_S, BeatChain
from p2p.directory_memory import MAX_KNOWN, KeyMemory
from p2p.errors import RemoteProtocolError
from p2p.shards import peer_digest
from p2p.wire.directory_messages import (
    MAX_RECORDS_PER_MESSAGE,
    Row,
    SignedRecord,
    decode_rows,
    encode_rows,
)

KEY = b"k" * 32
STEP_BYTES = 10
TTL_S = 45.0
BEATS = 4
"""So many beats each author has made; it is dead from then on."""

CHAINS = [BeatChain(bytes((number,)) * 16) for number in range(8)]


def make_true(number: int) -> SignedRecord:
    """One of eight: four peers' older and newer records."""
    return SignedRecord(
        peer=f"peer {number % 4}",
        key=KEY,
        sequence=1 + number // 4,
        issued_at=0.0,
        ttl_s=TTL_S,
        body=bytes((number,)),
        beat=CHAINS[number].end,
        signature=bytes(64),
    )


TRUE = [make_true(number) for number in range(8)]


def check(data: bytes) -> None:
    memory = KeyMemory(KEY, is_signed=TRUE.__contains__)
    memory.begin(0.0)
    now = 0.0
    for start in range(0, len(data) - STEP_BYTES + 1, STEP_BYTES):
        step = data[start : start + STEP_BYTES]
        now += step[0] / 8
        holder = f"holder {step[1] % 3}"
        if step[2] % 16 == 0:
            memory.finish(now)
            memory.begin(now)
        elif step[2] % 4 == 1:
            try:
                memory.on_list(
                    holder, decode_rows(data[start:][: step[3] * 7]), now=now, wall_now=now
                )
            except RemoteProtocolError:
                continue
        else:
            rows = decode_rows(encode_rows(make_rows(step)))
            memory.on_list(holder, rows, now=now, wall_now=now)
            fetch(memory, holder, step, now)
        check_belief(memory, now)


def make_rows(step: bytes) -> list[Row]:
    """Of two records, true or with a wrong number, beat or age."""
    rows = []
    for record, chain in ((TRUE[step[3] % 8], step[4]), (TRUE[step[4] % 8], step[3])):
        number = step[5] % (BEATS + 1)
        beat = CHAINS[TRUE.index(record) if step[6] % 4 else chain % 8].beat(number)
        sequence = record.sequence + step[7] % 8 // 7
        digest = peer_digest(record.peer)
        rows.append(Row(digest, sequence, number + step[8] % 8 // 7, step[9] / 4, beat))
    return rows


def fetch(memory: KeyMemory, holder: str, step: bytes, now: float) -> None:
    for _ in range(3):
        claimed = memory.claim(holder, now)
        assert len(claimed) <= MAX_RECORDS_PER_MESSAGE
        if not claimed:
            return
        if step[6] % 8 == 3:
            memory.release(holder, claimed, now)
            continue
        given = [record for record in TRUE if peer_digest(record.peer) in claimed]
        given = given[step[7] % 3 :]
        if given and step[8] % 3 == 0:
            given[0] = dataclasses.replace(given[0], body=b"false")
        memory.on_records(holder, claimed, given, now=now, wall_now=now)
    assert not memory.claim(holder, now), "the same is fetched again and again"


def check_belief(memory: KeyMemory, now: float) -> None:
    living = memory.living(now)
    assert len(living) <= MAX_KNOWN
    for digest, known in living.items():
        assert known.record in TRUE, "a forged record is believed"
        assert digest == peer_digest(known.peer)
        assert known.number <= BEATS, "a forged beat is believed"
        assert known.arrived_at <= known.heard_at <= now
        assert now < known.heard_at + TTL_S, "a record outlived its time"
        told_at = known.record.issued_at + known.number * BEAT_S
        assert now - told_at < 600 + 2 * TTL_S, "a record of long ago is believed"
    memory.is_enough(now)
    memory.find_bad(("holder 0", "holder 1", "holder 2"), now)


if __name__ == "__main__":
    main(check, "fuzz_directory_memory")

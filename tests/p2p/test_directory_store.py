"""The store of records, against a plain model of it, and its bounds."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.beats import MAX_BEATS, BeatChain
from p2p.directory_store import RECORD_BYTES, DirectoryStore, StoreLimits
from p2p.errors import RecordRejected
from p2p.shards import peer_digest
from p2p.wire.directory_messages import MAX_ROWS, SignedRecord

KEYS = [bytes([number]) * 32 for number in range(4)]
CHAIN = BeatChain(b"s" * 16)
PEERS = ["peer-a", "peer-b", "peer-c"]


def make_record(key=KEYS[0], peer="peer-a", sequence=1, ttl_s=10.0, body=b"body"):
    return SignedRecord(
        peer=peer,
        key=key,
        sequence=sequence,
        issued_at=0.0,
        ttl_s=ttl_s,
        body=body,
        beat=CHAIN.end,
        signature=bytes(64),
    )


records = st.builds(
    make_record,
    key=st.sampled_from(KEYS),
    peer=st.sampled_from(PEERS),
    sequence=st.integers(0, 5),
    ttl_s=st.integers(1, 10).map(float),
    body=st.binary(max_size=4),
)


@given(st.lists(st.tuples(records, st.integers(0, 4)), max_size=40))
def test_against_a_model(steps):
    store = DirectoryStore()
    model: dict[tuple[bytes, str], tuple[SignedRecord, float]] = {}
    now = 0.0
    for record, pause_s in steps:
        now += pause_s
        model = {name: entry for name, entry in model.items() if entry[1] > now}
        name = (record.key, record.peer)
        known = model.get(name)
        if known is None or record.sequence > known[0].sequence:
            store.put(record, now=now)
            model[name] = (record, now + record.ttl_s)
        elif record == known[0]:
            store.put(record, now=now)
        else:
            with pytest.raises(RecordRejected):
                store.put(record, now=now)
        for key in KEYS:
            expected = {peer: entry[0] for (each, peer), entry in model.items() if each == key}
            assert {kept.peer: kept for kept in store.get(key, now=now)} == expected
        assert len(store) == len(model)


def test_expiry_counts_from_arrival():
    store = DirectoryStore()
    store.put(make_record(ttl_s=10), now=100)
    assert len(store.get(KEYS[0], now=109.9)) == 1
    assert store.get(KEYS[0], now=110) == ()
    assert len(store) == 0
    store.put(make_record(sequence=0), now=110)


def test_repeating_a_record_does_not_prolong_it():
    store = DirectoryStore()
    store.put(make_record(ttl_s=10), now=0)
    store.put(make_record(ttl_s=10), now=9)
    assert store.get(KEYS[0], now=10) == ()


LIMITS = StoreLimits(records_per_key=2, keys_per_peer=2, total_bytes=3 * RECORD_BYTES + 100)


def peers_of(store, key=KEYS[0], now=0.0):
    return {record.peer for record in store.get(key, now=now)}


def test_a_full_key_keeps_what_it_has():
    store = DirectoryStore(LIMITS)
    store.put(make_record(peer="a"), now=0)
    store.put(make_record(peer="b"), now=0)
    with pytest.raises(RecordRejected):
        store.put(make_record(peer="c"), now=1)
    store.put(make_record(peer="a", sequence=2), now=1)
    assert peers_of(store, now=1) == {"a", "b"}
    store.put(make_record(peer="c", ttl_s=60), now=11)


def test_a_full_table_makes_room_of_what_expired():
    store = DirectoryStore(LIMITS)
    store.put(make_record(KEYS[0], "a"), now=0)
    store.put(make_record(KEYS[1], "b"), now=5)
    store.put(make_record(KEYS[2], "c"), now=5)
    with pytest.raises(RecordRejected):
        store.put(make_record(KEYS[3], "d"), now=9)
    store.put(make_record(KEYS[3], "d"), now=10)


def test_one_peer_cannot_take_every_key():
    store = DirectoryStore(StoreLimits(keys_per_peer=2))
    store.put(make_record(KEYS[0]), now=0)
    store.put(make_record(KEYS[1]), now=0)
    with pytest.raises(RecordRejected):
        store.put(make_record(KEYS[2]), now=0)
    store.put(make_record(KEYS[0], sequence=2), now=0)
    store.put(make_record(KEYS[2], "other"), now=0)


def test_bodies_together_are_bounded():
    store = DirectoryStore(LIMITS)
    limit = LIMITS.total_bytes - 2 * RECORD_BYTES
    store.put(make_record(peer="a", body=bytes(limit - 1)), now=0)
    with pytest.raises(RecordRejected):
        store.put(make_record(peer="b", body=bytes(2)), now=0)
    store.put(make_record(peer="b", body=bytes(1)), now=0)
    with pytest.raises(RecordRejected):
        store.put(make_record(peer="b", sequence=2, body=bytes(2)), now=0)
    store.put(make_record(peer="a", sequence=2, body=bytes(10)), now=0)
    store.put(make_record(peer="b", sequence=2, body=bytes(41)), now=0)
    assert store.total_bytes == 2 * RECORD_BYTES + 51


def test_a_beat_prolongs_a_record():
    store = DirectoryStore()
    store.put(make_record(ttl_s=10), now=0)
    store.put_beat(KEYS[0], "peer-a", sequence=1, number=1, beat=CHAIN.beat(1), now=9)
    store.put_beat(KEYS[0], "peer-a", sequence=1, number=3, beat=CHAIN.beat(3), now=12)
    (row,) = store.list_rows(KEYS[0], now=14)
    assert (row.sequence, row.number, row.age_s, row.beat) == (1, 3, 2, CHAIN.beat(3))
    assert store.get(KEYS[0], now=22) == ()


@pytest.mark.parametrize(
    ("peer", "sequence", "number", "beat"),
    [
        ("peer-b", 1, 5, CHAIN.beat(5)),
        ("peer-a", 2, 5, CHAIN.beat(5)),
        ("peer-a", 1, 5, CHAIN.beat(6)),
        ("peer-a", 1, 1, CHAIN.beat(1)),
        ("peer-a", 1, MAX_BEATS + 1, bytes(16)),
    ],
    ids=["not there", "of another record", "forged", "old", "too many"],
)
def test_a_wrong_beat_is_not_taken(peer, sequence, number, beat):
    store = DirectoryStore()
    store.put(make_record(ttl_s=10), now=0)
    store.put_beat(KEYS[0], "peer-a", sequence=1, number=2, beat=CHAIN.beat(2), now=0)
    with pytest.raises(RecordRejected):
        store.put_beat(KEYS[0], peer, sequence=sequence, number=number, beat=beat, now=5)
    assert store.get(KEYS[0], now=10) == ()


def test_repeating_a_beat_does_not_prolong_it():
    store = DirectoryStore()
    store.put(make_record(ttl_s=10), now=0)
    for now in (2, 9):
        store.put_beat(KEYS[0], "peer-a", sequence=1, number=2, beat=CHAIN.beat(2), now=now)
    assert store.get(KEYS[0], now=12) == ()


def test_a_record_comes_with_its_newest_beat():
    store = DirectoryStore()
    store.put(make_record(ttl_s=10), now=0, number=4, beat=CHAIN.beat(4))
    assert store.list_rows(KEYS[0], now=0)[0].number == 4
    with pytest.raises(RecordRejected):
        store.put(make_record(peer="b"), now=0, number=4, beat=CHAIN.beat(5))


def test_a_long_list_is_a_part_by_chance():
    store = DirectoryStore(rng=random.Random(1))
    for number in range(MAX_ROWS + 100):
        store.put(make_record(peer=f"peer {number}"), now=0)
    lists = [{row.peer for row in store.list_rows(KEYS[0], now=0)} for _ in range(8)]
    assert {len(each) for each in lists} == {MAX_ROWS}
    assert len(set.union(*lists)) == MAX_ROWS + 100


def test_only_the_records_asked_for_are_given():
    store = DirectoryStore()
    for peer in PEERS:
        store.put(make_record(peer=peer), now=0)
    asked = [peer_digest("peer-b"), peer_digest("peer-b"), peer_digest("nobody")]
    assert [record.peer for record in store.get(KEYS[0], now=0, peers=asked)] == ["peer-b"]


def test_a_flood_from_one_neighbourhood_keeps_nobody_out():
    store = DirectoryStore(StoreLimits(records_per_key=10))
    store.put(make_record(peer="first"), now=0, neighbourhood="192.0.2.0/24")
    for number in range(100):
        with contextlib.suppress(RecordRejected):
            store.put(make_record(peer=f"flood {number}"), now=0, neighbourhood="198.51.100.0/24")
    for number in range(4):
        store.put(make_record(peer=f"late {number}"), now=1, neighbourhood=f"203.0.{number}.0/24")
    kept = peers_of(store, now=1)
    assert len(kept) == 10
    assert kept >= {"first", "late 0", "late 1", "late 2", "late 3"}


def test_a_flood_from_one_neighbourhood_crowds_nobody_out_of_lists():
    store = DirectoryStore()
    for number in range(2000):
        store.put(make_record(peer=f"flood {number}"), now=0, neighbourhood="198.51.100.0/24")
    honest = {f"peer {number}" for number in range(200)}
    for number, peer in enumerate(sorted(honest)):
        store.put(make_record(peer=peer), now=0, neighbourhood=f"203.0.{number % 20}.0/24")
    listed = {row.peer for row in store.list_rows(KEYS[0], now=0)}
    assert len(listed) == MAX_ROWS
    assert listed >= {peer_digest(peer) for peer in honest}


def test_who_was_there_before_a_flood_from_his_neighbourhood_stays():
    store = DirectoryStore(StoreLimits(records_per_key=4))
    store.put(make_record(peer="first"), now=0, neighbourhood="a")
    for number in range(3):
        store.put(make_record(peer=f"flood {number}"), now=0, neighbourhood="a")
    store.put(make_record(peer="first", sequence=2), now=1, neighbourhood="a")
    for number in range(2):
        store.put(make_record(peer=f"late {number}"), now=1, neighbourhood=f"b {number}")
    assert peers_of(store, now=1) == {"first", "flood 0", "late 0", "late 1"}


def test_memory_is_shared_between_neighbourhoods_like_a_key():
    store = DirectoryStore(LIMITS)
    for number in range(3):
        store.put(make_record(KEYS[number], f"flood {number}"), now=0, neighbourhood="a")
    store.put(make_record(KEYS[3], "late"), now=0, neighbourhood="b")
    assert peers_of(store, KEYS[3]) == {"late"}
    assert peers_of(store, KEYS[2]) == set()
    assert len(store) == 3

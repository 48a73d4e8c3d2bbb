"""The store of records, against a plain model of it, and its bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.directory_store import DirectoryStore, StoreLimits
from p2p.errors import RecordRejected
from p2p.wire.directory_messages import SignedRecord

KEYS = [bytes([number]) * 32 for number in range(4)]
PEERS = ["peer-a", "peer-b", "peer-c"]


def make_record(key=KEYS[0], peer="peer-a", sequence=1, ttl_s=10.0, body=b"body"):
    return SignedRecord(
        peer=peer,
        key=key,
        sequence=sequence,
        issued_at=0.0,
        ttl_s=ttl_s,
        body=body,
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


LIMITS = StoreLimits(keys=2, records_per_key=2, records=3, keys_per_peer=2, body_bytes=100)


def test_a_full_key_keeps_what_it_has():
    store = DirectoryStore(LIMITS)
    store.put(make_record(peer="a"), now=0)
    store.put(make_record(peer="b"), now=0)
    with pytest.raises(RecordRejected):
        store.put(make_record(peer="c"), now=1)
    store.put(make_record(peer="a", sequence=2), now=1)
    assert {record.peer for record in store.get(KEYS[0], now=1)} == {"a", "b"}
    store.put(make_record(peer="c", ttl_s=60), now=11)


def test_a_full_table_makes_room_of_what_expired():
    store = DirectoryStore(LIMITS)
    store.put(make_record(KEYS[0], "a"), now=0)
    store.put(make_record(KEYS[1], "b"), now=5)
    with pytest.raises(RecordRejected):
        store.put(make_record(KEYS[2], "c"), now=9)
    store.put(make_record(KEYS[2], "c"), now=10)


def test_all_records_together_are_bounded():
    store = DirectoryStore(LIMITS)
    store.put(make_record(KEYS[0], "a"), now=0)
    store.put(make_record(KEYS[0], "b"), now=0)
    store.put(make_record(KEYS[1], "c"), now=0)
    with pytest.raises(RecordRejected):
        store.put(make_record(KEYS[1], "d"), now=0)


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
    store.put(make_record(peer="a", body=bytes(60)), now=0)
    with pytest.raises(RecordRejected):
        store.put(make_record(peer="b", body=bytes(41)), now=0)
    store.put(make_record(peer="a", sequence=2, body=bytes(10)), now=0)
    store.put(make_record(peer="b", body=bytes(41)), now=0)

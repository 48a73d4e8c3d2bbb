"""The directory: alone, among peers, with liars, with peers that hang, and over time."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from p2p.directory import LOOKUP_DEADLINE_S, Directory, Lookup
from p2p.directory_holder import HELLO_DEADLINE_S
from p2p.directory_memory import CLOCK_SKEW_S
from p2p.errors import Refused, StreamBroken
from p2p.identity import create_identity
from p2p.libp2p_network import open_libp2p_network
from p2p.memory_network import MemoryHub, MemoryNetwork, open_memory_hub
from p2p.network import Stream
from p2p.rpc import FIRST_MESSAGE_BYTES, MessageStream, call
from p2p.shards import peer_digest
from p2p.wire.directory_messages import (
    DIRECTORY_PROTOCOL,
    ListRecords,
    PutRecord,
    RecordList,
    Records,
    Row,
    SignedRecord,
    encode_rows,
)
from p2p.wire.replies import Ok
from tests.p2p.test_network import LOOPBACK

KEY = b"k" * 32


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


def add_directory(hub: MemoryHub, offset_s: float = 0.0) -> tuple[MemoryNetwork, Directory]:
    network = hub.make_network()
    return network, Directory(network, wall_clock=lambda: 1e9 + offset_s + trio.current_time())


async def test_alone(autojump_clock):
    async with open_memory_hub() as hub:
        network, directory = add_directory(hub)
        assert await directory.lookup(KEY) == Lookup(())
        assert await directory.publish(KEY, b"me", ttl_s=30, sequence=1) == 1
        (record,) = (await directory.lookup(KEY)).records
        assert (record.peer, record.body) == (network.peer, b"me")


async def test_everybody_sees_everybody(autojump_clock):
    async with open_memory_hub(latency_s=0.02) as hub:
        parts = [add_directory(hub) for _ in range(12)]
        for number, (_, directory) in enumerate(parts):
            body = b"%d" % number
            assert await directory.publish(KEY, body, ttl_s=30, sequence=1) == 8
        for _, directory in parts:
            found = {record.peer: record.body for record in (await directory.lookup(KEY)).records}
            assert found == {part[0].peer: b"%d" % n for n, part in enumerate(parts)}
        assert await parts[0][1].lookup(b"x" * 32) == Lookup(())


async def test_the_newest_of_several_holders_is_it(autojump_clock):
    async with open_memory_hub() as hub:
        (a, publisher), (b, _), (_, reader) = (add_directory(hub) for _ in range(3))
        await publisher.publish(KEY, b"old", ttl_s=60, sequence=1)
        hub.freeze(b.peer)  # it misses the next one
        await publisher.publish(KEY, b"new", ttl_s=60, sequence=2)
        hub.thaw(b.peer)
        assert [record.body for record in (await reader.lookup(KEY)).records] == [b"new"]
        assert {each.peer for each in await a.find_closest_peers(KEY, 9)} >= {b.peer}


async def test_expiry(autojump_clock):
    async with open_memory_hub() as hub:
        (_, one), (_, other) = (add_directory(hub) for _ in range(2))
        await one.publish(KEY, b"x", ttl_s=30, sequence=1)
        await trio.sleep(29)
        assert len((await other.lookup(KEY)).records) == 1
        await trio.sleep(2)
        assert await other.lookup(KEY) == Lookup(())


async def test_a_wrong_clock_within_the_tolerance_does_not_matter(autojump_clock):
    async with open_memory_hub() as hub:
        _, late = add_directory(hub, offset_s=CLOCK_SKEW_S - 1)
        _, early = add_directory(hub)
        await late.publish(KEY, b"x", ttl_s=30, sequence=1)
        assert len((await early.lookup(KEY)).records) == 1
        _, wrong = add_directory(hub, offset_s=3 * CLOCK_SKEW_S)
        await wrong.publish(KEY, b"y", ttl_s=30, sequence=1)
        assert [record.body for record in (await early.lookup(KEY)).records] == [b"x"]


async def test_who_leaves_says_so_at_once(autojump_clock):
    async with open_memory_hub() as hub:
        (_, one), (_, other) = (add_directory(hub) for _ in range(2))
        await one.publish(KEY, b"here", ttl_s=30, sequence=1)
        await one.publish(KEY, b"leaving", ttl_s=1, sequence=2)
        assert [record.body for record in (await other.lookup(KEY)).records] == [b"leaving"]
        await trio.sleep(1)
        assert await other.lookup(KEY) == Lookup(())


async def capture_record(hub: MemoryHub, body: bytes = b"true") -> tuple[str, SignedRecord]:
    network, directory = add_directory(hub)
    await directory.publish(KEY, body, ttl_s=30, sequence=5)
    found = (await directory.lookup(KEY)).records
    (record,) = [each.record for each in found if each.peer == network.peer]
    return network.peer, record


async def test_a_record_is_taken_from_its_own_peer_only(autojump_clock):
    async with open_memory_hub() as hub:
        _, record = await capture_record(hub)
        thief = hub.make_network()
        holder, directory = add_directory(hub)
        with pytest.raises(Refused) as refused:
            await call(thief, holder.peer, DIRECTORY_PROTOCOL, PutRecord(record=record), Ok)
        assert refused.value.remote_code == "record_rejected"
        assert directory._store.get(KEY, now=trio.current_time()) == ()


@pytest.mark.parametrize(
    "change",
    [
        {"body": b"false"},
        {"sequence": 6},
        {"ttl_s": 60.0},
        {"issued_at": 2e9},
        {"signature": bytes(64)},
    ],
    ids=str,
)
async def test_a_forged_record_is_not_taken(autojump_clock, change):
    async with open_memory_hub() as hub:
        peer, record = await capture_record(hub)
        author = hub.network_of(peer)
        holder, _ = add_directory(hub)
        request = PutRecord(record=dataclasses.replace(record, **change))
        with pytest.raises(Refused):
            await call(author, holder.peer, DIRECTORY_PROTOCOL, request, Ok)


@dataclasses.dataclass(frozen=True)
class Lie:
    """What a holder lists, and what it gives for it."""

    rows: tuple[Row, ...]
    records: tuple[SignedRecord, ...]


def row_of(record: SignedRecord, **changes: Any) -> Row:
    row = Row(peer_digest(record.peer), record.sequence, 0, 0.0, record.beat)
    return dataclasses.replace(row, **changes)


def tell_lies(record: SignedRecord, other: str) -> list[Lie]:
    """About a record: that it says other things, is newer, is elsewhere, is of somebody else."""
    true = row_of(record)
    forged = [
        dataclasses.replace(record, body=b"false"),
        dataclasses.replace(record, sequence=2**40),
        dataclasses.replace(record, key=b"x" * 32),
        dataclasses.replace(record, peer=other),
    ]
    return [
        *(Lie((row_of(each),), (each, record)) for each in forged),
        *(Lie((true,), (each,)) for each in forged),
        Lie((true,), ()),
        Lie((dataclasses.replace(true, number=3),), (record,)),
        Lie((dataclasses.replace(true, age_s=60.0),), (record,)),
        Lie(tuple(row_of(record, peer=bytes([n]) * 8) for n in range(200)), (record,) * 128),
        Lie((), ()),
    ]


async def lie(told: Lie, stream: Stream) -> None:
    async with MessageStream(stream) as messages:
        while request := await messages.receive():
            if isinstance(request, ListRecords):
                await messages.send(RecordList(rows=encode_rows(told.rows)))
            else:
                await messages.send(Records(records=told.records))


@pytest.mark.parametrize("first", range(0, 13, 5))
async def test_lying_holders_are_seen_through(autojump_clock, first):
    async with open_memory_hub() as hub:
        author, record = await capture_record(hub)
        lies = tell_lies(record, hub.make_network().peer)
        assert len(lies) <= 15
        for each in lies[first : first + 5]:  # with the others not more than all that are asked
            hub.make_network().set_handler(DIRECTORY_PROTOCOL, partial(lie, each))
        _, reader = add_directory(hub)
        assert [(each.peer, each.body) for each in (await reader.lookup(KEY)).records] == [
            (author, b"true")
        ]


async def test_a_holder_that_repeats_the_past_is_seen_through(autojump_clock):
    async with open_memory_hub() as hub:
        author, record = await capture_record(hub)
        hub.kill(author)

        repeat = partial(lie, Lie((row_of(record),), (record,)))
        hub.make_network().set_handler(DIRECTORY_PROTOCOL, repeat)
        _, reader = add_directory(hub)
        await trio.sleep(31 + CLOCK_SKEW_S)
        assert await reader.lookup(KEY) == Lookup(())


async def test_a_stranger_that_says_nothing_or_too_much_holds_nothing(autojump_clock, caplog):
    async with open_memory_hub() as hub:
        holder, _ = add_directory(hub)
        stranger = hub.make_network()
        silent = await stranger.open_stream(holder.peer, DIRECTORY_PROTOCOL)
        large = await stranger.open_stream(holder.peer, DIRECTORY_PROTOCOL)
        await large.send_all((FIRST_MESSAGE_BYTES + 1).to_bytes(4, "big"))
        for stream in (large, silent):
            with trio.fail_after(HELLO_DEADLINE_S + 1), pytest.raises(StreamBroken):
                await stream.receive_some()
        assert holder.failed_handlers == 2
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def hang(stream: Stream) -> None:
    await trio.sleep_forever()


async def babble(stream: Stream) -> None:
    await stream.send_all(bytes(range(256)) * 100)


async def fall_silent(stream: Stream) -> None:
    async with MessageStream(stream) as messages:
        await messages.send(RecordList(rows=b""))
        await trio.sleep_forever()


@pytest.mark.parametrize("handler", [hang, babble, fall_silent])
async def test_peers_that_misbehave_do_not_hold_up_the_others(autojump_clock, handler):
    async with open_memory_hub() as hub:
        (_, one), (_, other) = (add_directory(hub) for _ in range(2))
        for _ in range(4):
            hub.make_network().set_handler(DIRECTORY_PROTOCOL, handler)
        started_at = trio.current_time()
        assert await one.publish(KEY, b"x", ttl_s=60, sequence=1) == 2
        assert [record.body for record in (await other.lookup(KEY)).records] == [b"x"]
        assert trio.current_time() - started_at <= 2 * LOOKUP_DEADLINE_S


async def test_a_key_with_many_records_is_read_in_parts(autojump_clock):
    async with open_memory_hub() as hub:
        parts = [add_directory(hub) for _ in range(140)]
        async with trio.open_nursery() as nursery:
            for _, directory in parts:

                async def publish(directory=directory) -> None:
                    await directory.publish(KEY, bytes(1000), ttl_s=60, sequence=1)

                nursery.start_soon(publish)
        assert len((await parts[0][1].lookup(KEY)).records) == 140


async def test_over_libp2p():
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as anchor:
        bootstrap = [f"{anchor.addresses[0]}/p2p/{anchor.peer}"]
        async with (
            open_libp2p_network(create_identity(), listen=LOOPBACK, bootstrap=bootstrap) as a,
            open_libp2p_network(create_identity(), listen=LOOPBACK, bootstrap=bootstrap) as b,
            open_libp2p_network(create_identity(), listen=(), bootstrap=bootstrap) as dialler,
        ):
            directories = [Directory(network) for network in (anchor, a, b, dialler)]
            for network, directory in zip((anchor, a, b, dialler), directories, strict=True):
                taken = await directory.publish(KEY, network.peer.encode(), ttl_s=60, sequence=1)
                assert taken >= 3
            for directory in directories:
                found = {record.peer for record in (await directory.lookup(KEY)).records}
                assert found == {network.peer for network in (anchor, a, b, dialler)}

"""The real directory in memory, with peers that lie, withhold and flood."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from p2p.beats import BEAT_BYTES
from p2p.directory import Directory
from p2p.directory_store import DirectoryStore, StoreLimits
from p2p.errors import RemoteProtocolError
from p2p.holder_choice import Standing
from p2p.memory_network import MemoryHub, MemoryNetwork, open_memory_hub
from p2p.network import Stream
from p2p.rpc import MessageStream
from p2p.wire.directory_messages import (
    DIRECTORY_PROTOCOL,
    MAX_ROWS,
    ROW_BYTES,
    GetRecords,
    ListRecords,
    PutBeat,
    PutRecord,
    RecordList,
    Records,
    Row,
    decode_rows,
    encode_rows,
)
from p2p.wire.replies import Ok

KEY = b"k" * 32
TTL_S = 45.0


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """Trio takes runnable tasks in a random order; let it be the same one each time."""
    monkeypatch.setattr(trio._core._run, "_r", random.Random(5))


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


def add_directory(
    hub: MemoryHub, name: str, *, per_shard: float = 1000, limits: StoreLimits | None = None
) -> tuple[MemoryNetwork, Directory]:
    network = hub.make_network(name)
    directory = Directory(
        network,
        store=DirectoryStore(limits),
        wall_clock=lambda: 1e9 + trio.current_time(),
        rng=random.Random(name),
        per_shard=per_shard,
    )
    return network, directory


async def publish(directory: Directory) -> int:
    sequence = int((1e9 + trio.current_time()) * 1e3)
    return await directory.publish(KEY, b"same", ttl_s=TTL_S, sequence=sequence)


async def keep_published(directory: Directory) -> None:
    while True:
        await publish(directory)
        await trio.sleep(15)


async def peers_seen(directory: Directory) -> set[str]:
    return {record.peer for record in (await directory.lookup(KEY)).records}


Attack = Callable[[MessageStream, object], Awaitable[None]]


class Attacker:
    """Takes what it is told, and answers readers in its own way; counts them."""

    def __init__(self, network: MemoryNetwork, attack: Attack) -> None:
        self.asked = 0
        self._attack = attack
        network.set_handler(DIRECTORY_PROTOCOL, self.serve)

    async def serve(self, stream: Stream) -> None:
        async with MessageStream(stream) as messages:
            while request := await messages.receive():
                if isinstance(request, PutRecord | PutBeat):
                    await messages.send(Ok())
                    continue
                self.asked += isinstance(request, ListRecords)
                await self._attack(messages, request)


async def withhold(messages: MessageStream, request: object) -> None:
    await messages.send(
        RecordList(rows=b"") if isinstance(request, ListRecords) else Records(records=())
    )


async def hang(messages: MessageStream, request: object) -> None:
    await trio.sleep_forever()


async def flood(messages: MessageStream, request: object) -> None:
    if isinstance(request, ListRecords):
        rng = random.Random(0)
        rows = [Row(rng.randbytes(8), 2**50, 0, 0.0, bytes(BEAT_BYTES)) for _ in range(MAX_ROWS)]
        await messages.send(RecordList(rows=encode_rows(rows)))
    else:
        await messages.send(Records(records=()))


async def say_nonsense(messages: MessageStream, request: object) -> None:
    await messages.send(RecordList(rows=bytes(ROW_BYTES + 1)))


@pytest.mark.parametrize("attack", [withhold, hang, flood, say_nonsense])
async def test_hostile_holders_of_shards_hide_nobody_and_are_asked_last(autojump_clock, attack):
    async with open_memory_hub() as hub, trio.open_nursery() as nursery:
        parts = [add_directory(hub, f"peer {number}", per_shard=3) for number in range(20)]
        attackers = [Attacker(hub.make_network(f"bad {number}"), attack) for number in range(5)]
        for _, directory in parts:
            nursery.start_soon(keep_published, directory)
        await trio.sleep(60)  # the first time nobody knows how many they are
        honest = {network.peer for network, _ in parts}
        _, reader = add_directory(hub, "reader", per_shard=3)
        asked = []
        for _ in range(16):
            before = sum(attacker.asked for attacker in attackers)
            assert await peers_seen(reader) == honest
            asked.append(sum(attacker.asked for attacker in attackers) - before)
            await trio.sleep(12)
        assert reader._model(KEY).memory.sample.level >= 2
        assert sum(asked[:6]) > 0
        assert sum(asked[-6:]) <= 2, asked
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("per_shard", [3, 1000])
@pytest.mark.parametrize("count", [1, 4])
async def test_holders_that_list_and_then_hang_hide_nobody(autojump_clock, per_shard, count):
    async with open_memory_hub(latency_s=0.03) as hub, trio.open_nursery() as nursery:
        parts = [add_directory(hub, f"peer {n}", per_shard=per_shard) for n in range(24)]
        for _, directory in parts:
            nursery.start_soon(keep_published, directory)
        await trio.sleep(60)
        reader_network, reader = add_directory(hub, "reader", per_shard=per_shard)
        by_peer = {network.peer: (network, directory) for network, directory in parts}
        nearest = [one.peer for one in await reader_network.find_closest_peers(KEY, 8)]
        hostile = [peer for peer in nearest if peer in by_peer][:count]
        for peer in hostile:
            network, directory = by_peer[peer]
            network.set_handler(DIRECTORY_PROTOCOL, partial(list_and_hang, directory))
            hub.link(peer, reader_network.peer).latency_s = 0.001
        asked_s = []
        for _ in range(4):
            began_at = trio.current_time()
            assert await peers_seen(reader) == set(by_peer)
            asked_s.append(trio.current_time() - began_at)
            await trio.sleep(12)
        assert asked_s[-1] < 0.5, asked_s
        standings = {reader._book.standing(peer, trio.current_time()) for peer in by_peer}
        assert Standing.LIAR not in standings
        if per_shard == 1000:  # else some were not asked
            assert Standing.SILENT in standings
        nursery.cancel_scope.cancel()


async def list_and_hang(directory: Directory, stream: Stream) -> None:
    async with MessageStream(stream) as messages:
        while request := await messages.receive():
            if isinstance(request, GetRecords):
                await trio.sleep_forever()
            await messages.send(directory._holder._answer(request, messages.remote_peer, ""))


async def test_a_flood_of_identities_from_one_place_keeps_nobody_out(autojump_clock):
    limits = StoreLimits(records_per_key=30)
    async with open_memory_hub() as hub:
        parts = [add_directory(hub, f"peer {number}", limits=limits) for number in range(12)]
        for number, (network, _) in enumerate(parts):
            network.host = f"203.0.{number}.7"
        for _, directory in parts[:6]:
            await publish(directory)
        await trio.sleep(1)
        floods = [add_directory(hub, f"flood {number}", limits=limits) for number in range(60)]
        for network, directory in floods:
            network.host = "198.51.100.9"
            await publish(directory)
        for _, directory in parts:
            assert await publish(directory) == 8
        _, reader = add_directory(hub, "reader", limits=limits)
        seen = await peers_seen(reader)
        assert seen >= {network.peer for network, _ in parts}
        _, directory = parts[0]
        kept = directory._store.get(KEY, now=trio.current_time())
        assert len(kept) <= limits.records_per_key


def test_a_list_that_ends_within_a_row_is_refused():
    with pytest.raises(RemoteProtocolError):
        decode_rows(bytes(ROW_BYTES - 1))


async def test_a_holder_answers_some_questions_on_a_stream_and_no_more(autojump_clock):
    async with open_memory_hub() as hub:
        holder, directory = add_directory(hub, "holder")
        await publish(directory)
        stranger = hub.make_network()
        stream = await stranger.open_stream(holder.peer, DIRECTORY_PROTOCOL)
        async with MessageStream(stream) as messages:
            answers = 0
            for _ in range(20):
                await messages.send(GetRecords(key=KEY, peers=(bytes(8),)))
                if await messages.receive() is None:
                    break
                answers += 1
        assert answers == 8

"""The directory of a model with several shards, with the real parts, in memory and over libp2p."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from p2p.directory import HOLDERS_AGE_S, Directory
from p2p.identity import create_identity
from p2p.libp2p_network import open_libp2p_network
from p2p.memory_network import MemoryHub, MemoryNetwork, open_memory_hub
from tests.p2p.test_network import LOOPBACK

KEY = b"k" * 32
TTL_S = 45.0
DOUBLING_S = 150.0
"""More than the minute of which `p2p.shards` tells, by what a few servers differ from many."""

SETTLED_S = 60.0
"""A newcomer is seen when a reader asks a holder that had come near the key before it; after some
looks it has."""


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """Trio takes runnable tasks in a random order; let it be the same one each time."""
    monkeypatch.setattr(trio._core._run, "_r", random.Random(5))


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


class Peer:
    """Announces itself and looks who is there, in the daemon's rhythm."""

    def __init__(self, hub: MemoryHub, number: int, *, per_shard: float) -> None:
        self.network: MemoryNetwork = hub.make_network(f"peer {number}")
        self.rng = random.Random(number)
        self.directory = Directory(
            self.network, wall_clock=self.wall_clock, rng=self.rng, per_shard=per_shard
        )
        self.seen: set[str] = set()
        self.share = 1.0
        self.began_at = trio.current_time()
        self.scope = trio.CancelScope()

    @staticmethod
    def wall_clock() -> float:
        return 1e9 + trio.current_time()

    async def run(self) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.announce)
                nursery.start_soon(self.look)

    async def announce(self) -> None:
        while True:
            sequence = int(self.wall_clock() * 1e3)
            await self.directory.publish(KEY, b"same", ttl_s=TTL_S, sequence=sequence)
            await trio.sleep(15.0 * self.rng.uniform(0.8, 1.2))

    async def look(self) -> None:
        while True:
            found = await self.directory.lookup(KEY)
            self.seen = {record.peer for record in found.records}
            self.share = found.share
            await trio.sleep(8.0 * self.rng.uniform(0.6, 1.4))

    @property
    def level(self) -> int:
        return self.directory._model(KEY).memory.sample.level


async def test_nobody_is_invisible_while_a_swarm_grows_and_shrinks(autojump_clock):
    fewest, most, per_shard = 6, 36, 4
    levels = set()

    async with open_memory_hub() as hub, trio.open_nursery() as nursery:
        peers: list[Peer] = []

        def check() -> None:
            levels.update(peer.level for peer in peers)
            now = trio.current_time()
            settled = {peer.network.peer for peer in peers if now - peer.began_at > SETTLED_S}
            for peer in peers:
                if now - peer.began_at > SETTLED_S:
                    assert settled <= peer.seen, (len(peers), peer.level)

        for number in range(most):
            peers.append(Peer(hub, number, per_shard=per_shard))
            nursery.start_soon(peers[-1].run)
            await trio.sleep(DOUBLING_S / max(fewest, len(peers)))
            check()
        assert max(levels) == 3
        for _ in range(10):
            await trio.sleep(5)
            check()
        while len(peers) > fewest:
            gone = peers.pop(0)
            gone.scope.cancel()
            hub.kill(gone.network.peer)
            await trio.sleep(DOUBLING_S / len(peers))
            check()
        assert {peer.level for peer in peers} <= {0, 1}
        await trio.sleep(TTL_S + 20)
        living = {peer.network.peer for peer in peers}
        assert all(peer.seen == living for peer in peers)
        nursery.cancel_scope.cancel()


async def test_a_large_swarm_is_read_in_part_or_whole(autojump_clock):
    count, per_shard = 80, 2
    async with open_memory_hub() as hub:
        peers = [Peer(hub, number, per_shard=per_shard) for number in range(count)]
        for peer in peers:
            peer.directory._model(KEY).memory.sample.level = 4
            peer.directory._model(KEY).memory.sample.servers = 16 * 4.0
            peer.directory._model(KEY).looked_at = 0.0
            await peer.directory.publish(KEY, b"same", ttl_s=TTL_S, sequence=1)
        reader = Peer(hub, count, per_shard=per_shard)
        part = await reader.directory.lookup(KEY)
        assert part.share <= 0.5
        assert 0.2 * count < len(part.records) / part.share * 0.5 < count
        whole = await reader.directory.lookup(KEY, whole=True)
        assert whole.share == 1
        assert {record.peer for record in whole.records} == {peer.network.peer for peer in peers}


async def test_holders_of_a_shard_that_are_gone_are_found_anew(autojump_clock):
    async with open_memory_hub() as hub:
        peers = [Peer(hub, number, per_shard=2) for number in range(24)]
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(peer.run)
            await trio.sleep(60)
            assert peers[0].level >= 3
            for peer in peers[12:]:
                peer.scope.cancel()
                hub.kill(peer.network.peer)
            await trio.sleep(HOLDERS_AGE_S + 30)
            living = {peer.network.peer for peer in peers[:12]}
            assert all(peer.seen == living for peer in peers[:12])
            nursery.cancel_scope.cancel()


async def test_whoever_was_cut_off_sees_and_is_seen_again(autojump_clock):
    async with open_memory_hub() as hub, trio.open_nursery() as nursery:
        peers = [Peer(hub, number, per_shard=3) for number in range(40)]
        for peer in peers:
            nursery.start_soon(peer.run)
        await trio.sleep(100)
        everybody = {peer.network.peer for peer in peers}
        hub.freeze(peers[0].network.peer)
        await trio.sleep(90)
        hub.thaw(peers[0].network.peer)
        await trio.sleep(90)
        assert peers[0].level == peers[1].level == 3
        for peer in peers:
            assert peer.seen == everybody
        nursery.cancel_scope.cancel()


async def test_a_lookup_that_was_cancelled_does_not_count_as_one(autojump_clock):
    async with open_memory_hub(latency_s=0.03) as hub, trio.open_nursery() as nursery:
        peers = [Peer(hub, number, per_shard=3) for number in range(60)]
        for peer in peers:
            nursery.start_soon(peer.run)
        await trio.sleep(100)
        for wait_s in (0.03, 0.1, 0.2, 0.22, 0.25):
            reader = Peer(hub, 100 + int(wait_s * 100), per_shard=3)
            with trio.move_on_after(wait_s):
                await reader.directory.lookup(KEY)
            found = await reader.directory.lookup(KEY)
            assert found.share < 1
            assert len(found.records) > 0.6 * found.share * len(peers)
        nursery.cancel_scope.cancel()


async def make_large_swarm(hub: MemoryHub, count: int = 80) -> list[Peer]:
    """Of which half is a sample."""
    peers = [Peer(hub, number, per_shard=2) for number in range(count)]
    for peer in peers:
        model = peer.directory._model(KEY)
        model.memory.sample.level, model.memory.sample.servers = 4, 16 * 4.0
        model.looked_at = 0.0
        await peer.directory.publish(KEY, b"same", ttl_s=TTL_S, sequence=1)
    return peers


async def test_a_lookup_of_a_large_swarm_is_as_fresh_as_it_is_asked_to_be(autojump_clock):
    async with open_memory_hub() as hub:
        peers = await make_large_swarm(hub)
        reader = peers[0].directory
        found = await reader.lookup(KEY)
        assert found.share < 1
        changed = {one.peer for one in found.records if one.peer != peers[0].network.peer}
        await trio.sleep(1)
        for peer in peers:
            if peer.network.peer in changed:
                await peer.directory.publish(KEY, b"new", ttl_s=TTL_S, sequence=2)
        fresh = {}
        for max_age_s in (15.0, 0.0):
            found = await reader.lookup(KEY, max_age_s=max_age_s)
            fresh[max_age_s] = {one.peer for one in found.records if one.body == b"new"}
        assert len(fresh[15.0]) == 0
        assert len(fresh[0.0] & changed) > 0.8 * len(changed)


async def test_lookups_at_once_are_merged(autojump_clock):
    async with open_memory_hub(latency_s=0.03) as hub:
        peers = [Peer(hub, number, per_shard=50) for number in range(20)]
        for peer in peers:
            await peer.directory.publish(KEY, b"same", ttl_s=TTL_S, sequence=1)
        reader = Peer(hub, 100, per_shard=50)
        await reader.directory.lookup(KEY)
        (nearest, *_) = await reader.network.find_closest_peers(KEY, 8)
        hub.freeze(nearest.peer)  # each lookup takes a second
        for max_age_s, most in ((15.0, 1.0), (0.0, 2.0)):
            began_at = trio.current_time()
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(partial(reader.directory.lookup, KEY, max_age_s=max_age_s))
            assert trio.current_time() - began_at < most + 0.8


async def test_a_lookup_does_not_wait_for_one_of_the_whole(autojump_clock):
    async with open_memory_hub(latency_s=0.08) as hub:
        peers = await make_large_swarm(hub)
        reader = Peer(hub, 100, per_shard=2).directory
        await reader.lookup(KEY)
        for peer in peers[:10]:
            hub.freeze(peer.network.peer)
        await trio.sleep(16)
        ended_at: dict[str, float] = {}

        async def look(name: str, whole: bool) -> None:
            found = await reader.lookup(KEY, whole=whole)
            assert len(found.records) > 10
            ended_at[name] = trio.current_time()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look, "whole", True)
            for _ in range(2000):
                if reader._model(KEY).whole_turn.lock.locked():
                    break
                await trio.sleep(0.01)
            nursery.start_soon(look, "sample", False)
        assert ended_at["sample"] < ended_at["whole"]


async def test_shards_over_libp2p():
    count = 6
    async with AsyncExitStack() as stack:
        anchor = await stack.enter_async_context(
            open_libp2p_network(create_identity(), listen=LOOPBACK)
        )
        bootstrap = [f"{anchor.addresses[0]}/p2p/{anchor.peer}"]
        networks = [anchor] + [
            await stack.enter_async_context(
                open_libp2p_network(create_identity(), listen=LOOPBACK, bootstrap=bootstrap)
            )
            for _ in range(count - 1)
        ]
        directories = [Directory(network, per_shard=1) for network in networks]
        for sequence in range(1, 4):  # the first time nobody knows how many they are
            for directory in directories:
                await directory.publish(KEY, b"same", ttl_s=60, sequence=sequence)
            for directory in directories:
                found = await directory.lookup(KEY)
        for directory in directories:
            found = await directory.lookup(KEY)
            assert found.share == 1
            assert {record.peer for record in found.records} == {each.peer for each in networks}
            assert directory._model(KEY).memory.sample.level == 2

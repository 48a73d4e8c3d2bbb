"""How long a failure is held against a peer."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from p2p.directory import Directory, Lookup
from p2p.memory_network import MemoryHub, MemoryNetwork, open_memory_hub
from p2p.model_memory import SHARD_AGE_S
from petald.config import RouteConfig
from petald.errors import MissingBlocks
from petald.router import PENALTY_S, Router, _ModelChooser
from petald.routing import Hop
from petald.session_actions import NeedChain
from petald.swarm import Announcement, ServerState, directory_key

MODEL: Any = SimpleNamespace(
    name="fake",
    fingerprint=bytes(range(32)),
    config=SimpleNamespace(num_blocks=4, hidden_size=4, kv_size=4),
)


class Host:
    """A peer that announces a span, and serves nothing."""

    def __init__(
        self,
        hub: MemoryHub,
        start: int,
        end: int,
        *,
        step_ms: float = 1.0,
        free: int = 100,
        per_shard: float = 48,
    ) -> None:
        self.network = hub.make_network()
        self.step_ms = step_ms
        self.free = free
        self.directory = make_directory(self.network, per_shard)
        self.span = (start, end)

    async def announce(self) -> None:
        announcement = Announcement(
            model=MODEL.fingerprint,
            start=self.span[0],
            end=self.span[1],
            state=ServerState.SERVING,
            step_ms=self.step_ms,
            cache_tokens=100,
            free_cache_tokens=self.free,
            dtype="float32",
        )
        await self.directory.publish(
            directory_key(MODEL.fingerprint),
            announcement.encode(),
            ttl_s=45.0,
            sequence=int(trio.current_time() * 1e3),
        )


def make_directory(network: MemoryNetwork, per_shard: float = 48) -> Directory:
    return Directory(
        network,
        wall_clock=trio.current_time,
        rng=random.Random(network.peer),
        per_shard=per_shard,
    )


def make_router(hub: MemoryHub, *, per_shard: float = 48) -> Router:
    network = hub.make_network("client")
    return Router(network, make_directory(network, per_shard), RouteConfig())


def need(*, is_retry: bool = False, before: str | None = None, end: int = 4) -> NeedChain:
    return NeedChain(1, 0, end, before, None, frozenset(), 10, is_retry)


async def test_a_failure_does_not_fade_before_the_peer_is_heard_of(autojump_clock: Any) -> None:
    async with open_memory_hub() as hub:
        router, host = make_router(hub), Host(hub, 0, 4)
        await host.announce()
        await router.read_view(MODEL)
        router.penalise(host.network.peer)
        await trio.sleep(30)
        assert router.penalties_s() == {host.network.peer: PENALTY_S}
        await host.announce()
        await router.read_view(MODEL, max_age_s=0)
        assert router.penalties_s()[host.network.peer] == pytest.approx(PENALTY_S / 4, rel=0.01)
        await trio.sleep(300)
        assert router.penalties_s() == {}


async def test_the_peer_that_failed_is_the_last_choice_and_still_one(autojump_clock: Any) -> None:
    async with open_memory_hub() as hub:
        router = make_router(hub)
        hosts = [Host(hub, 0, 4), Host(hub, 0, 4)]
        await hosts[0].announce()
        (hop,) = await router.choose(MODEL, need())
        router.penalise(hop.peer)
        assert (await router.choose(MODEL, need()))[0].peer == hop.peer
        await hosts[1].announce()
        await trio.sleep(6)
        assert (await router.choose(MODEL, need()))[0].peer == hosts[1].network.peer


async def test_a_repair_does_not_wait_for_the_directory(autojump_clock: Any) -> None:
    async with open_memory_hub() as hub:
        router, host = make_router(hub), Host(hub, 0, 4)
        await host.announce()
        await router.choose(MODEL, need())
        for peer in hub.peers():
            if peer != router._network.peer:
                hub.freeze(peer)  # who keeps the records may hang with the hop
        await trio.sleep(20)
        started_at = trio.current_time()
        assert await router.choose(MODEL, need(before="somebody"))
        assert trio.current_time() == started_at


async def test_a_new_server_is_found_though_the_view_is_fresh(autojump_clock: Any) -> None:
    async with open_memory_hub() as hub:
        router = make_router(hub)
        first, second = Host(hub, 0, 2), Host(hub, 2, 4)
        await first.announce()
        with pytest.raises(MissingBlocks, match="2:4"):
            await router.choose(MODEL, need())
        await second.announce()
        await trio.sleep(0.1)
        assert len(await router.choose(MODEL, need())) == 2


async def find_better(router: Router, *hosts: Host) -> set[str] | None:
    """The peers of the chain that a session on these hosts should move to."""
    chain = [
        Hop(peer=host.network.peer, addresses=(), start=host.span[0], end=host.span[1])
        for host in hosts
    ]
    chooser = _ModelChooser(router, MODEL)
    better = await chooser.find_better(chain, max_tokens=50, cached_tokens=10)
    return None if better is None else {hop.peer for hop in better}


async def test_a_session_moves_to_a_much_better_server(autojump_clock: Any) -> None:
    async with open_memory_hub() as hub:
        router = make_router(hub)
        # Those that run the session have no room but what they promised to it.
        first, slow = Host(hub, 0, 2, free=0), Host(hub, 2, 4, step_ms=900.0, free=0)
        await first.announce()
        await slow.announce()
        assert await find_better(router, first, slow) is None
        quick = Host(hub, 2, 4)
        await quick.announce()
        await trio.sleep(50)  # longer than a view is used for
        for host in (first, slow, quick):
            await host.announce()
        expected = {first.network.peer, quick.network.peer}
        assert await find_better(router, first, slow) == expected


async def test_nobody_leaves_a_hop_that_a_lookup_lacks(autojump_clock: Any) -> None:
    async with open_memory_hub() as hub:
        router = make_router(hub)
        first, unheard = Host(hub, 0, 2), Host(hub, 2, 4)
        other = Host(hub, 2, 4, step_ms=900.0)
        await first.announce()
        await other.announce()
        assert await find_better(router, first, unheard) is None


async def test_a_view_of_a_large_swarm_is_a_sample_and_can_be_whole(autojump_clock: Any) -> None:
    async with open_memory_hub() as hub:
        router = make_router(hub, per_shard=1)
        hosts = [Host(hub, 0, 3, per_shard=1) for _ in range(39)]
        only = Host(hub, 3, 4, per_shard=1)
        for _ in range(4):  # each time they know better how many they are
            for host in (*hosts, only):
                await host.announce()
            await trio.sleep(13)
        view = await router.read_view(MODEL, max_age_s=0)
        assert view.share <= 0.5
        assert len(view.servers) < 30
        whole = await router.read_view(MODEL, max_age_s=0, whole=True)
        assert whole.share == 1
        # With one server in a shard, estimates of how many there are differ as they never should.
        assert len(view.servers) < len(whole.servers) <= 40


async def test_blocks_that_a_sample_lacks_are_found_in_the_whole(autojump_clock: Any) -> None:
    async with open_memory_hub() as hub:
        router, directory = make_router(hub), SampleDirectory(hub)
        router._directory = directory
        first, last = Host(hub, 0, 3), Host(hub, 3, 4)
        for host in (first, last):
            await host.announce()
        directory.hidden = last.network.peer
        chain = await router.choose(MODEL, need())
        assert [hop.peer for hop in chain] == [first.network.peer, last.network.peer]
        assert directory.asked == [False, True]
        await trio.sleep(6)
        await router.choose(MODEL, need())
        assert directory.asked == [False, True, False]  # the whole is not read again at once


class SampleDirectory(Directory):
    """Leaves a peer out of all views but whole ones."""

    def __init__(self, hub: MemoryHub) -> None:
        super().__init__(hub.make_network(), wall_clock=trio.current_time)
        self.hidden = ""
        self.asked: list[bool] = []

    async def lookup(
        self, key: bytes, *, whole: bool = False, max_age_s: float = SHARD_AGE_S
    ) -> Lookup:
        self.asked.append(whole)
        found = await super().lookup(key, max_age_s=max_age_s)
        if whole:
            return found
        return Lookup(tuple(one for one in found.records if one.peer != self.hidden), 0.5)

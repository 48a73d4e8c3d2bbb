"""How long a failure is held against a peer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from p2p.directory import Directory
from p2p.memory_network import MemoryHub, open_memory_hub
from petald.config import RouteConfig
from petald.errors import MissingBlocks
from petald.router import PENALTY_S, Router
from petald.session_actions import NeedChain
from petald.swarm import Announcement, ServerState, directory_key

MODEL: Any = SimpleNamespace(
    name="fake",
    fingerprint=bytes(range(32)),
    config=SimpleNamespace(num_blocks=4, hidden_size=4, kv_size=4),
)


class Host:
    """A peer that announces a span, and serves nothing."""

    def __init__(self, hub: MemoryHub, start: int, end: int) -> None:
        self.network = hub.make_network()
        self.directory = Directory(self.network, wall_clock=trio.current_time)
        self.span = (start, end)

    async def announce(self) -> None:
        announcement = Announcement(
            model=MODEL.fingerprint,
            start=self.span[0],
            end=self.span[1],
            state=ServerState.SERVING,
            step_ms=1.0,
            cache_tokens=100,
            free_cache_tokens=100,
            dtype="float32",
        )
        await self.directory.publish(
            directory_key(MODEL.fingerprint),
            announcement.encode(),
            ttl_s=45.0,
            sequence=int(trio.current_time() * 1e3),
        )


def make_router(hub: MemoryHub) -> Router:
    network = hub.make_network("client")
    return Router(network, Directory(network, wall_clock=trio.current_time), RouteConfig())


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

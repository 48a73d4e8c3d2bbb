"""Servers that balance themselves, some tens of them, in memory and under a virtual clock.

Joining, claims, announcements, the directory, the planner of moves and what carries it out are the
real ones, and so are the sessions that run through the servers meanwhile; the kernels are replaced
by integers, and loading a block by a pause.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import trio

from p2p.directory import Directory
from p2p.memory_network import MemoryHub, open_memory_hub
from petald.adapter_store import AdapterStore
from petald.announcer import Announcer
from petald.block_load import Capacity
from petald.chain_client import ChainSession
from petald.config import RouteConfig, ServeConfig
from petald.hosting import Hosting
from petald.joining import Joining, choose_first_span
from petald.move_actions import MoveSettings
from petald.mover import Mover
from petald.router import Router
from petald.server import Server
from petald.serving import Serving
from petald.swarm import Announcement, ServerState
from petald.throughput import BlockSpeed
from tests.helpers.fake_span import FakeHostedSpan, expected_tokens
from tests.sim.test_swarm import BLOCKS, MODEL, generate

SERVERS = 20
LOAD_BLOCK_S = 0.5

CONFIG = ServeConfig(model="fake", max_step_tokens=128)


@pytest.fixture
def pinned_scheduling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trio runs tasks that are ready in a random order; here it is the same each time."""
    monkeypatch.setattr(trio._core._run, "_r", random.Random(5))


class FakeLoader:
    """As `petald.hosting.SpanLoader`, with pauses for the loading."""

    def __init__(self, block_s: float) -> None:
        self.block_s = block_s

    def has_room(self, start: int, end: int, *, beside: Hosting) -> bool:
        return True

    async def load(self, start: int, end: int, *, beside: Any = None) -> Hosting:
        await trio.sleep(LOAD_BLOCK_S * (end - start))
        hosted: Any = FakeHostedSpan(start, end, num_blocks=BLOCKS, block_s=self.block_s)
        return Hosting(
            hosted=hosted,
            passes=None,  # type: ignore[arg-type]
            adapters=AdapterStore(hosted.span, limit_bytes=0, max_adapter_bytes=0),
            speed=BlockSpeed(step_s=self.block_s, token_s=self.block_s / 4),
        )


class NoPasses:
    """As `petald.pass_server.PassServer`, without any."""

    def switch(self, *_: Any) -> None:
        """There is nothing to switch."""

    async def end_streams(self, **_: Any) -> None:
        await trio.lowlevel.checkpoint()


class FreeServer:
    """One server, as the daemon makes it."""

    def __init__(self, swarm: FreeSwarm, fit: int, block_s: float) -> None:
        self.swarm = swarm
        self.network = swarm.hub.make_network()
        self.fit = fit
        self.block_s = block_s
        self.is_alive = True
        self.scope = trio.CancelScope()
        self.serving: Serving | None = None

    async def run(self) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                await self._serve(nursery)

    async def _serve(self, nursery: trio.Nursery) -> None:
        rng = random.Random(self.swarm.rng.random())
        network = self.network
        clock = trio.current_time
        directory = Directory(network, wall_clock=clock, rng=random.Random(network.peer))
        router = Router(network, directory, RouteConfig())
        template = Announcement(
            model=MODEL.fingerprint,
            start=0,
            end=1,
            state=ServerState.LOADING,
            step_ms=0.0,
            cache_tokens=4096,
            free_cache_tokens=0,
            dtype="float32",
        )
        joining = Joining(template, wall_clock=clock)
        announcer = Announcer(directory, joining.make_announcement, rng=rng, wall_clock=clock)
        capacity = Capacity(fit=self.fit, block_steps_per_s=1 / self.block_s)
        start, end = await choose_first_span(
            joining,
            capacity,
            peer=network.peer,
            read_view=partial(router.read_view, MODEL, max_age_s=0.0),
            announce=announcer.publish,
            rng=rng,
        )
        await nursery.start(announcer.run)
        loader: Any = FakeLoader(self.block_s)
        hosting = await loader.load(start, end)
        server = Server(
            network,
            hosting.hosted,
            fingerprint=MODEL.fingerprint,
            config=CONFIG,
            adapters=hosting.adapters,
        )
        server.start()
        passes: Any = NoPasses()
        self.serving = Serving(
            identity=MODEL,
            config=CONFIG,
            loader=loader,
            hosting=hosting,
            server=server,
            pass_server=passes,
            network=network,
        )
        announcer.speak_for(self.serving.make_announcement)
        await announcer.publish()
        self.mover = Mover(
            self.serving,
            capacity,
            router=router,
            announcer=announcer,
            network=network,
            settings=MoveSettings(),
            rng=rng,
            wall_clock=clock,
        )
        await self.mover.run()

    @property
    def span(self) -> tuple[int, int] | None:
        """What it serves now."""
        if not self.is_alive or self.serving is None:
            return None
        span = self.serving.hosting.span
        return span.start, span.end

    def kill(self) -> None:
        self.is_alive = False
        self.scope.cancel()
        self.swarm.hub.kill(self.network.peer)


class FreeSwarm:
    """All of it."""

    def __init__(self, hub: MemoryHub, nursery: trio.Nursery, seed: int) -> None:
        self.hub = hub
        self.nursery = nursery
        self.rng = random.Random(seed)
        self.servers: list[FreeServer] = []
        self.jobs = 0

    def join(self) -> None:
        server = FreeServer(self, self.rng.randint(3, 8), 0.001 * 20 ** self.rng.random())
        self.servers.append(server)
        self.nursery.start_soon(server.run)

    def throughput(self) -> np.ndarray[Any, Any]:
        """Steps a second of each block."""
        found = np.zeros(BLOCKS)
        for server in self.servers:
            if server.span is not None:
                start, end = server.span
                found[start:end] += 1 / server.block_s / (end - start)
        return found

    def share(self) -> float:
        """Of the bound, what the least-served block has."""
        found = self.throughput()
        return float(found.min() / found.mean())

    async def wait_covered(self, within_s: float) -> float:
        """Waits until every block has a server; gives how long that took."""
        began_at = trio.current_time()
        with trio.fail_after(within_s):
            while not self.throughput().all():  # noqa: ASYNC110  # nothing tells of it
                await trio.sleep(0.5)
        return trio.current_time() - began_at

    def moves(self) -> int:
        return sum(
            server.mover._planner.statistics().moves
            for server in self.servers
            if server.serving is not None
        )

    async def generate(self, number: int) -> None:
        """An app that generates, for as long as it is let, and checks what it gets."""
        rng = random.Random(number)
        network = self.hub.make_network(f"client {number}")
        directory = Directory(
            network, wall_clock=trio.current_time, rng=random.Random(network.peer)
        )
        router = Router(network, directory, RouteConfig())
        while True:
            prompt = [rng.randrange(1000) for _ in range(rng.randint(4, 40))]
            count = rng.randint(20, 200)
            session: ChainSession = await router.open_session(
                MODEL,
                max_tokens=len(prompt) + count,
                nursery=self.nursery,
                max_wait_s=300.0,
            )
            made = await generate(session, prompt, count)
            assert made == expected_tokens(BLOCKS, prompt, count), f"client {number}"
            await session.close()
            self.jobs += 1
            await trio.sleep(rng.uniform(0, 5))


@pytest.mark.timeout(300)
async def test_tens_of_servers_cover_a_model_balance_it_and_close_gaps(
    autojump_clock: Any, pinned_scheduling: None
) -> None:
    async with open_memory_hub(latency_s=0.01) as hub, trio.open_nursery() as nursery:
        swarm = FreeSwarm(hub, nursery, seed=2)
        for _ in range(SERVERS):
            swarm.join()
        assert await swarm.wait_covered(30.0) < 15
        for number in range(2):
            nursery.start_soon(swarm.generate, number)
        await trio.sleep(150)
        assert swarm.throughput().all()
        balanced = swarm.share()
        assert balanced > 0.7

        # Everybody who holds some block dies at once.
        block = int(np.argmin([_holders(swarm, at) for at in range(BLOCKS)]))
        for server in swarm.servers:
            if server.span is not None and server.span[0] <= block < server.span[1]:
                server.kill()
        assert not swarm.throughput().all()
        assert await swarm.wait_covered(120.0) < 60
        before = swarm.moves()

        # A third of the others is replaced, one after the other.
        for server in swarm.rng.sample([s for s in swarm.servers if s.is_alive], 4):
            server.kill()
            swarm.join()
            await trio.sleep(30)
        await trio.sleep(150)
        assert swarm.throughput().all()
        assert swarm.share() > 0.6
        moves = swarm.moves() - before
        assert moves < 2 * SERVERS  # in five minutes of much churn
        assert swarm.jobs > 10
        nursery.cancel_scope.cancel()


def _holders(swarm: FreeSwarm, block: int) -> int:
    spans = [server.span for server in swarm.servers if server.span is not None]
    return sum(start <= block < end for start, end in spans)

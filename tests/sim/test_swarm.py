"""The daemon's own parts in a swarm of some fifty, in memory and under a virtual clock.

Servers, routers, sessions, directory and announcements are the real ones; the kernels are replaced
by integers (`tests.helpers.fake_span`). Servers are killed, hang, are cut off, leave, and come.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio

from p2p.directory import Directory
from p2p.memory_network import MemoryHub, open_memory_hub
from p2p.wire.session_messages import Wanted
from petald.announcer import Announcer
from petald.chain_client import ChainSession
from petald.config import RouteConfig, ServeConfig
from petald.router import Router
from petald.server import Server
from petald.swarm import Announcement, ServerState
from petald.tensors import from_wire, to_wire
from tests.helpers.fake_span import (
    HIDDEN,
    FakeHostedSpan,
    expected_tokens,
    to_rows,
    to_values,
)

BLOCKS = 24
SERVERS = 50
SESSIONS = 20
MODEL: Any = SimpleNamespace(
    name="fake",
    fingerprint=bytes(range(32)),
    config=SimpleNamespace(num_blocks=BLOCKS, hidden_size=HIDDEN, kv_size=HIDDEN),
)


@pytest.fixture
def pinned_scheduling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trio runs tasks that are ready in a random order; here it is the same each time."""
    monkeypatch.setattr(trio._core._run, "_r", random.Random(5))


class SimulatedServer:
    """One server, from joining to its end."""

    def __init__(self, swarm: SimulatedSwarm, start: int, end: int, block_s: float) -> None:
        self.swarm = swarm
        self.network = swarm.hub.make_network()
        self.hosted = FakeHostedSpan(start, end, num_blocks=BLOCKS, block_s=block_s)
        config = ServeConfig(model="fake", max_step_tokens=128)
        hosted: Any = self.hosted
        self.server = Server(self.network, hosted, fingerprint=MODEL.fingerprint, config=config)
        self.is_alive = True
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        self.server.start()
        directory = Directory(
            self.network,
            wall_clock=trio.current_time,
            rng=random.Random(self.network.peer),
        )
        self.announcer = Announcer(
            directory, self.describe, rng=self.swarm.rng, wall_clock=trio.current_time
        )
        with self.scope:
            await self.announcer.run()

    def describe(self) -> Announcement:
        span = self.hosted.span
        is_leaving = self.server.is_draining
        return Announcement(
            model=MODEL.fingerprint,
            start=span.start,
            end=span.end,
            state=ServerState.LEAVING if is_leaving else ServerState.SERVING,
            step_ms=self.hosted.block_s * (span.end - span.start) * 1e3,
            queue_ms=self.hosted.mean_queue_s * 1e3,
            cache_tokens=self.hosted.arena.capacity_tokens,
            free_cache_tokens=self.hosted.arena.free_tokens,
            dtype="float32",
        )

    def kill(self) -> None:
        self.is_alive = False
        self.scope.cancel()
        self.swarm.hub.kill(self.network.peer)

    async def leave(self) -> None:
        self.server.stop_accepting()
        await self.announcer.withdraw()
        await self.server.drain(deadline_s=60.0)
        if self.is_alive:  # or it was killed while it drained
            self.kill()


class SimulatedSwarm:
    """All of it."""

    def __init__(self, hub: MemoryHub, nursery: trio.Nursery, seed: int) -> None:
        self.hub = hub
        self.nursery = nursery
        self.rng = random.Random(seed)
        self.servers: list[SimulatedServer] = []
        self.sessions: list[ChainSession] = []
        self.moves: list[str] = []

    def join(self) -> None:
        length = self.rng.randint(4, 10)
        start = max(0, self.rng.randint(-length // 2, BLOCKS - length // 2))
        end = min(BLOCKS, start + length)
        server = SimulatedServer(self, start, end, self.rng.uniform(0.001, 0.01))
        self.servers.append(server)
        self.nursery.start_soon(server.run)

    async def generate(self, number: int) -> None:
        """One app: asks its own router, and checks what it gets."""
        rng = random.Random(number)
        await trio.sleep(rng.uniform(3, 20))
        network = self.hub.make_network(f"client {number}")
        directory = Directory(
            network, wall_clock=trio.current_time, rng=random.Random(network.peer)
        )
        # What is rounded on a slow link would be other numbers here.
        router = Router(network, directory, RouteConfig(codec="raw"))
        for _ in range(3):
            prompt = [rng.randrange(1000) for _ in range(rng.randint(4, 80))]
            count = rng.randint(20, 100)
            session = await router.open_session(
                MODEL,
                max_tokens=len(prompt) + count,
                nursery=self.nursery,
                max_wait_s=300.0,
                on_news=lambda news: self.moves.append(getattr(news, "code", "waiting")),
            )
            self.sessions.append(session)
            made = await generate(session, prompt, count)
            assert made == expected_tokens(BLOCKS, prompt, count), f"client {number}"
            await session.close()

    async def disturb(self) -> None:
        """Something goes wrong every few seconds, for as long as it runs."""
        while True:
            await trio.sleep(self.rng.expovariate(1 / 1.5))
            alive = [server for server in self.servers if server.is_alive]
            busy = [server for server in alive if server.server.sessions]
            server = self.rng.choice(busy if busy and self.rng.random() < 0.7 else alive)
            other = self.rng.choice([each for each in alive if each is not server])
            peer = server.network.peer
            kind = self.rng.choice(["kill", "hang", "cut", "slow", "leave"])
            if kind == "kill":
                server.kill()
                self.join()
            elif kind == "leave" and not server.server.is_draining:
                self.nursery.start_soon(server.leave)
                self.join()
            elif kind == "hang":
                self.hub.freeze(peer)
                self.nursery.start_soon(self.later, self.hub.thaw, peer)
            elif kind == "cut":
                self.hub.cut(peer, other.network.peer)
                self.nursery.start_soon(self.later, self.hub.heal, peer, other.network.peer)
            else:
                link = self.hub.link(peer, other.network.peer)
                link.latency_s, link.bytes_per_s = 0.3, 1e5

    async def later(self, act: Any, *peers: str) -> None:
        await trio.sleep(self.rng.uniform(1, 20))
        act(*peers)


async def generate(session: ChainSession, prompt: list[int], count: int) -> list[int]:
    """Greedy generation, as `petald.generation` does it."""
    for start in range(0, len(prompt), 32):
        piece = prompt[start : start + 32]
        hidden = to_wire(to_rows(piece))
        result = await session.run_step(hidden, position=start, wanted=Wanted.LAST)
    made: list[int] = []
    while True:
        assert result.hidden is not None
        rows_SD = from_wire(
            result.hidden,
            hidden_size=HIDDEN,
            max_tokens=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        made.append(to_values(rows_SD)[0] % 1009)
        if len(made) == count:
            return made
        position = len(prompt) + len(made) - 1
        hidden = to_wire(to_rows([made[-1]]))
        result = await session.run_step(hidden, position=position, wanted=Wanted.LAST)


@pytest.mark.timeout(300)
async def test_every_session_survives_what_happens_to_fifty_servers(
    autojump_clock: Any, pinned_scheduling: None
) -> None:
    async with open_memory_hub(latency_s=0.01) as hub, trio.open_nursery() as background:
        swarm = SimulatedSwarm(hub, background, seed=3)
        for _ in range(SERVERS):
            swarm.join()
        async with trio.open_nursery() as apps:
            background.start_soon(swarm.disturb)
            for number in range(SESSIONS):
                apps.start_soon(swarm.generate, number)
        background.cancel_scope.cancel()
    assert len(swarm.sessions) == 3 * SESSIONS
    counts = [session.counts for session in swarm.sessions]
    assert sum(count.moves for count in counts) > len(counts) + 20  # it was felt
    assert {"no_answer", "stream_broken", "leaving"} <= set(swarm.moves)
    for server in swarm.servers:
        arena = server.hosted.arena
        if server.is_alive:
            assert server.server.sessions == 0
            assert arena.free_tokens == arena.capacity_tokens
        assert server.hosted.most_waiting <= 3 * SESSIONS

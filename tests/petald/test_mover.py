"""Moves as they are carried out: what cannot be done is told to the planner, and to the swarm."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import trio

from kernels.errors import CorruptCheckpoint
from p2p.errors import PeerUnreachable
from petald.block_load import Capacity
from petald.move_actions import MoveSettings, StartMove
from petald.mover import MOST_LOADING_S, Mover
from petald.swarm import Announcement, Claim, Server, ServerState, SwarmView, make_view


async def test_blocks_that_cannot_be_loaded_fail_the_move_and_its_claim_is_taken_back() -> None:
    claims: list[object] = []

    async def prepare(start: int, end: int) -> None:
        await trio.lowlevel.checkpoint()
        raise CorruptCheckpoint("a file is missing")

    async def publish() -> int:
        await trio.lowlevel.checkpoint()
        claims.append(serving.claim)
        return 1

    span = SimpleNamespace(start=0, end=2)
    serving: Any = SimpleNamespace(
        hosting=SimpleNamespace(span=span), prepare=prepare, claim=object()
    )
    nobody: Any = SimpleNamespace(peer="own", publish=publish)
    mover = Mover(
        serving,
        Capacity(fit=2),
        router=nobody,
        announcer=nobody,
        network=nobody,
        settings=MoveSettings(),
        rng=random.Random(0),
    )
    await mover._load(StartMove(2, 4))
    assert claims == [None]
    assert mover._planner.statistics().failed == 1


def server(peer: str, start: int, end: int, state: ServerState = ServerState.SERVING) -> Server:
    claim = Claim(start=start, end=end, made_at_ms=1) if state == ServerState.LOADING else None
    announcement = Announcement(
        model=bytes(32),
        start=start,
        end=end,
        state=state,
        step_ms=1.0,
        cache_tokens=1,
        free_cache_tokens=1,
        dtype="float32",
        claim=claim,
    )
    return Server(peer=peer, announcement=announcement)


class Others:
    """The rest of a swarm, of which some do not answer."""

    peer = "own"

    def __init__(self, *servers: Server) -> None:
        self.servers = servers
        self.silent: set[str] = set()
        self.pinged: list[str] = []

    async def read_view(self, identity: object, *, max_age_s: float) -> SwarmView:
        await trio.lowlevel.checkpoint()
        return make_view(bytes(32), 4, self.servers)

    async def ping(self, peer: str) -> float:
        await trio.lowlevel.checkpoint()
        self.pinged.append(peer)
        if peer in self.silent:
            raise PeerUnreachable("nobody answers")
        return 0.01


def make_mover(others: Any) -> Mover:
    span = SimpleNamespace(start=0, end=2)
    serving: Any = SimpleNamespace(hosting=SimpleNamespace(span=span), identity=None)
    return Mover(
        serving,
        Capacity(fit=2),
        router=others,
        announcer=others,
        network=others,
        settings=MoveSettings(),
        rng=random.Random(0),
    )


async def peers(mover: Mover) -> set[str]:
    return {server.peer for server in (await mover._read_view()).servers}


async def test_whoever_alone_holds_blocks_is_pinged_and_left_out_when_it_is_silent_twice() -> None:
    crowd = [server(f"crowd {number}", 0, 2) for number in range(4)]
    others = Others(*crowd, server("alone", 2, 4))
    mover = make_mover(others)
    assert "alone" in await peers(mover)
    assert set(others.pinged) == {"alone"}
    others.silent.add("alone")
    assert "alone" in await peers(mover)  # once may be chance
    assert "alone" not in await peers(mover)
    others.silent.clear()
    assert "alone" in await peers(mover)


async def test_whoever_loads_for_ever_is_not_counted_on(autojump_clock: Any) -> None:
    mover = make_mover(Others(server("liar", 2, 4, ServerState.LOADING)))
    assert await peers(mover) == {"liar"}
    await trio.sleep(MOST_LOADING_S + 1)
    assert await peers(mover) == set()

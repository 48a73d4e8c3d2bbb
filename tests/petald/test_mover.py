"""Moves as they are carried out: what cannot be done is told to the planner, and to the swarm."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from kernels.errors import CorruptCheckpoint
from p2p.errors import PeerUnreachable
from petald import mover as mover_module
from petald.block_load import Capacity
from petald.move_actions import MoveSettings, StartMove
from petald.move_planner import MoveState
from petald.mover import MOST_LOADING_S, WHOLE_AGE_S, Mover
from petald.swarm import (
    Announcement,
    Claim,
    Server,
    ServerState,
    SwarmView,
    make_view,
    peer_digest,
)
from tests.helpers.placement_world import load_of


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
        self.far: tuple[Server, ...] = ()
        self.share = 1.0
        self.whole_reads: list[float] = []

    async def read_view(
        self, identity: object, *, max_age_s: float, whole: bool = False
    ) -> SwarmView:
        await trio.lowlevel.checkpoint()
        if whole:
            self.whole_reads.append(max_age_s)
            return make_view(bytes(32), 4, self.servers + self.far)
        return make_view(bytes(32), 4, self.servers, share=self.share)

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
    return {server.peer for server in (await mover._read_view(set())).servers}


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


def kin_of_own(*spans: tuple[int, int]) -> list[Server]:
    """Servers whose digests begin with the same two bits as that of the server that asks."""
    first = peer_digest("own")[0] >> 6
    names = [name for number in range(99) if peer_digest(name := f"{number}")[0] >> 6 == first]
    return [server(name, *span) for name, span in zip(names, spans, strict=False)]


async def test_blocks_that_a_sample_lacks_are_looked_for_in_the_whole_swarm() -> None:
    others = Others(*kin_of_own(*[(0, 2)] * 9))
    others.share, others.far = 0.5, (server("far", 2, 4),)
    mover = make_mover(others)
    load = await mover._read_load()
    assert load.share == 0.5
    assert not load.has_gap  # servers outside of the sample have it
    assert load.throughput_L[2:].tolist() == [0.0, 0.0]  # and these are to have more of it
    assert others.whole_reads == [WHOLE_AGE_S]

    others.far = ()
    load = await mover._read_load()
    assert load.share == 1.0
    assert load.has_gap
    assert others.whole_reads == [WHOLE_AGE_S] * 2 + [0.0]  # what was read before is not enough


async def test_a_sample_that_holds_every_block_is_enough() -> None:
    others = Others(*kin_of_own(*[(0, 2)] * 9, (2, 4)))
    others.share = 0.25
    load = await make_mover(others)._read_load()
    assert load.share == 0.25
    assert others.whole_reads == []


async def test_a_gap_is_mended_by_the_whole_view_to_the_end() -> None:
    others = Others(*kin_of_own(*[(0, 4)] * 9))
    others.share = 0.5
    mover = make_mover(others)
    mover._planner._is_urgent, mover._planner._state = True, MoveState.CLAIMED
    assert (await mover._read_load()).share == 1.0
    assert others.whole_reads == [0.0]


async def test_whoever_is_alone_in_a_small_sample_is_pinged() -> None:
    others = Others(*kin_of_own(*[(0, 2)] * 9, (2, 4)))
    others.share = 0.25
    mover = make_mover(others)
    alone = others.servers[-1].peer
    await mover._read_load()
    assert others.pinged == [alone]
    others.silent.add(alone)
    await mover._read_load()
    assert others.whole_reads == []
    assert (await mover._read_load()).has_gap
    assert others.whole_reads  # where it is left out, too


async def test_the_dead_and_those_that_load_for_ever_hide_no_gap_in_a_whole_view(
    autojump_clock: Any,
) -> None:
    for far in (server("dead", 2, 4), server("liar", 0, 4, ServerState.LOADING)):
        others = Others(*kin_of_own(*[(0, 2)] * 9))
        others.share, others.far = 0.25, (far,)
        others.silent.add("dead")
        mover = make_mover(others)
        assert not (await mover._read_load()).has_gap
        assert others.pinged.count(far.peer) == 1  # at each look once
        for _ in range(4):  # samples in which it is not do not make it be forgotten
            await trio.sleep(MOST_LOADING_S / 4 + 1)
            await mover._read_view(set())
            load = await mover._read_load()
        assert load.has_gap
        assert load.share == 1.0
        mover._planner._is_urgent, mover._planner._state = True, MoveState.CLAIMED
        assert (await mover._read_load()).has_gap


async def test_loading_servers_are_remembered_for_a_time(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    monkeypatch.setattr(mover_module, "MAX_LOADING", 3)
    others = Others(*[server(f"{number}", 2, 4, ServerState.LOADING) for number in range(9)])
    mover = make_mover(others)
    await mover._read_view(set())
    assert len(mover._loading_seen) == 3
    others.servers = ()
    await trio.sleep(MOST_LOADING_S + 1)
    await mover._read_view(set())
    assert not mover._loading_seen


async def test_a_paused_server_waits_though_a_move_was_due(autojump_clock: Any) -> None:
    """It was about to claim blocks that nobody serves when it was paused."""
    mover = make_mover(Others())
    looks: list[float] = []

    class Paused:
        @property
        def is_draining(self) -> bool:
            looks.append(trio.current_time())
            return True

    mover._serving.server = Paused()  # type: ignore[assignment]
    mover._planner.on_load(load_of(4, *[(0, 2)] * 5), trio.current_time())
    assert mover._planner.next_deadline() is not None
    with trio.move_on_after(100):
        await mover.run()
    assert 5 < len(looks) < 30


async def test_where_no_view_can_be_read_it_is_not_tried_all_the_time(
    autojump_clock: Any,
) -> None:
    mover = make_mover(Others())
    tries: list[float] = []

    async def refuse(identity: object, *, max_age_s: float, whole: bool = False) -> SwarmView:
        tries.append(trio.current_time())
        raise PeerUnreachable("nobody answers")

    mover._router.read_view = refuse  # type: ignore[assignment,method-assign]
    mover._serving.server = SimpleNamespace(is_draining=False)  # type: ignore[assignment]
    mover._planner.on_load(load_of(4, *[(0, 2)] * 5), trio.current_time())
    with trio.move_on_after(100):
        await mover.run()
    assert 5 < len(tries) < 30

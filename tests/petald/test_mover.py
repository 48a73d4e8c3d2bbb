"""Moves as they are carried out: what cannot be done is told to the planner, and to the swarm."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import trio

from kernels.errors import CorruptCheckpoint
from petald.block_load import Capacity
from petald.move_actions import MoveSettings, StartMove
from petald.mover import Mover


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

"""What a server tells anew, and what it only says still holds."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import trio

from p2p.directory import Directory
from p2p.memory_network import open_memory_hub
from petald.announcer import PERIOD_S, RENEW_S, TTL_S, Announcer, is_worth_telling
from petald.swarm import Announcement, Claim, RoundTripTo, ServerState, directory_key

MODEL = bytes(range(32))
TRIP = RoundTripTo(peer=bytes(8), ms=5.0)
SAID = Announcement(
    model=MODEL,
    start=0,
    end=4,
    state=ServerState.SERVING,
    step_ms=10.0,
    cache_tokens=8000,
    free_cache_tokens=4000,
    dtype="float32",
    queue_ms=1.0,
    prefill_ms=2.0,
    round_trips=(TRIP,),
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"step_ms": 12.0, "prefill_ms": 1.7, "queue_ms": 2.0}, False),
        ({"free_cache_tokens": 3000}, False),
        ({"round_trips": (dataclasses.replace(TRIP, ms=50.0),)}, False),
        ({"round_trips": ()}, False),
        ({"step_ms": 13.0}, True),
        ({"prefill_ms": 1.5}, True),
        ({"prefill_ms": 0.0}, True),
        ({"queue_ms": 3.0}, True),
        ({"send_ms": 1.2}, False),
        ({"send_ms": 2.0}, True),
        ({"free_cache_tokens": 2900}, True),
        ({"free_cache_tokens": 0}, True),
        ({"state": ServerState.LEAVING}, True),
        ({"start": 1}, True),
        ({"block_steps_per_s": 120.0}, True),
        ({"claim": Claim(start=0, end=2, made_at_ms=1)}, True),
        ({"adapters": ("a@0",)}, True),
        ({"addresses": ("/ip4/192.0.2.1/tcp/1",)}, True),
    ],
    ids=str,
)
def test_what_is_worth_telling(changes: dict[str, Any], expected: bool) -> None:
    assert is_worth_telling(SAID, dataclasses.replace(SAID, **changes)) == expected


def test_the_first_round_trips_are_worth_telling_and_little_room_counts_finely() -> None:
    assert is_worth_telling(dataclasses.replace(SAID, round_trips=()), SAID)
    scarce = dataclasses.replace(SAID, free_cache_tokens=100)
    assert is_worth_telling(scarce, dataclasses.replace(scarce, free_cache_tokens=10))


async def test_an_announcement_that_swings_is_told_seldom_and_stays(autojump_clock: Any) -> None:
    async with open_memory_hub() as hub, trio.open_nursery() as nursery:
        rng = random.Random(0)

        def make() -> Announcement:
            return dataclasses.replace(SAID, step_ms=rng.uniform(9.5, 10.5))

        directories = [
            Directory(hub.make_network(), wall_clock=lambda: 1e9 + trio.current_time())
            for _ in range(2)
        ]
        announcer = Announcer(
            directories[0], make, rng=rng, wall_clock=lambda: 1e9 + trio.current_time()
        )
        await nursery.start(announcer.run)
        versions = set()
        for _ in range(int(2 * RENEW_S / PERIOD_S)):
            (record,) = (await directories[1].lookup(directory_key(MODEL))).records
            versions.add(record.version)
            await trio.sleep(PERIOD_S)
        assert len({sequence for sequence, _ in versions}) <= 3
        assert len(versions) > RENEW_S / PERIOD_S
        nursery.cancel_scope.cancel()
        await trio.sleep(TTL_S)

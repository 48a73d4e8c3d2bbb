"""The simulation of the directory: repeatable, true to the daemon's rhythm, and what it shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.directory_sim import Result, grow_and_shrink, simulate
from benchmarks.directory_sim_world import FLOOD, STALE, TRUTHFUL, WITHHOLD, Settings
from petald.announcer import TTL_S

SMALL = Settings(servers=120, readers=12, crashes=8, end_s=170.0)


def without_time(result: Result) -> Result:
    return replace(result, took_s=0.0)


def test_a_seed_gives_the_same_result() -> None:
    first, again, other = (simulate(replace(SMALL, seed=seed)) for seed in (1, 1, 2))
    assert without_time(first) == without_time(again)
    assert without_time(first) != without_time(other)


@pytest.mark.parametrize("hostile", [TRUTHFUL, STALE, WITHHOLD, FLOOD])
def test_everybody_is_seen_and_the_dead_are_forgotten(hostile: str) -> None:
    result = simulate(replace(SMALL, hostile=hostile))
    assert result.level == 1
    assert result.unseen == 0
    assert result.kept == 0
    assert 0 < result.crash_s[1] < TTL_S + 20


def test_a_large_swarm_costs_a_reader_no_more_than_a_middling_one() -> None:
    middling, large = (
        simulate(Settings(servers=servers, readers=6, crashes=4, begin_s=50.0, end_s=110.0))
        for servers in (500, 1000)
    )
    assert large.share == 0.5
    assert large.bytes_per_s[0] < 1.5 * middling.bytes_per_s[0]
    assert large.unseen == 0


def test_nobody_is_invisible_while_a_swarm_grows_and_shrinks() -> None:
    result = simulate(replace(grow_and_shrink(60, 240, seed=0), readers=10))
    assert result.level >= 2
    assert result.unseen == 0

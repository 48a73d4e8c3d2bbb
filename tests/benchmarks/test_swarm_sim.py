"""Simulated swarms: balanced, covered, calm, and the same each time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.swarm_sim import Outcome, print_table, simulate, simulate_strike
from benchmarks.swarm_sim_directory import Said, SimDirectory, Views
from benchmarks.swarm_sim_rules import RULES
from benchmarks.swarm_sim_world import SimSettings, World, memory_bound
from petald.block_load import BlockLoad, read_load
from tests.helpers.placement_world import announcement, view_of

SHORT = SimSettings(servers=150, seed=0, join_s=300.0, settle_s=1500.0, churn_s=1200.0)


def run(settings: SimSettings) -> World:
    choose, make_rule = RULES["petald"]
    world = World(settings, choose=choose, make_rule=make_rule())
    world.run()
    return world


def test_a_swarm_balances_itself_and_stays_covered() -> None:
    for seed in range(2):
        outcome = simulate("petald", replace(SHORT, seed=seed))
        assert outcome.joined > 0.88
        assert outcome.churn_mean is not None
        assert outcome.churn_mean > 0.75
        assert outcome.gap_s == 0
        assert outcome.moves_mean is not None
        assert outcome.moves_mean < 3


def test_a_gap_is_closed_in_minutes() -> None:
    settings = replace(SHORT, servers=60, settle_s=600.0)
    closed_s = [simulate_strike(replace(settings, seed=seed)) for seed in range(3)]
    assert 30.0 < max(closed_s) < 200.0  # for thirty seconds nobody can know


def test_a_run_is_repeated_by_its_seed() -> None:
    settings = replace(SHORT, servers=60, settle_s=600.0, churn_s=600.0)
    first, second = run(settings), run(settings)
    assert first.samples == second.samples
    assert first.throughput_L.tobytes() == second.throughput_L.tobytes()
    assert [one.moved_at for one in first.servers] == [one.moved_at for one in second.servers]
    assert run(replace(settings, seed=1)).samples != first.samples


def random_said(rng: random.Random) -> Said:
    spans = [(start := rng.randrange(16), start + rng.randint(1, 4)) for _ in range(2)]
    claim = rng.choice([None, spans[1]])
    span = spans[0] if claim is None else rng.choice([None, spans[0]])
    return Said(span, claim, rng.randrange(99), rng.uniform(0.5, 2))


def load_by_view(said: dict[str, Said], own: str, seen: Callable[[str], bool]) -> BlockLoad:
    view = {
        peer: announcement(
            *(one.span or one.claim or (0, 1)),
            speed=one.speed,
            state="serving" if one.span else "joining",
            claim=None if one.claim is None else (*one.claim, one.made_at_ms),
        )
        for peer, one in said.items()
        if seen(peer)
    }
    return read_load(view_of(20, view), own=own)


def assert_same(ours: BlockLoad, theirs: BlockLoad, own: str) -> None:
    assert ours.planned_L.tolist() == theirs.planned_L.tolist()
    assert ours.settled_L.tolist() == theirs.settled_L.tolist()
    assert {one.peer for one in theirs.claims} == {one.peer for one in ours.claims} - {own}


def test_the_directory_adds_up_what_a_view_would_give() -> None:
    rng = random.Random(0)
    directory = SimDirectory(20, 1.0)
    said: dict[str, Said] = {}
    for _ in range(300):
        peer = f"{rng.randrange(12):08x}"
        if rng.random() < 0.2:
            said.pop(peer, None)
            directory.put(peer, None)
            continue
        said[peer] = random_said(rng)
        directory.put(peer, said[peer])
    for peer in said:
        assert_same(directory.load_for(peer), load_by_view(said, peer, lambda _: True), peer)


@pytest.mark.parametrize("views", [Views.KIN, Views.DRAWN, Views.OWN])
def test_the_view_of_a_large_swarm_is_a_sample(views: Views) -> None:
    rng = random.Random(0)
    directory = SimDirectory(20, 1.0, views)
    said: dict[str, Said] = {}
    for _ in range(4000):  # some 2,700 servers at last
        peer = f"{rng.getrandbits(32):08x}" if rng.random() < 0.8 else rng.choice([*said, "0" * 8])
        if rng.random() < 0.05:
            said.pop(peer, None)
            directory.put(peer, None)
            continue
        said[peer] = random_said(rng)
        directory.put(peer, said[peer])
    assert directory.level == 5
    own = min(said)
    load = directory.load_for(own)
    shards = {Views.KIN: 8, Views.DRAWN: 8, Views.OWN: 1}[views]
    assert load.share == shards / 2**5
    assert 48 * shards < load.num_servers < 100 * shards
    if views is not Views.DRAWN:
        bits = 2 if views is Views.KIN else 5
        assert_same(
            load, load_by_view(said, own, lambda peer: int(peer, 16) >> 32 - bits == 0), own
        )
    everything = load_by_view(said, own, lambda _: True)
    assert_same(directory.load_for(own, whole=True), everything, own)


def test_memory_bounds_what_quick_servers_are_good_for() -> None:
    world = run(replace(SHORT, servers=20, settle_s=300.0, churn_s=0.0))
    assert 0.2 < memory_bound(world.servers) <= 1.0
    assert memory_bound(world.servers, num_blocks=2) == pytest.approx(1.0)


def test_a_table_leaves_blank_what_was_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    one = Outcome(
        joined=0.97,
        memory=1.0,
        hops=9.0,
        join_moves=0.5,
        churn_mean=None,
        churn_median=None,
        times=None,
        gap_s=None,
        moves_median=None,
        moves_mean=None,
        wall_s=1.0,
    )
    print_table("petald", {100: [one, replace(one, churn_mean=0.9)]})
    assert "2/1" in capsys.readouterr().out

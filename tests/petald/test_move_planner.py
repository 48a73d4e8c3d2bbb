"""When a server moves: to where it is needed, one at a time, and never off a last block."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petald.block_load import Capacity, read_load
from petald.move_actions import FinishMove, MakeClaim, MoveSettings, StartMove, WithdrawClaim
from petald.move_planner import MovePlanner, MoveState
from tests.helpers.placement_world import PlacementWorld, announcement, load_of, view_of

FLAT = [(0, 4), (4, 8)] * 5


def make_planner(span: tuple[int, int] = (0, 4), *, fit: int = 4, peer: str = "me") -> MovePlanner:
    return MovePlanner(
        peer,
        span,
        Capacity(fit=fit, block_steps_per_s=1.0),
        settings=MoveSettings(rest_s=0.0, hourly=1e9, haste=1e9),
        now=0.0,
        rng=random.Random(0),
    )


def claimed(planner: MovePlanner, load, *, at: float = 0.0, made_at_ms: int = 1000):
    """A planner that has claimed a move."""
    assert planner.on_load(load, at) == []
    assert planner.state is MoveState.WAITING
    deadline = planner.next_deadline()
    assert deadline is not None
    (action,) = planner.on_load(load, deadline)
    assert isinstance(action, MakeClaim)
    planner.on_claimed(made_at_ms, deadline)
    return action


LOPSIDED = load_of(8, *[(0, 4)] * 6, *[(4, 8)] * 2)


def test_a_balanced_swarm_is_left_alone() -> None:
    planner = make_planner()
    for now in range(0, 10_000, 30):
        assert planner.on_load(load_of(8, *FLAT), float(now)) == []
    assert planner.state is MoveState.RESTING


def test_a_move_goes_through_all_its_states() -> None:
    planner = make_planner()
    claim = claimed(planner, LOPSIDED)
    assert (claim.start, claim.end) == (4, 8) == planner.claim
    look = planner.next_deadline()
    assert look is not None
    assert planner.on_load(LOPSIDED, look) == [StartMove(4, 8)]
    assert planner.on_load(LOPSIDED, look + 1) == []
    planner.on_loaded(look + 2)
    known_at = planner.next_deadline()
    assert known_at is not None
    assert known_at >= MoveSettings().likely_known_s
    assert planner.on_load(LOPSIDED, known_at - 1) == []
    assert planner.on_load(LOPSIDED, known_at) == [FinishMove(4, 8)]
    planner.on_moved(4, 8, known_at + 1)
    assert (planner.span, planner.claim, planner.state) == ((4, 8), None, MoveState.RESTING)
    assert planner.statistics().moves == 1


@pytest.mark.parametrize("stay", [1, 2])
def test_blocks_with_one_other_server_are_left_when_the_claim_is_known_for_sure(stay: int) -> None:
    planner = make_planner()
    load = load_of(8, *[(0, 4, 50.0)] * stay, (4, 8, 0.1))
    claimed(planner, load)
    limits = MoveSettings()
    now = planner.next_deadline() or 1e9
    claimed_at = now - min(limits.look_s, limits.likely_known_s / 2)
    assert [type(one) for one in planner.on_load(load, now)] == [StartMove]
    planner.on_loaded(now)
    actions = []
    while not actions:
        now = planner.next_deadline() or 1e9
        actions = planner.on_load(load, now)
    assert [type(one) for one in actions] == [FinishMove]
    known_s = limits.known_s if stay == 1 else limits.likely_known_s
    assert now - claimed_at == pytest.approx(known_s)


def test_a_claim_is_withdrawn_when_the_swarm_has_mended_itself() -> None:
    planner = make_planner()
    claimed(planner, LOPSIDED)
    assert planner.on_load(load_of(8, *FLAT), 10.0) == [WithdrawClaim()]
    assert planner.claim is None


def rivals(rival_ms: int, peer: str = "rival"):
    """One server too many on the first half, and a rival that claims to mend just that."""
    said = {str(n): announcement(*span) for n, span in enumerate([(0, 4)] * 3 + [(4, 8)] * 3)}
    said[peer] = announcement(0, 4, claim=(4, 8, rival_ms))
    return read_load(view_of(8, said))


BEFORE = load_of(8, *[(0, 4)] * 4, *[(4, 8)] * 3)


@pytest.mark.parametrize(
    ("rival_ms", "rival", "gives_way"),
    [(999, "z", True), (1001, "a", False), (1000, "a", True), (1000, "z", False)],
)
def test_of_two_claims_the_earlier_counts_and_then_the_lesser_peer(
    rival_ms: int, rival: str, gives_way: bool
) -> None:
    planner = make_planner()
    planner.on_load(BEFORE, 0.0)
    claimed_at = planner.next_deadline() or 0.0
    assert planner.state is MoveState.WAITING
    planner.on_load(BEFORE, claimed_at)
    planner.on_claimed(1000, claimed_at)
    actions = planner.on_load(rivals(rival_ms, rival), planner.next_deadline() or 0.0)
    assert actions == ([WithdrawClaim()] if gives_way else [StartMove(4, 8)])


def test_a_last_block_is_not_left_though_the_swarm_would_gain() -> None:
    planner = make_planner((0, 4), fit=4)
    load = load_of(8, (1, 4, 50.0), (4, 8, 0.01))
    for now in range(0, 1000, 30):
        assert planner.on_load(load, float(now)) == []
    assert planner.state is MoveState.RESTING


@pytest.mark.parametrize("load", [LOPSIDED, load_of(8, *[(0, 4)] * 3, (6, 8))], ids=["", "gap"])
def test_nobody_moves_to_blocks_whose_weights_it_lacks(load) -> None:
    here = Capacity(fit=4, block_steps_per_s=1.0, missing=frozenset({7}))
    planner = make_planner()
    planner.set_capacity(here)
    claim = claimed(planner, load)
    assert claim.end <= 7
    planner = make_planner()
    planner.set_capacity(Capacity(fit=4, block_steps_per_s=1.0, missing=frozenset({4, 5, 6, 7})))
    for now in range(0, 1000, 30):
        assert planner.on_load(load, float(now)) == []
    assert planner.state is MoveState.RESTING


def test_a_server_that_claims_to_leave_is_not_relied_on() -> None:
    planner = make_planner()
    said = {
        "leaver": announcement(0, 4, speed=50.0, claim=(4, 8, 500)),
        "other": announcement(4, 8, speed=0.01),
    }
    for now in range(0, 1000, 30):
        assert planner.on_load(read_load(view_of(8, said)), float(now)) == []


def test_a_gap_is_claimed_within_seconds() -> None:
    planner = make_planner()
    gap = load_of(8, *[(0, 4)] * 5, (4, 7))
    claimed(planner, gap)
    look = planner.next_deadline() or 1e9
    assert look < 15
    assert [type(one) for one in planner.on_load(gap, look)] == [StartMove]
    planner.on_loaded(look + 1)
    assert (planner.next_deadline() or 1e9) < 25
    (finish,) = planner.on_load(gap, 25.0)
    assert isinstance(finish, FinishMove)
    assert finish.start <= 7 < finish.end
    planner.on_moved(finish.start, finish.end, 25.0)
    assert planner.statistics().urgent_moves == 1


def test_of_many_that_see_a_gap_about_one_goes() -> None:
    world = PlacementWorld(8, [(0, 4, 4, 1.0)] * 40 + [(4, 7, 3, 1.0)], seed=1, staleness_s=2.0)
    world.run(100)
    assert min(world.coverage()) > 0
    assert sum(planner.statistics().urgent_moves for planner in world.planners.values()) <= 3


@pytest.mark.parametrize("load", [LOPSIDED, load_of(8, *[(0, 4)] * 5, (4, 7))], ids=["", "gap"])
def test_a_failed_move_leaves_the_server_where_it_was(load) -> None:
    planner = make_planner()
    claimed(planner, load)
    planner.on_move_failed(5.0)
    assert (planner.claim, planner.span, planner.state) == (None, (0, 4), MoveState.RESTING)
    rest_s = MoveSettings().failed_rest_s
    planner.on_load(load, 4.0 + rest_s)
    assert planner.state is MoveState.RESTING  # others may have its blocks meanwhile
    planner.on_load(load, 6.0 + rest_s)
    assert planner.state is MoveState.WAITING


servers = st.tuples(
    st.integers(0, 7), st.integers(1, 4), st.sampled_from([0.3, 1.0, 3.0, 10.0])
).map(lambda one: (min(one[0], 8 - one[1]), min(one[0], 8 - one[1]) + one[1], 4, one[2]))


@settings(max_examples=40, deadline=None)
@given(st.lists(servers, min_size=2, max_size=7), st.integers(0, 1000))
def test_no_block_is_left_empty_however_stale_the_views(swarm, seed: int) -> None:
    """Every view is up to 45 s old, each server in it differently; clocks differ by two minutes."""
    limits = MoveSettings(
        rest_s=0.0,
        hourly=1e9,
        haste=1e9,
        min_gain=0.0,
        drain_s=0.0,
        load_block_s=0.0,
        likely_known_s=45.0,
    )
    world = PlacementWorld(
        8, swarm, seed=seed, staleness_s=limits.known_s, load_s=seed % 60, settings=limits
    )
    covered = {block for block, count in enumerate(world.coverage()) if count}
    for _ in range(60):
        world.run(10.0)
        now_covered = {block for block, count in enumerate(world.coverage()) if count}
        assert covered <= now_covered
        covered = now_covered


def count_gaps(known_s: float) -> int:
    """Of 100 worlds in which two servers are both tempted off the same blocks, those with a gap."""
    limits = MoveSettings(
        rest_s=0.0, hourly=1e9, haste=1e9, known_s=known_s, likely_known_s=known_s
    )
    gaps = 0
    for seed in range(100):
        swarm = [(0, 4, 4, 1.0), (0, 4, 4, 1.0), (4, 8, 4, 0.02)]
        world = PlacementWorld(8, swarm, seed=seed, staleness_s=45.0, load_s=1.0, settings=limits)
        for _ in range(100):
            world.run(2.0)
            if not all(world.coverage()):
                gaps += 1
                break
    return gaps


def test_two_servers_do_not_leave_the_same_last_block() -> None:
    assert count_gaps(known_s=45.0) == 0
    assert count_gaps(known_s=1.0) > 0  # it is the waiting that does it


@settings(max_examples=6, deadline=None)
@given(st.lists(servers, min_size=3, max_size=12), st.integers(0, 1000))
def test_a_swarm_that_nobody_joins_or_leaves_comes_to_rest(swarm, seed: int) -> None:
    world = PlacementWorld(8, swarm, seed=seed, staleness_s=20.0)
    world.run(12_000)  # what is forgone may take two hours to be worth a move
    moves = len(world.moves)
    world.run(3000)
    assert len(world.moves) == moves
    assert all(planner.state is MoveState.RESTING for planner in world.planners.values())


def test_moves_make_a_bad_placement_good() -> None:
    world = PlacementWorld(8, [(0, 4, 4, 1.0)] * 20, seed=3, staleness_s=10.0)
    world.run(3000)
    throughput = world.throughput()
    assert min(throughput) >= 0.9 * sum(throughput) / 8
    assert len(world.moves) <= 20

"""The session's state machine under arbitrary orders of losses, delays, failures, cancellations."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st

from petald.errors import MissingBlocks
from petald.routing import choose_chain
from tests.helpers.session_client import SimClient
from tests.helpers.session_faults import LIES, strike, tell_leaving
from tests.helpers.session_rows import ListHistory, expected_tokens
from tests.helpers.session_world import World

SPANS = [(0, 3), (3, 6), (6, 8), (2, 5), (0, 4), (4, 8)]
LONGEST_S = 900.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong; see `tests.helpers.session_faults.strike`."""

    kind: str
    when: float
    one: int = 0
    other: int = 0
    seconds: float = 1.0


def faults_of(*kinds: str) -> st.SearchStrategy[list[Fault]]:
    """Some faults, in no order."""
    one = st.builds(
        Fault,
        st.sampled_from(kinds),
        st.floats(0.1, 8.0),
        st.integers(0, 20),
        st.integers(0, 20),
        st.floats(0.1, 8.0),
    )
    return st.lists(one, max_size=16)


def make_world(seed: int, *, clients: int = 2, has_room: bool = False, **options: bool) -> World:
    """Servers near and far, quick and slow; sessions short and long.

    Args:
        has_room: every server takes long steps, and all sessions.
    """
    rng = random.Random(seed)
    world = World(
        8,
        seed,
        latency_s=rng.choice((0.005, 0.02, 0.1)),
        chain_delays_s=rng.choice(((0.001,), (0.001, 0.05, 3.0))),
        hand_over_s=rng.choice((0.0, 0.5, 5.0)),
        hand_over_failures=rng.choice((0.0, 0.5)),
        hand_overs=rng.choice((0.5, 1.0)),
        **options,
    )
    paces_s = rng.choice(((0.001,), (0.001, 0.005, 0.02), (0.02, 0.05, 0.1)))
    for start, end in SPANS * 2:
        server = world.add_server(start, end, block_s=rng.choice(paces_s))
        if not has_room:
            server.capacity = rng.choice((64, 64, 64, 1))
            server.max_step_tokens = rng.choice((128, 128, 128, 32))
    for number in range(clients):
        prompt = tuple(range(number, number + rng.choice((10, 40, 40, 400))))
        client = SimClient(world, prompt, rng.choice((20, 40, 60)))
        world.at(0.1, client.start)
    return world


def run_faults(world: World, faults: list[Fault]) -> None:
    """Lets them happen, and sees that all sessions are done then and nothing is left of them."""
    ListHistory.open_histories = len(world.clients)  # one each, from the start
    for fault in faults:
        world.at(
            fault.when,
            lambda fault=fault: strike(world, fault.kind, fault.one, fault.other, fault.seconds),
        )
    world.run_sessions(LONGEST_S)
    for client in world.clients:
        assert client.error is None
        assert client.is_done
    world.run(world.now + 50.0)
    assert world.open_hops() == 0
    assert ListHistory.open_histories == 0


def check_tokens(world: World) -> None:
    """They are those that an undisturbed chain makes."""
    for client in world.clients:
        assert client.tokens == expected_tokens(
            8, client.prompt, client.count, tells_steps_apart=world.is_replay_exact
        )


BREAKS = ("kill", "hang", "cut servers", "cut client", "cut way", "break stream", "break all")
CHANGES = ("cancel", "rewind", "rewind", "leave", "leave", "propose", "repeat")
ODDITIES = ("pause", "break link", "refuse")

seeds = st.integers(0, 100_000)


@settings(max_examples=250, deadline=None)
@example([Fault("kill", 0.3), Fault("kill", 0.31, 2)], 5, False)
@given(faults_of(*BREAKS, *CHANGES, *ODDITIES), seeds, st.booleans())
def test_every_session_ends_with_the_right_tokens(
    faults: list[Fault], seed: int, is_replay_exact: bool
) -> None:
    world = make_world(seed, is_replay_exact=is_replay_exact)
    run_faults(world, faults)
    check_tokens(world)


@settings(max_examples=150, deadline=None)
@given(faults_of("lie", "lie", "lie", "kill", "leave", "rewind", "propose"), seeds)
def test_hops_that_lie_cost_no_session_its_tokens(faults: list[Fault], seed: int) -> None:
    world = make_world(seed, has_room=True)  # that others can do what the liars do not
    run_faults(world, faults)
    check_tokens(world)


@settings(max_examples=150, deadline=None)
@given(faults_of(*BREAKS, *CHANGES, *ODDITIES), seeds)
def test_what_a_hop_has_cached_is_what_the_history_says_to_the_last_bit(
    faults: list[Fault], seed: int
) -> None:
    # No two servers give the same; what tokens are right cannot be told. The clients look at the
    # caches whenever a step is done.
    world = make_world(seed, tells_servers_apart=True)
    run_faults(world, faults)
    assert world.seen["caches compared"] > 10


@settings(max_examples=150, deadline=None)
@given(faults_of("kill", "kill", "hang", "leave", "rewind", "propose"), seeds)
def test_nobody_is_blamed_for_what_another_did(faults: list[Fault], seed: int) -> None:
    world = make_world(seed)
    run_faults(world, faults)
    check_tokens(world)
    for client in world.clients:
        assert [each for each in client.penalised if not each[-1]] == []


def test_all_that_is_to_go_wrong_goes_wrong() -> None:
    seen: Counter[str] = Counter()
    for seed in range(80):
        rng = random.Random(seed)
        kinds = (*BREAKS, *CHANGES * 3, *ODDITIES, "lie", "lie", "lie")
        world = make_world(seed, has_room=True)
        faults = [
            Fault(
                rng.choice(kinds),
                rng.uniform(0.1, 8.0),
                rng.randrange(20),
                rng.randrange(20),
                rng.uniform(0.1, 8.0),
            )
            for _ in range(16)
        ]
        run_faults(world, faults)
        check_tokens(world)
        seen.update(world.seen)
    wanted = {*BREAKS, *CHANGES, *ODDITIES, *(f"lie: {lie}" for lie in LIES)}
    wanted |= {"late timer", "void question answered", "request refused"}
    wanted |= {"handed over", "hand-over failed", "source of a hand-over lost"}
    wanted |= {
        "replayed in several pieces",
        "rewound during a replay",
        "rewound during a hand-over",
    }
    assert not wanted - seen.keys()


def test_a_session_whose_blocks_nobody_has_ends_after_its_time() -> None:
    world = World(8, 1)
    world.add_server(0, 6)
    client = SimClient(world, (1, 2, 3), 4, max_wait_s=7.0)
    client.start()
    world.run(6.0)
    assert not client.is_done
    world.run(8.0)
    assert isinstance(client.error, MissingBlocks)
    assert client.error.ranges == ((6, 8),)
    assert world.open_hops() == 0


def test_a_session_goes_on_when_somebody_comes() -> None:
    world = World(8, 1)
    world.add_server(0, 6)
    client = SimClient(world, (1, 2, 3), 4, max_wait_s=20.0)
    client.start()
    world.at(9.0, lambda: world.add_server(5, 8) and None)
    world.run(30.0)
    assert client.tokens == expected_tokens(8, (1, 2, 3), 4)


def test_a_silent_hop_is_noticed_soon_and_a_slow_one_is_not_taken_for_it() -> None:
    world = World(8, 3)
    for start, end in [(0, 4), (4, 8)] * 2:
        world.add_server(start, end)
    client = SimClient(world, (1, 2, 3), 200)
    client.start()
    world.run(1.0)
    hung = world.servers[client.session.chain[0].peer]
    world.at(1.0, lambda: world.hang(hung, 60.0))
    world.run(4.0)
    (opened, moved) = client.moves
    assert opened.code == "opened"
    assert moved.code == "no_answer"
    assert moved.silent_s < 1.0
    # A hundred times slower from one step to the next: asked whether it lives, and waited for.
    slow = world.servers[client.session.chain[1].peer]
    slow.block_s *= 100
    world.run(200.0)
    assert client.is_done
    assert client.session.counts.probes > 1
    assert len(client.moves) == 2


def test_a_leaving_hop_hands_its_cache_over() -> None:
    world = World(8, 4)
    for start, end in [(0, 4), (4, 8)] * 2:
        world.add_server(start, end)
    client = SimClient(world, tuple(range(30)), 100)
    client.start()
    world.run(1.0)
    tell_leaving(world.servers[client.session.chain[1].peer])
    world.run(30.0)
    assert client.tokens == expected_tokens(8, client.prompt, 100)
    moved = client.moves[-1]
    assert moved.code == "leaving"
    assert moved.handed_over_tokens > 30
    assert moved.replayed_tokens < 10
    assert not client.penalties


def test_a_better_chain_takes_over_beside_the_one_that_runs() -> None:
    world = World(8, 5)
    for start, end in [(0, 4), (4, 8)]:
        world.add_server(start, end, block_s=0.01)
    client = SimClient(world, tuple(range(30)), 200)
    client.start()
    world.run(2.0)
    quick = world.add_server(0, 8, block_s=0.001)
    world.run(5.0)  # the view is renewed
    made = len(client.tokens)
    chain = choose_chain(world.view(), needed_tokens=1)
    assert [hop.peer for hop in chain] == [quick.peer]
    client.feed("propose", chain)
    world.run(60.0)
    assert client.tokens == expected_tokens(8, client.prompt, 200)
    moved = client.moves[-1]
    assert (moved.code, moved.start, moved.end) == ("better", 0, 8)
    assert moved.replayed_tokens >= 30 + made - 1  # the last one was not cached yet
    # It was built while the old one went on: only the last tokens were waited for.
    assert moved.pause_s < 0.5
    assert not client.penalties


def test_a_hop_that_keeps_its_copies_back_is_replaced() -> None:
    world = World(8, 6)
    for start, end in [(0, 4), (4, 8)] * 2:
        world.add_server(start, end)
    client = SimClient(world, (1, 2, 3), 400)
    client.start()
    world.run(0.5)
    withholder = client.session.chain[0].peer
    take_output = client.session.on_output

    def drop_output(hop_id: int, *arguments: object, **options: float) -> list[object]:
        peer = client.peer_of(hop_id)
        return [] if peer == withholder else take_output(hop_id, *arguments, **options)  # type: ignore[arg-type]

    client.session.on_output = drop_output  # type: ignore[assignment,method-assign]
    world.run(120.0)
    assert client.tokens == expected_tokens(8, (1, 2, 3), 400)
    assert client.session.counts.moves > 1
    assert withholder in client.penalties

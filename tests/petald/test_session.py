"""The session's state machine under arbitrary orders of losses, delays, failures, cancellations."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from petald.errors import MissingBlocks
from petald.routing import choose_chain
from tests.helpers.session_client import SimClient
from tests.helpers.session_faults import strike, tell_leaving
from tests.helpers.session_rows import ListHistory, expected_tokens
from tests.helpers.session_world import World

SPANS = [(0, 3), (3, 6), (6, 8), (2, 5), (0, 4), (4, 8)]
KINDS = ["kill", "hang", "cut servers", "cut client", "cancel", "leave", "propose", "repeat"]

faults = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.floats(0.1, 8.0),
        st.integers(0, 20),
        st.integers(0, 20),
        st.floats(0.1, 8.0),
    ),
    max_size=16,
)


@settings(max_examples=150, deadline=None)
@example([("kill", 0.3, 0, 0, 1.0), ("kill", 0.31, 1, 0, 1.0)], 5, False)
@given(faults, st.integers(0, 1000), st.booleans())
def test_every_session_ends_with_the_right_tokens(
    events: list[tuple[str, float, int, int, float]], seed: int, is_replay_exact: bool
) -> None:
    ListHistory.open_histories = 0
    world = World(8, seed, is_replay_exact=is_replay_exact)
    for start, end in SPANS * 2:
        world.add_server(start, end)
    clients = [
        SimClient(world, tuple(range(number, 40 + number)), 40 + number) for number in range(3)
    ]
    for client in clients:
        world.at(0.1, client.start)
    for kind, when, one, other, seconds in events:
        world.at(
            when,
            lambda kind=kind, one=one, other=other, seconds=seconds: strike(
                world, kind, one, other, seconds
            ),
        )
    world.run(150.0)
    for client in clients:
        assert client.error is None
        assert client.is_done
        assert client.tokens == expected_tokens(
            8, client.prompt, client.count, tells_steps_apart=is_replay_exact
        )
    world.run(200.0)
    assert world.open_hops() == 0
    assert ListHistory.open_histories == 0


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

"""The choice of a chain, against brute force on small random swarms."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petald.errors import MissingBlocks
from petald.routing import UNKNOWN_ROUND_TRIP_S, Hop, choose_chain
from petald.swarm import Announcement, Server, ServerState, SwarmView, make_view

MODEL = bytes(32)


def make_server(
    peer: str,
    start: int,
    end: int,
    *,
    step_ms: float = 10.0,
    round_trip_s: float | None = 0.01,
    free: int = 1000,
    state: str = ServerState.SERVING,
) -> Server:
    return Server(
        peer=peer,
        round_trip_s=round_trip_s,
        announcement=Announcement(
            model=MODEL,
            start=start,
            end=end,
            state=state,
            step_ms=step_ms,
            cache_tokens=1000,
            free_cache_tokens=free,
            dtype="float32",
        ),
    )


def make_swarm(*servers: Server, blocks: int = 6) -> SwarmView:
    return make_view(MODEL, blocks, servers)


def spans(chain: tuple[Hop, ...]) -> list[tuple[str, int, int]]:
    return [(hop.peer, hop.start, hop.end) for hop in chain]


def cost_s(view: SwarmView, chain: list[tuple[str, int, int]]) -> float:
    """The time of a step through a chain, from the definition."""
    servers = {server.peer: server for server in view.servers}

    def one_way(peer: str) -> float:
        known = servers[peer].round_trip_s
        return (UNKNOWN_ROUND_TRIP_S if known is None else known) / 2

    total = one_way(chain[0][0]) + one_way(chain[-1][0])
    for (before, _, _), (after, _, _) in itertools.pairwise(chain):
        total += (one_way(before) + one_way(after)) / 2
    for peer, start, end in chain:
        server = servers[peer]
        per_block = server.announcement.step_ms / 1e3 / (server.end - server.start)
        total += per_block * (end - start)
    return total


def brute_force(view: SwarmView) -> float:
    """The least cost over every chain there is, cut anywhere."""
    best = math.inf

    def extend(at: int, chain: list[tuple[str, int, int]]) -> None:
        nonlocal best
        if at == view.num_blocks:
            best = min(best, cost_s(view, chain))
            return
        for server in view.servers:
            if server.start <= at < server.end and (not chain or chain[-1][0] != server.peer):
                for end in range(at + 1, server.end + 1):
                    extend(end, [*chain, (server.peer, at, end)])

    extend(0, [])
    return best


def test_a_single_server_is_the_chain() -> None:
    assert spans(choose_chain(make_swarm(make_server("a", 0, 6)), needed_tokens=1)) == [("a", 0, 6)]


def test_three_servers_share_the_model() -> None:
    view = make_swarm(make_server("c", 4, 6), make_server("a", 0, 2), make_server("b", 2, 4))
    assert spans(choose_chain(view, needed_tokens=1)) == [("a", 0, 2), ("b", 2, 4), ("c", 4, 6)]


def test_overlapping_spans_are_cut_where_the_next_begins() -> None:
    view = make_swarm(make_server("a", 0, 4), make_server("b", 2, 6))
    chain = choose_chain(view, needed_tokens=1)
    assert [hop.peer for hop in chain] == ["a", "b"]
    assert chain[0].end == chain[1].start


def test_the_nearer_of_two_equals_is_taken() -> None:
    view = make_swarm(
        make_server("far", 0, 6, round_trip_s=0.2), make_server("near", 0, 6, round_trip_s=0.01)
    )
    assert spans(choose_chain(view, needed_tokens=1)) == [("near", 0, 6)]


def test_one_slow_hop_may_beat_two_quick_ones() -> None:
    view = make_swarm(
        make_server("whole", 0, 6, step_ms=30),
        make_server("first", 0, 3, step_ms=2, round_trip_s=0.1),
        make_server("second", 3, 6, step_ms=2, round_trip_s=0.1),
    )
    assert spans(choose_chain(view, needed_tokens=1)) == [("whole", 0, 6)]


@pytest.mark.parametrize(
    "server",
    [
        make_server("full", 0, 6, free=10),
        make_server("gone", 0, 6, state=ServerState.LEAVING),
    ],
    ids=["full", "leaving"],
)
def test_a_server_that_would_refuse_is_not_asked(server: Server) -> None:
    view = make_swarm(server, make_server("z", 0, 6, round_trip_s=5.0))
    assert spans(choose_chain(view, needed_tokens=100)) == [("z", 0, 6)]


def test_a_penalised_peer_is_left_out() -> None:
    view = make_swarm(make_server("a", 0, 6), make_server("z", 0, 6, round_trip_s=5.0))
    chain = choose_chain(view, needed_tokens=1, penalties_s={"a": math.inf})
    assert spans(chain) == [("z", 0, 6)]


def test_missing_blocks_are_named() -> None:
    view = make_swarm(make_server("a", 0, 2), make_server("b", 3, 5))
    with pytest.raises(MissingBlocks, match=r"2:3, 5:6") as caught:
        choose_chain(view, needed_tokens=1)
    assert caught.value.ranges == ((2, 3), (5, 6))


def test_servers_that_cannot_be_true_are_not_in_the_view() -> None:
    view = make_swarm(make_server("a", 0, 99), make_server("b", 3, 3))
    assert view.servers == ()


small_servers = st.builds(
    lambda peer, start, length, step_ms, trip: make_server(
        peer, start, min(start + length, 5), step_ms=step_ms, round_trip_s=trip
    ),
    st.sampled_from("abcdefg"),
    st.integers(0, 4),
    st.integers(1, 5),
    st.sampled_from([1.0, 5.0, 20.0, 100.0]),
    st.sampled_from([None, 0.0, 0.001, 0.02, 0.3]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(small_servers, max_size=5, unique_by=lambda server: server.peer))
def test_the_choice_is_optimal(servers: list[Server]) -> None:
    view = make_swarm(*servers, blocks=5)
    best = brute_force(view)
    try:
        chain = spans(choose_chain(view, needed_tokens=1))
    except MissingBlocks:
        assert best == math.inf
        return
    assert chain[0][1] == 0
    assert chain[-1][2] == 5
    assert cost_s(view, chain) == pytest.approx(best)

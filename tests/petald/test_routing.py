"""The choice of a chain, against brute force on small random swarms."""

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petald.config import MAX_HOSTED_ADAPTERS
from petald.coverage import find_hosted
from petald.errors import BadRequest, MissingBlocks
from petald.parallel_routing import choose_parallel_chains
from petald.routing import (
    UNKNOWN_ROUND_TRIP_S,
    Hop,
    chain_cost_s,
    choose_chain,
    should_move,
)
from petald.swarm import (
    MAX_ADAPTERS,
    MAX_ANNOUNCEMENT_BYTES,
    MAX_ROUND_TRIPS,
    Announcement,
    RoundTripTo,
    Server,
    ServerState,
    SwarmView,
    adapter_full_name,
    make_view,
    peer_digest,
)

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
    queue_ms: float = 0.0,
    send_ms: float = 0.0,
    pairs: Mapping[str, float] | None = None,
    adapters: tuple[str, ...] = (),
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
            queue_ms=queue_ms,
            send_ms=send_ms,
            round_trips=tuple(
                RoundTripTo(peer=peer_digest(other), ms=ms)
                for other, ms in (pairs or {}).items()
                if other != peer
            ),
            adapters=adapters,
        ),
    )


def make_swarm(*servers: Server, blocks: int = 6) -> SwarmView:
    return make_view(MODEL, blocks, servers)


def spans(chain: tuple[Hop, ...]) -> list[tuple[str, int, int]]:
    return [(hop.peer, hop.start, hop.end) for hop in chain]


Chain = list[tuple[str, int, int]]


@dataclass(frozen=True)
class Question:
    """What `choose_chain` is asked, beside the view."""

    start: int = 0
    end: int = 6
    before: str | None = None
    after: str | None = None
    penalties_s: Mapping[str, float] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()


def way_s(view: SwarmView, one: str | None, other: str | None) -> float:
    """One way between two peers, from the definition; none is the client."""
    servers = {server.peer: server for server in view.servers}

    def from_client(peer: str | None) -> float:
        if peer is None:
            return 0.0
        known = servers[peer].round_trip_s if peer in servers else None
        return (UNKNOWN_ROUND_TRIP_S if known is None else known) / 2

    if one == other:
        return 0.0
    for here, there in ((one, other), (other, one)):
        if here in servers and there in servers:
            for trip in servers[here].announcement.round_trips:
                if trip.peer == peer_digest(there):
                    return trip.ms / 2e3
    return from_client(one) + from_client(other)


def cost_s(view: SwarmView, chain: Chain, asked: Question) -> float:
    """The time of a step through a chain, from the definition."""
    servers = {server.peer: server for server in view.servers}
    path = [asked.before, *(peer for peer, _, _ in chain), asked.after]
    total = sum(way_s(view, *pair) for pair in itertools.pairwise(path))
    for peer, start, end in chain:
        server = servers[peer]
        said = server.announcement
        per_block = said.step_ms / 1e3 / (server.end - server.start)
        total += per_block * (end - start) + (said.queue_ms + said.send_ms) / 1e3
        total += asked.penalties_s.get(peer, 0.0)
    return total


def brute_force(view: SwarmView, asked: Question) -> float:
    """The least cost over every chain there is, cut anywhere."""
    best = math.inf

    def extend(at: int, chain: Chain) -> None:
        nonlocal best
        if at == asked.end:
            best = min(best, cost_s(view, chain, asked))
            return
        for server in view.servers:
            fits = server.start <= at < server.end and server.peer not in asked.excluded
            if fits and (not chain or chain[-1][0] != server.peer):
                for end in range(at + 1, min(server.end, asked.end) + 1):
                    extend(end, [*chain, (server.peer, at, end)])

    extend(asked.start, [])
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


def test_who_has_promised_room_already_needs_no_more() -> None:
    full = make_server("full", 0, 6, free=0)
    view = make_swarm(full, make_server("z", 0, 6, round_trip_s=5.0))
    assert spans(choose_chain(view, needed_tokens=100, holding={"full"})) == [("full", 0, 6)]
    leaving = make_server("full", 0, 6, free=0, state=ServerState.LEAVING)
    view = make_swarm(leaving, make_server("z", 0, 6, round_trip_s=5.0))
    assert spans(choose_chain(view, needed_tokens=100, holding={"full"})) == [("z", 0, 6)]


def test_a_narrow_link_counts_once_for_each_hop() -> None:
    view = make_swarm(
        make_server("narrow", 0, 6, step_ms=10.0, send_ms=13.0),
        make_server("near", 0, 6, step_ms=20.0, send_ms=0.1),
    )
    chain = choose_chain(view, needed_tokens=1)
    assert spans(chain) == [("near", 0, 6)]
    assert chain_cost_s(view, chain) == pytest.approx(0.0201 + 0.01)


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


PEERS = "abcdef"

small_servers = st.builds(
    lambda peer, start, length, step_ms, trip, queue_ms, send_ms, pairs: make_server(
        peer,
        start,
        min(start + length, 5),
        step_ms=step_ms,
        round_trip_s=trip,
        queue_ms=queue_ms,
        send_ms=send_ms,
        pairs=pairs,
    ),
    st.sampled_from(PEERS),
    st.integers(0, 4),
    st.integers(1, 5),
    st.sampled_from([1.0, 5.0, 20.0, 100.0]),
    st.sampled_from([None, 0.0, 0.001, 0.02, 0.3]),
    st.sampled_from([0.0, 3.0, 50.0]),
    st.sampled_from([0.0, 0.1, 20.0]),
    st.dictionaries(st.sampled_from(PEERS), st.sampled_from([0.0, 1.0, 30.0, 900.0]), max_size=4),
)
questions = st.builds(
    Question,
    start=st.integers(0, 2),
    end=st.integers(3, 5),
    before=st.sampled_from([None, *PEERS, "gone"]),
    after=st.sampled_from([None, *PEERS, "gone"]),
    penalties_s=st.dictionaries(
        st.sampled_from(PEERS), st.sampled_from([0.01, 1.0, 10.0]), max_size=3
    ),
    excluded=st.frozensets(st.sampled_from(PEERS), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(small_servers, max_size=5, unique_by=lambda server: server.peer), questions)
def test_the_choice_is_optimal(servers: list[Server], asked: Question) -> None:
    view = make_swarm(*servers, blocks=5)
    best = brute_force(view, asked)
    try:
        hops = choose_chain(view, needed_tokens=1, **vars(asked))
    except MissingBlocks:
        assert best == math.inf
        return
    chain = spans(hops)
    assert (chain[0][1], chain[-1][2]) == (asked.start, asked.end)
    assert cost_s(view, chain, asked) == pytest.approx(best, abs=1e-12)
    known = {"before": asked.before, "after": asked.after, "penalties_s": asked.penalties_s}
    assert chain_cost_s(view, hops, **known) == pytest.approx(best, abs=1e-12)


def test_a_near_server_is_no_short_cut_to_a_far_one() -> None:
    far = make_server("far", 0, 6, step_ms=1, round_trip_s=0.2)
    near = make_server("near", 0, 6, step_ms=100, round_trip_s=0.001)
    assert spans(choose_chain(make_swarm(far, near), needed_tokens=1)) in (
        [("near", 0, 6)],
        [("far", 0, 6)],
    )


def test_ten_thousand_servers_of_a_large_model() -> None:
    rng = random.Random(1)
    servers = []
    for number in range(10_000):
        start = rng.randrange(126 - 4)
        others = {f"{rng.randrange(10_000)}": rng.uniform(1, 100) for _ in range(MAX_ROUND_TRIPS)}
        servers.append(
            make_server(
                f"{number}",
                start,
                min(126, start + rng.randint(4, 40)),
                step_ms=rng.uniform(1, 100),
                round_trip_s=rng.choice([None, rng.uniform(0.001, 0.3)]),
                pairs=others,
            )
        )
    view = make_swarm(*servers, blocks=126)
    chain = choose_chain(view, needed_tokens=1)
    assert [hop.start for hop in chain] == [0, *(hop.end for hop in chain[:-1])]
    assert chain[-1].end == 126


@pytest.mark.parametrize(
    ("better_s", "remaining", "rebuild_s", "moves"),
    [
        (0.05, 100, 1.0, True),
        (0.08, 10_000, 1.0, False),  # not much better
        (0.05, 10, 1.0, False),  # not for long enough
        (0.05, 100, 3.0, False),  # too dear
    ],
)
def test_a_session_moves_only_where_it_pays(
    better_s: float, remaining: int, rebuild_s: float, moves: bool
) -> None:
    answer = should_move(
        current_s=0.1, better_s=better_s, remaining_steps=remaining, rebuild_s=rebuild_s
    )
    assert answer is moves


def test_an_announcement_with_every_field_is_small() -> None:
    names = [adapter_full_name("n" * 63 + str(n), bytes([n] * 32)) for n in range(MAX_ADAPTERS)]
    pairs = {f"{n}": 1.5 for n in range(MAX_ROUND_TRIPS)}
    server = make_server("a", 0, 6, pairs=pairs, adapters=tuple(names))
    body = server.announcement.encode()
    assert Announcement.decode(body) == server.announcement
    assert len(body) < MAX_ANNOUNCEMENT_BYTES / 4


ONE, OTHER = "poet@1111111111111111", "poet@2222222222222222"


def test_only_servers_that_host_the_adapter_are_chosen() -> None:
    view = make_swarm(
        make_server("quick", 0, 6, step_ms=1.0),
        make_server("a", 0, 3, adapters=("x@0", ONE)),
        make_server("b", 3, 6, adapters=(ONE,)),
        make_server("c", 3, 6, step_ms=1.0, adapters=(OTHER,)),
    )
    assert spans(choose_chain(view, needed_tokens=1)) == [("quick", 0, 6)]
    chosen = [("a", 0, 3), ("b", 3, 6)]
    assert spans(choose_chain(view, needed_tokens=1, hosted=ONE)) == chosen
    (share,) = choose_parallel_chains(view, hosted=ONE)
    assert spans(share.hops) == chosen
    for hosted, ranges in ((OTHER, ((0, 3),)), ("nobody@0", ((0, 6),))):
        with pytest.raises(MissingBlocks, match=hosted) as caught:
            choose_chain(view, needed_tokens=1, hosted=hosted)
        assert caught.value.ranges == ranges


def test_an_adapters_name_stands_for_the_one_that_covers_the_blocks() -> None:
    whole = [make_server("a", 0, 3, adapters=(ONE,)), make_server("b", 3, 6, adapters=(ONE,))]
    part = make_server("c", 2, 6, adapters=(OTHER, "poets@3"))
    leaving = make_server("d", 0, 2, adapters=(OTHER,), state=ServerState.LEAVING)
    view = make_swarm(*whole, part, leaving)
    assert find_hosted(view, "poet") == ONE
    assert find_hosted(view, "other@1") == "other@1"
    with pytest.raises(BadRequest, match=f"{ONE}, {OTHER}"):
        find_hosted(view, "poet", start=3)
    with pytest.raises(BadRequest, match="say which"):
        find_hosted(make_swarm(*whole, make_server("c", 0, 6, adapters=(OTHER,))), "poet")
    with pytest.raises(MissingBlocks, match=f"{ONE} lacks blocks 3:6; {OTHER} lacks blocks 0:2"):
        find_hosted(make_swarm(whole[0], part, leaving), "poet")
    with pytest.raises(MissingBlocks, match="no server hosts an adapter 'painter'"):
        find_hosted(view, "painter")


def test_a_server_can_announce_all_that_it_may_host() -> None:
    assert MAX_HOSTED_ADAPTERS == MAX_ADAPTERS

"""The choice of parallel chains, against exact flows and brute force on small random swarms."""

import itertools
import math
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petald import block_flow
from petald.errors import MissingBlocks
from petald.parallel_routing import TOLERANCE, ChainShare, choose_parallel_chains
from petald.routing import choose_chain
from petald.swarm import (
    PREFILL_SPEED_UP,
    Announcement,
    Server,
    ServerState,
    SwarmView,
    make_view,
)

MODEL = bytes(32)
MANY = 1000
"""More chains than any split of these swarms takes."""


def make_server(
    peer: str,
    start: int,
    end: int,
    *,
    step_ms: float = 10.0,
    prefill_ms: float = 0.0,
    state: str = ServerState.SERVING,
) -> Server:
    return Server(
        peer=peer,
        announcement=Announcement(
            model=MODEL,
            start=start,
            end=end,
            state=state,
            step_ms=step_ms,
            prefill_ms=prefill_ms,
            cache_tokens=1000,
            free_cache_tokens=0,  # a forward pass needs no cache
            dtype="float32",
            addresses=(f"/ip4/10.0.0.1/tcp/{ord(peer[0])}",),
        ),
    )


def make_swarm(*servers: Server, blocks: int = 6) -> SwarmView:
    return make_view(MODEL, blocks, servers)


@dataclass(frozen=True)
class Question:
    """What `choose_parallel_chains` is asked, beside the view and the number of chains."""

    start: int = 0
    end: int = 5
    penalties_s: Mapping[str, float] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()


def capacities(view: SwarmView, asked: Question) -> dict[str, Fraction]:
    """Block-tokens a second of each server that may be used, from the definition."""
    found = {}
    for server in view.servers:
        penalty_s = asked.penalties_s.get(server.peer, 0.0)
        if server.is_serving and server.peer not in asked.excluded and penalty_s < math.inf:
            said = server.announcement
            span_ms = Fraction(said.prefill_ms) or Fraction(said.step_ms) / Fraction(
                PREFILL_SPEED_UP
            )
            token_s = span_ms / 1000 / (server.end - server.start) + Fraction(penalty_s)
            found[server.peer] = 1 / token_s
    return found


def can_give_each_block(view: SwarmView, asked: Question, tokens_per_s: Fraction) -> bool:
    """Whether servers can do so much for every block at once: a maximal flow, by Edmonds-Karp."""
    capacity = capacities(view, asked)
    room: dict[object, dict[object, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
    for server in view.servers:
        if server.peer in capacity:
            room["from"][server.peer] = capacity[server.peer]
            for block in range(max(server.start, asked.start), min(server.end, asked.end)):
                room[server.peer][block] = capacity[server.peer]
    for block in range(asked.start, asked.end):
        room[block]["to"] = tokens_per_s
    total = Fraction(0)
    while True:
        came_from: dict[object, object] = {"from": None}
        queue = deque(["from"])
        while queue and "to" not in came_from:
            at = queue.popleft()
            for there, left in list(room[at].items()):
                if left > 0 and there not in came_from:
                    came_from[there] = at
                    queue.append(there)
        if "to" not in came_from:
            return total == tokens_per_s * (asked.end - asked.start)
        path = ["to"]
        while came_from[path[-1]] is not None:
            path.append(came_from[path[-1]])
        steps = list(itertools.pairwise(reversed(path)))
        amount = min(room[one][other] for one, other in steps)
        for one, other in steps:
            room[one][other] -= amount
            room[other][one] += amount
        total += amount


def widest_chain(view: SwarmView, asked: Question) -> Fraction:
    """The most that one chain can carry, over every choice of a server for each block."""
    capacity = capacities(view, asked)

    def holders(block: int) -> Iterator[str]:
        for server in view.servers:
            if server.start <= block < server.end and server.peer in capacity:
                yield server.peer

    return max(
        min(capacity[peer] / chain.count(peer) for peer in chain)
        for chain in itertools.product(*map(holders, range(asked.start, asked.end)))
    )


def total_of(chains: tuple[ChainShare, ...]) -> Fraction:
    return sum((Fraction(chain.tokens_per_s) for chain in chains), Fraction(0))


def loads(chains: tuple[ChainShare, ...]) -> dict[str, Fraction]:
    """Block-tokens a second that are asked of each server."""
    found: dict[str, Fraction] = defaultdict(Fraction)
    for chain in chains:
        for hop in chain.hops:
            found[hop.peer] += Fraction(chain.tokens_per_s) * (hop.end - hop.start)
    return found


def check_promise(view: SwarmView, asked: Question, chains: tuple[ChainShare, ...]) -> None:
    """Every chain is one, and nobody is asked for more than it can do."""
    servers = {server.peer: server for server in view.servers}
    for chain in chains:
        assert chain.tokens_per_s > 0
        borders = [chain.hops[0].start, *(hop.end for hop in chain.hops)]
        assert (borders[0], borders[-1]) == (asked.start, asked.end)
        assert [hop.start for hop in chain.hops] == borders[:-1]
        assert all(one.peer != other.peer for one, other in itertools.pairwise(chain.hops))
        for hop in chain.hops:
            server = servers[hop.peer]
            assert server.start <= hop.start < hop.end <= server.end
            assert hop.addresses == server.announcement.addresses
    shares = [chain.tokens_per_s for chain in chains]
    assert shares == sorted(shares, reverse=True)
    capacity = capacities(view, asked)
    for peer, load in loads(chains).items():
        assert load <= capacity[peer]


def spans(chain: ChainShare) -> list[tuple[str, int, int]]:
    return [(hop.peer, hop.start, hop.end) for hop in chain.hops]


PEERS = "abcdef"

small_servers = st.builds(
    lambda peer, start, length, step_ms, prefill_ms, state: make_server(
        peer, start, min(start + length, 5), step_ms=step_ms, prefill_ms=prefill_ms, state=state
    ),
    st.sampled_from(PEERS),
    st.integers(0, 4),
    st.integers(1, 5),
    st.sampled_from([1.0, 5.0, 7.0, 20.0, 1e6]),
    st.sampled_from([0.0, 0.0, 0.001, 0.3, 2.0]),
    st.sampled_from([ServerState.SERVING] * 5 + [ServerState.LEAVING]),
)
small_swarms = st.lists(small_servers, max_size=6, unique_by=lambda server: server.peer)
whole_swarms = small_swarms.map(lambda servers: [*servers, make_server("z", 0, 5, step_ms=50.0)])
questions = st.builds(
    Question,
    start=st.integers(0, 2),
    end=st.integers(3, 5),
    penalties_s=st.dictionaries(
        st.sampled_from(PEERS), st.sampled_from([0.001, 1.0, math.inf]), max_size=3
    ),
    excluded=st.frozensets(st.sampled_from(PEERS), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(small_swarms, questions)
def test_the_split_is_optimal(servers: list[Server], asked: Question) -> None:
    view = make_swarm(*servers, blocks=5)
    held = {
        block
        for server in view.servers
        if server.peer in capacities(view, asked)
        for block in range(server.start, server.end)
    }
    if not held.issuperset(range(asked.start, asked.end)):
        with pytest.raises(MissingBlocks):
            choose_parallel_chains(view, max_chains=MANY, **vars(asked))
        return
    chains = choose_parallel_chains(view, max_chains=MANY, **vars(asked))
    check_promise(view, asked, chains)
    more = total_of(chains) * (1 + 2 * Fraction(TOLERANCE))
    assert not can_give_each_block(view, asked, more)


@settings(max_examples=200, deadline=None)
@given(whole_swarms, questions, st.integers(1, 4))
def test_a_split_over_few_chains_promises_no_more_than_can_be(
    servers: list[Server], asked: Question, max_chains: int
) -> None:
    view = make_swarm(*servers, blocks=5)
    chains = choose_parallel_chains(view, max_chains=max_chains, **vars(asked))
    assert 1 <= len(chains) <= max_chains
    check_promise(view, asked, chains)
    assert can_give_each_block(view, asked, total_of(chains))


@settings(max_examples=200, deadline=None)
@given(whole_swarms, questions, st.integers(1, 4))
def test_no_chain_could_be_wider_beside_the_others(
    servers: list[Server], asked: Question, max_chains: int
) -> None:
    view = make_swarm(*servers, blocks=5)
    chains = choose_parallel_chains(view, max_chains=max_chains, **vars(asked))
    capacity, load = capacities(view, asked), loads(chains)
    spent = {peer for peer in load if load[peer] > capacity[peer] * (1 - Fraction(TOLERANCE))}
    more = total_of(chains) * (1 + 2 * Fraction(TOLERANCE))
    assert not can_give_each_block(view, asked, more) or all(
        spent & {hop.peer for hop in chain.hops} for chain in chains
    )


@settings(max_examples=100, deadline=None)
@given(whole_swarms, questions)
def test_one_chain_alone_is_the_widest(servers: list[Server], asked: Question) -> None:
    view = make_swarm(*servers, blocks=5)
    (chain,) = choose_parallel_chains(view, max_chains=1, **vars(asked))
    check_promise(view, asked, (chain,))
    assert Fraction(chain.tokens_per_s) >= widest_chain(view, asked) * (1 - Fraction(1, 4000))


@settings(max_examples=100, deadline=None)
@given(whole_swarms, small_servers)
def test_one_more_server_never_makes_it_worse(servers: list[Server], other: Server) -> None:
    without = choose_parallel_chains(make_swarm(*servers, blocks=5), max_chains=MANY)
    slow = replace(other, peer="y")
    chains = choose_parallel_chains(make_swarm(*servers, slow, blocks=5), max_chains=MANY)
    assert total_of(chains) >= total_of(without) * (1 - Fraction(TOLERANCE))


@settings(max_examples=100, deadline=None)
@given(small_swarms, questions)
def test_missing_blocks_are_those_that_a_single_chain_misses(
    servers: list[Server], asked: Question
) -> None:
    view = make_swarm(*servers, blocks=5)

    def missing(choose: Callable[[], object]) -> tuple[str, object]:
        try:
            choose()
        except MissingBlocks as error:
            return str(error), error.ranges
        return "", None

    assert missing(lambda: choose_parallel_chains(view, **vars(asked))) == missing(
        lambda: choose_chain(view, needed_tokens=0, **vars(asked))
    )


@settings(max_examples=50, deadline=None)
@given(whole_swarms, st.randoms(use_true_random=False), st.integers(1, 4))
def test_the_order_of_the_view_does_not_matter(
    servers: list[Server], rng: random.Random, max_chains: int
) -> None:
    chains = choose_parallel_chains(make_swarm(*servers, blocks=5), max_chains=max_chains)
    rng.shuffle(servers)
    assert choose_parallel_chains(make_swarm(*servers, blocks=5), max_chains=max_chains) == chains


def test_whole_servers_work_side_by_side() -> None:
    view = make_swarm(make_server("a", 0, 6, prefill_ms=1.0), make_server("b", 0, 6, prefill_ms=4))
    quick, slow = choose_parallel_chains(view)
    assert (spans(quick), spans(slow)) == ([("a", 0, 6)], [("b", 0, 6)])
    assert quick.tokens_per_s == pytest.approx(1000)
    assert slow.tokens_per_s == pytest.approx(250)


def test_whole_servers_work_one_after_the_other_where_one_chain_is_allowed() -> None:
    view = make_swarm(make_server("a", 0, 6, prefill_ms=3.0), make_server("b", 0, 6, prefill_ms=6))
    (chain,) = choose_parallel_chains(view, max_chains=1)
    assert {peer: end - start for peer, start, end in spans(chain)} == {"a": 4, "b": 2}
    assert chain.tokens_per_s == pytest.approx(500)


def test_chains_of_like_spans_have_a_hop_for_each() -> None:
    view = make_swarm(*(make_server(f"{n}", n // 4 * 2, n // 4 * 2 + 2) for n in range(12)))
    chains = choose_parallel_chains(view)
    assert [len(chain.hops) for chain in chains] == [3] * 4
    assert sum(chain.tokens_per_s for chain in chains) == pytest.approx(4 * 400)


def orders_tried(monkeypatch: pytest.MonkeyPatch, *servers: Server) -> list[block_flow.Order]:
    """How servers were taken for the split of a swarm of three blocks, which must be optimal."""
    tried = []

    def assign_in_order(*args: Any) -> Any:
        tried.append(args[4])
        return plain(*args)

    plain = block_flow._assign_in_order
    monkeypatch.setattr(block_flow, "_assign_in_order", assign_in_order)
    view, asked = make_swarm(*servers, blocks=3), Question(end=3)
    chains = choose_parallel_chains(view, max_chains=MANY)
    check_promise(view, asked, chains)
    assert not can_give_each_block(view, asked, total_of(chains) * (1 + 2 * Fraction(TOLERANCE)))
    return tried


ORDERS = list(block_flow.Order)


def test_servers_go_on_where_the_throughput_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [make_server("a", 0, 2, prefill_ms=4.0), make_server("b", 2, 3, prefill_ms=3.0)]
    assert orders_tried(monkeypatch, *servers) == ORDERS[:1]


def test_servers_that_end_first_come_first_where_the_throughput_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers = [make_server("a", 0, 3, prefill_ms=6.0), make_server("b", 0, 1, prefill_ms=2.0)]
    assert orders_tried(monkeypatch, *servers) == ORDERS[:2]


def test_servers_are_spent_one_by_one_where_an_even_pace_gives_too_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers = [
        make_server("a", 1, 2, prefill_ms=1.0),
        make_server("b", 0, 3, prefill_ms=5.0),
        make_server("c", 0, 2, prefill_ms=2.0),
    ]
    assert orders_tried(monkeypatch, *servers) == ORDERS


@settings(max_examples=100, deadline=None)
@given(whole_swarms, questions, st.integers(1, 4), st.floats(0.01, 2.0))
def test_no_more_is_split_than_the_caller_can_send(
    servers: list[Server], asked: Question, max_chains: int, part: float
) -> None:
    view = make_swarm(*servers, blocks=5)
    kept = total_of(choose_parallel_chains(view, max_chains=1, **vars(asked)))
    most = float(kept) * part
    chains = choose_parallel_chains(
        view, max_chains=max_chains, max_tokens_per_s=most, **vars(asked)
    )
    check_promise(view, asked, chains)
    assert len(chains) <= max_chains
    assert total_of(chains) <= Fraction(most) * (1 + Fraction(TOLERANCE))
    alone = choose_parallel_chains(view, max_chains=1, max_tokens_per_s=most, **vars(asked))
    assert total_of(alone) == pytest.approx(min(float(kept), most), rel=1 / 2000)


def test_chains_have_fewer_hops_where_less_is_sent() -> None:
    view = make_swarm(*(make_server(f"{n}", n % 3 * 2, n % 3 * 2 + 2) for n in range(12)))
    (all_of_it,) = choose_parallel_chains(view, max_chains=1)
    (little,) = choose_parallel_chains(view, max_chains=1, max_tokens_per_s=100.0)
    assert len(all_of_it.hops) == 6
    assert len(little.hops) == 3
    assert little.tokens_per_s == pytest.approx(100.0)


def test_the_speed_is_that_of_a_prefill_or_else_guessed_from_a_step() -> None:
    (known,) = choose_parallel_chains(make_swarm(make_server("a", 0, 6, prefill_ms=2.0)))
    (guessed,) = choose_parallel_chains(make_swarm(make_server("a", 0, 6, step_ms=2.0)))
    assert known.tokens_per_s == pytest.approx(500)
    assert guessed.tokens_per_s == pytest.approx(500 * PREFILL_SPEED_UP)


def test_servers_out_of_the_range_take_no_part() -> None:
    view = make_swarm(make_server("a", 0, 3), make_server("b", 2, 5), make_server("c", 5, 6))
    (chain,) = choose_parallel_chains(view, start=3, end=5)
    assert spans(chain) == [("b", 3, 5)]


def test_leaving_excluded_and_barred_servers_are_not_used() -> None:
    view = make_swarm(
        make_server("gone", 0, 6, state=ServerState.LEAVING),
        make_server("out", 0, 6),
        make_server("barred", 0, 6),
        make_server("z", 0, 6, step_ms=1000),
    )
    (chain,) = choose_parallel_chains(view, penalties_s={"barred": math.inf}, excluded={"out"})
    assert spans(chain) == [("z", 0, 6)]


def test_a_penalised_server_counts_for_less() -> None:
    view = make_swarm(make_server("a", 0, 6, prefill_ms=6.0), make_server("b", 0, 6, prefill_ms=6))
    first, last = choose_parallel_chains(view, penalties_s={"a": 0.009})
    assert (spans(first), spans(last)) == ([("b", 0, 6)], [("a", 0, 6)])
    assert last.tokens_per_s == pytest.approx(first.tokens_per_s / 10)


def test_a_server_that_is_needed_is_used_in_spite_of_its_penalty() -> None:
    view = make_swarm(make_server("a", 0, 6, prefill_ms=6.0))
    (chain,) = choose_parallel_chains(view, penalties_s={"a": 1e200})
    assert spans(chain) == [("a", 0, 6)]
    assert chain.tokens_per_s > 0


def test_a_server_that_claims_no_time_at_all_is_finite() -> None:
    view = make_swarm(make_server("a", 0, 5, step_ms=0.0), make_server("b", 4, 6, step_ms=1e6))
    chains = choose_parallel_chains(view)
    assert sum(chain.tokens_per_s for chain in chains) == pytest.approx(8e-3, rel=1e-7)


def test_missing_blocks_are_named() -> None:
    view = make_swarm(make_server("a", 0, 2), make_server("b", 3, 5))
    with pytest.raises(MissingBlocks, match=r"2:3, 5:6") as caught:
        choose_parallel_chains(view)
    assert caught.value.ranges == ((2, 3), (5, 6))


@pytest.mark.parametrize(
    "asked", [{"start": 3, "end": 3}, {"end": 7}, {"max_chains": 0}, {"max_tokens_per_s": 0}]
)
def test_what_cannot_be_asked_is_an_error(asked: Mapping[str, int]) -> None:
    with pytest.raises(ValueError, match=r"no part of a model|at least one chain"):
        choose_parallel_chains(make_swarm(make_server("a", 0, 6)), **asked)


@pytest.mark.parametrize("max_chains", [1, 8, 40])
def test_a_large_swarm_is_not_overloaded(max_chains: int) -> None:
    rng = random.Random(2)
    servers = []
    for number in range(1000):
        start = rng.randrange(126 - 4)
        end = min(126, start + rng.randint(4, 40))
        step_ms = (end - start) * rng.uniform(0.1, 2.0)
        servers.append(make_server(f"{number}", start, end, step_ms=step_ms))
    view, asked = make_swarm(*servers, blocks=126), Question(end=126)
    chains = choose_parallel_chains(view, max_chains=max_chains)
    assert len(chains) <= max_chains
    check_promise(view, asked, chains)

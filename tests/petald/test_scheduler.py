"""The next batch: order of kinds, what shares a batch, and that nothing and nobody starves."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petald.scheduler import PATIENCE, Priority, Scheduler, Work


def make_scheduler(max_batch_tokens: int = 8) -> Scheduler[str]:
    return Scheduler(max_batch_tokens=max_batch_tokens)


def test_decode_comes_before_prefill() -> None:
    scheduler = make_scheduler()
    scheduler.add(Work("prefill", Priority.PREFILL))
    scheduler.add(Work("decode", Priority.DECODE))
    assert [work.item for work in scheduler.next_batch()] == ["decode"]
    assert [work.item for work in scheduler.next_batch()] == ["prefill"]
    assert scheduler.next_batch() == []


def test_equal_keys_share_a_batch_up_to_its_size() -> None:
    scheduler = make_scheduler(max_batch_tokens=3)
    for name, key in [("a", 1), ("x", 2), ("b", 1), ("c", 1), ("d", 1)]:
        scheduler.add(Work(name, Priority.DECODE, 1, key))
    assert [work.item for work in scheduler.next_batch()] == ["a", "b", "c"]
    assert [work.item for work in scheduler.next_batch()] == ["x"]
    assert [work.item for work in scheduler.next_batch()] == ["d"]


def test_work_without_a_key_never_shares() -> None:
    scheduler = make_scheduler()
    scheduler.add(Work("a", Priority.DECODE))
    scheduler.add(Work("b", Priority.DECODE))
    assert len(scheduler.next_batch()) == 1


def test_prefill_is_not_starved_by_decode() -> None:
    scheduler = make_scheduler()
    scheduler.add(Work("prefill", Priority.PREFILL))
    taken = []
    for _ in range(PATIENCE + 1):
        scheduler.add(Work("decode", Priority.DECODE))
        taken += [work.item for work in scheduler.next_batch()]
    assert taken == ["decode"] * PATIENCE + ["prefill"]


def test_removed_work_is_not_given() -> None:
    scheduler = make_scheduler()
    work = Work("a", Priority.DECODE)
    scheduler.add(work)
    assert scheduler.remove(work)
    assert not scheduler.remove(work)
    assert scheduler.next_batch() == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(Priority)), st.integers(1, 5), st.sampled_from([None, 1, 2])
        ),
        max_size=40,
    )
)
def test_everything_is_given_once_and_in_order_of_its_kind_and_key(
    pieces: list[tuple[Priority, int, object]],
) -> None:
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=6)
    for index, (priority, tokens, key) in enumerate(pieces):
        scheduler.add(Work(index, priority, tokens, key))
    given_items: list[int] = []
    while batch := scheduler.next_batch():
        assert len({(work.priority, work.batch_key) for work in batch}) == 1
        assert len(batch) == 1 or sum(work.tokens for work in batch) <= 6
        given_items += [work.item for work in batch]
    assert sorted(given_items) == list(range(len(pieces)))
    for priority in Priority:
        unkeyed = [i for i in given_items if pieces[i][0] == priority and pieces[i][2] is None]
        assert unkeyed == sorted(unkeyed)


MAX_TOKENS = 8
peers = st.sampled_from("abcd")
keys = st.sampled_from([None, 1, 2])
sizes = st.integers(1, 12)  # also pieces larger than a batch


def test_a_peer_that_queued_a_thousand_prefills_delays_another_by_one_batch_at_most() -> None:
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=64)
    for index in range(1000):
        scheduler.add(Work(index, Priority.PREFILL, 32, "key", "greedy"))
    for _ in range(10):
        assert [work.peer for work in scheduler.next_batch()] == ["greedy"] * 2
    scheduler.add(Work(-1, Priority.PREFILL, 32, "key", "modest"))
    scheduler.add(Work(-2, Priority.DECODE, 1, "key", "modest"))
    assert [work.item for work in scheduler.next_batch()] == [-2]
    assert [work.item for work in scheduler.next_batch()] == [-1, 20]
    assert [work.item for work in scheduler.next_batch()] == [21, 22]


def test_what_a_peer_sends_while_its_last_batch_runs_does_not_go_before_others() -> None:
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=MAX_TOKENS)
    scheduler.add(Work(0, Priority.PREFILL, 8, None, "patient"))
    scheduler.add(Work(1, Priority.PREFILL, 8, None, "patient"))
    order = ""
    for index in itertools.count(2):
        scheduler.add(Work(index, Priority.PREFILL, 8, None, "closed loop"))
        order += scheduler.next_batch()[0].peer[0]
        if order.count("p") == 2:
            break
    assert order in {"pcp", "cpcp"}


def test_a_peer_that_idled_earned_nothing() -> None:
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=MAX_TOKENS)
    for index in range(100):
        scheduler.add(Work(index, Priority.DECODE, 4, 1, "busy"))
    scheduler.add(Work(-1, Priority.DECODE, 4, 1, "idle"))
    for _ in range(20):
        scheduler.next_batch()
    for index in range(100):
        scheduler.add(Work(index, Priority.DECODE, 4, 1, "idle"))
    served = Counter(work.peer for _ in range(10) for work in scheduler.next_batch())
    assert served["idle"] <= 11


def test_ever_new_peers_do_not_starve_one_that_waits() -> None:
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=MAX_TOKENS)
    served = 0
    for index in range(8):
        scheduler.add(Work(index, Priority.PREFILL, 8, None, "waits"))
    for index in range(100):
        scheduler.add(Work(index, Priority.PREFILL, 8, None, f"new {index}"))
        scheduler.add(Work(index, Priority.PREFILL, 8, None, f"newer {index}"))
        served += scheduler.next_batch()[0].peer == "waits"
    assert served >= 3  # as many wait as have come, so that everybody's share falls


def test_a_peer_cannot_join_others_batches_without_end() -> None:
    """Where others have a key of their own, free room in a batch is not free to them."""
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=MAX_TOKENS)
    served: Counter[str] = Counter()
    for index in range(1000):
        scheduler.add(Work(index, Priority.PREFILL, 1, 1, "joiner"))
        scheduler.add(Work(index, Priority.PREFILL, 1, 2, "other"))
    for index in range(150):
        scheduler.add(Work(index, Priority.PREFILL, 1, 1, "opener"))
        for work in scheduler.next_batch():
            served[work.peer] += work.tokens
        assert abs(served["joiner"] - served["other"]) <= MAX_TOKENS + 1
    assert served["opener"] > 30


def test_a_peer_that_asks_again_and_again_gets_no_more_than_one_that_waits() -> None:
    """Also where the first has nothing queued in between, and so has left the queue."""
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=MAX_TOKENS)
    served: Counter[str] = Counter()
    for index in range(1000):
        scheduler.add(Work(index, Priority.PREFILL, 1, None, "waits"))
    is_queued = False
    for index in range(500):
        if not is_queued:
            scheduler.add(Work(index, Priority.PREFILL, 8, None, "asks"))
        (work,) = scheduler.next_batch()
        is_queued = work.peer != "asks"
        served[work.peer] += work.tokens
        assert abs(served["asks"] - served["waits"]) <= MAX_TOKENS + 8


def test_a_peer_with_little_to_do_does_not_shrink_the_batches_of_one_with_much() -> None:
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=64)
    for index in range(2000):
        scheduler.add(Work(index, Priority.DECODE, 1, 1, "much"))
    for index in range(20):
        scheduler.add(Work(index, Priority.DECODE, 1, 1, "little"))
        batch = scheduler.next_batch()
        assert len(batch) == 64
        assert sum(work.peer == "little" for work in batch) == 1


def test_state_of_peers_that_left_is_forgotten() -> None:
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=MAX_TOKENS)
    line = scheduler._lines[Priority.DECODE]
    for index in range(2000):
        scheduler.add(Work(index, Priority.DECODE, 4, index % 3, "stays"))
    for index in range(500):
        scheduler.add(Work(index, Priority.DECODE, 2, index % 3, f"passes {index}"))
        cancelled = Work(index, Priority.DECODE, 2, 0, f"passes {index // 2}")
        scheduler.add(cancelled)
        scheduler.remove(cancelled)
        scheduler.next_batch()
        assert len(line._ahead) <= len(line._expiry) <= 4 * MAX_TOKENS
    while scheduler.next_batch():
        pass
    assert not line._flows
    scheduler.add(Work(0, Priority.DECODE))
    assert not line._ahead
    assert not line._expiry


def test_cancelling_again_and_again_leaves_nothing_behind() -> None:
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=MAX_TOKENS)
    line = scheduler._lines[Priority.DECODE]
    scheduler.add(Work(0, Priority.DECODE, 8, 1, "stays"))
    scheduler.add(Work(0, Priority.DECODE, 8, 2, "served"))
    scheduler.add(Work(0, Priority.DECODE, 8, 1, "stays"))
    scheduler.next_batch()
    scheduler.next_batch()
    for _ in range(100):
        work = Work(0, Priority.DECODE, 1, 1, "served")
        scheduler.add(work)
        assert scheduler.remove(work)
    assert len(line._expiry) <= 2


def test_a_batch_does_not_walk_over_all_that_a_peer_queued() -> None:
    hashed = 0

    class Key:
        def __hash__(self) -> int:
            nonlocal hashed
            hashed += 1
            return 1

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Key)

    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=4)
    works = [Work(i, Priority.PREFILL, 1, (Key() if i else None), "greedy") for i in range(5000)]
    for work in works:
        scheduler.add(work)
    hashed = 0
    assert [work.item for work in scheduler.next_batch()] == [0]
    assert [work.item for work in scheduler.next_batch()] == [1, 2, 3, 4]
    assert scheduler.remove(works[4000])
    assert hashed < 50


@given(st.lists(st.tuples(peers, st.sampled_from(list(Priority)), sizes, keys), max_size=60))
def test_nothing_is_lost_and_each_peers_work_keeps_its_order(
    pieces: list[tuple[str, Priority, int, int | None]],
) -> None:
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=MAX_TOKENS)
    for index, (peer, priority, tokens, key) in enumerate(pieces):
        scheduler.add(Work(index, priority, tokens, key, peer))
    taken: list[Work[int]] = []
    while batch := scheduler.next_batch():
        assert len({(work.priority, work.batch_key) for work in batch}) == 1
        assert len(batch) == 1 or sum(work.tokens for work in batch) <= MAX_TOKENS
        assert len(batch) == 1 or batch[0].batch_key is not None
        taken += batch
        rest = Counter[Priority]()
        for index in set(range(len(pieces))) - {work.item for work in taken}:
            rest[pieces[index][1]] += pieces[index][2]
        assert all(scheduler.queued_tokens(kind) == rest[kind] for kind in Priority)
    assert sorted(work.item for work in taken) == list(range(len(pieces)))
    assert len(scheduler) == 0
    orders: dict[object, list[int]] = {}
    for work in taken:
        orders.setdefault((work.peer, work.priority, work.batch_key), []).append(work.item)
    assert all(order == sorted(order) for order in orders.values())


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), peers, sizes, keys),
            st.tuples(st.just("remove"), st.integers(0, 100)),
            st.tuples(st.just("take")),
        ),
        max_size=80,
    )
)
@settings(max_examples=300)
def test_additions_and_removals_in_between_lose_nothing_and_nobody_lags(
    actions: list[tuple[str] | tuple[str, int] | tuple[str, str, int, int | None]],
) -> None:
    """Also the invariant of the module: who waits is no further apart than a batch and a piece."""
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=MAX_TOKENS)
    line = scheduler._lines[Priority.PREFILL]
    queued: list[Work[int]] = []
    clock = 0
    for index, action in enumerate(actions):
        if len(action) == 4:
            queued.append(Work(index, Priority.PREFILL, action[2], action[3], action[1]))
            scheduler.add(queued[-1])
        elif len(action) == 2 and queued:
            work = queued.pop(action[1] % len(queued))
            assert scheduler.remove(work)
            assert not scheduler.remove(work)
        elif len(action) == 1:
            batch = scheduler.next_batch()
            assert bool(batch) == bool(queued)
            for work in batch:
                queued.remove(work)
        assert len(scheduler) == len(queued)
        assert scheduler.queued_tokens(Priority.PREFILL) == sum(work.tokens for work in queued)
        assert set(line._flows) == {work.peer for work in queued}
        starts = [flow.start for flow in line._flows.values()] or [0]
        assert max(starts) - min(starts) <= MAX_TOKENS + 12
        assert clock <= line._clock
        clock = line._clock


@pytest.mark.parametrize("with_others", [False, True])
@given(data=st.data())
def test_peers_that_wait_together_are_served_alike(data: st.DataObject, with_others: bool) -> None:
    """Others come and go; of those that began together, none gets a batch and a piece more."""
    scheduler: Scheduler[int] = Scheduler(max_batch_tokens=MAX_TOKENS)
    piece = st.tuples(sizes, keys)
    waiting: Counter[str] = Counter()
    for peer in "abc":
        for tokens, key in data.draw(st.lists(piece, min_size=1, max_size=30)):
            scheduler.add(Work(0, Priority.PREFILL, tokens, key, peer))
            waiting[peer] += 1
    served = dict.fromkeys("abc", 0)
    while all(waiting[peer] for peer in "abc"):
        if with_others:
            for peer, (tokens, key) in data.draw(
                st.lists(st.tuples(st.sampled_from("wxyz"), piece), max_size=2)
            ):
                scheduler.add(Work(0, Priority.PREFILL, tokens, key, peer))
        for work in scheduler.next_batch():
            if work.peer in served:
                served[work.peer] += work.tokens
                waiting[work.peer] -= 1
        assert max(served.values()) - min(served.values()) <= MAX_TOKENS + 12

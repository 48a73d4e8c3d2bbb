"""The next batch: order of kinds, what shares a batch, and that nothing starves."""

from hypothesis import given
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

"""A share of a device: on a virtual clock against its bounds, and on a real thread."""

from __future__ import annotations

import functools
import threading
import time

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from petald.duty_cycle import DECODE_DEBT_S, LONGEST_STRETCH_S, DutyCycle
from petald.executor import ExecutorClosed, open_executor
from petald.scheduler import Priority


@given(
    st.floats(0.05, 0.99),
    st.lists(st.tuples(st.floats(0.001, 2), st.booleans(), st.floats(0, 3)), max_size=80),
)
def test_no_stretch_of_time_has_more_than_the_share(
    share: float, works: list[tuple[float, bool, float]]
) -> None:
    duty = DutyCycle(share)
    now = 1000.0
    spans: list[tuple[float, float]] = []
    for compute_s, is_decode, idle_s in works:
        now += idle_s
        now += duty.rest_s(now, is_decode=is_decode)
        spans.append((now, now + compute_s))
        now += compute_s
        duty.on_computed(*spans[-1])
    longest_s = max((end - start for start, end in spans), default=0.0)
    for index, (first, _) in enumerate(spans):
        computed_s = 0.0
        for start, end in spans[index:]:
            computed_s += end - start
            assert computed_s <= share * (end - first + DECODE_DEBT_S) + longest_s + 1e-6


def test_a_lone_session_hardly_waits_and_a_decode_step_not_for_a_prefill() -> None:
    duty = DutyCycle(0.5)
    now = 0.0
    for _ in range(1000):  # steps of 30 ms, with 30 ms at the other hops between
        assert duty.rest_s(now, is_decode=True) == 0
        duty.on_computed(now, now + 0.03)
        now += 0.06
    duty.on_computed(now, now + 0.3)  # a prefill
    now += 0.3
    assert duty.rest_s(now, is_decode=False) == pytest.approx(0.3)
    assert duty.rest_s(now, is_decode=True) == 0


async def test_peers_get_their_share_of_a_thread_and_own_work_all_of_it() -> None:
    share = 0.25
    began_at = time.perf_counter()
    async with open_executor(name="test", share=share) as executor:
        work = functools.partial(
            executor.run, time.sleep, 0.01, priority=Priority.PREFILL, peer="someone"
        )

        async def ask() -> None:
            for _ in range(5):
                await work()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
        took_s = time.perf_counter() - began_at
        assert executor.rests >= 9
        assert executor.computed_s >= 0.1
        # The last piece's rest is still to come.
        assert took_s >= 9 * 0.01 / share
        # A long rest is due; the daemon's own work does not wait for it.
        await executor.run(time.sleep, 0.5, priority=Priority.PREFILL, peer="someone")
        rests = executor.rests
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(10):
                assert await executor.run(lambda: 5) == 5
            assert executor.queued == 1
            nursery.cancel_scope.cancel()
        assert executor.queued == 0
        assert executor.rests <= rests + 1


async def test_without_a_limit_nobody_rests() -> None:
    async with open_executor(name="test") as executor:
        for _ in range(5):
            await executor.run(time.sleep, 0.001, peer="someone")
        assert executor.rests == 0
        assert executor.computed_s > 0


async def test_a_long_pass_makes_way_for_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_executor(name="test", share=0.5) as executor:
        has_begun, may_end = threading.Event(), threading.Event()
        wanted: list[bool] = []

        def work() -> None:
            wanted.append(executor.is_wanted_before(Priority.BACKWARD))
            has_begun.set()
            may_end.wait(5)
            real = time.perf_counter
            monkeypatch.setattr(
                "petald.executor.time.perf_counter", lambda: real() + LONGEST_STRETCH_S
            )
            wanted.append(executor.is_wanted_before(Priority.BACKWARD))

        may_end.set()
        await executor.run(work, priority=Priority.BACKWARD, peer="someone")
        assert wanted == [False, True]


async def test_the_device_is_waited_for_before_a_rest() -> None:
    waits: list[str] = []
    async with open_executor(
        name="test", share=0.5, synchronise=lambda: waits.append(threading.current_thread().name)
    ) as executor:
        await executor.run(int, peer="someone")
    assert waits == ["petald-test"]


async def test_a_closed_executor_ends_in_the_midst_of_a_rest() -> None:
    failed: list[str] = []
    async with (
        trio.open_nursery() as nursery,
        open_executor(name="test", share=0.01) as executor,
    ):

        async def ask() -> None:
            try:
                await executor.run(int, priority=Priority.PREFILL, peer="someone")
            except ExecutorClosed as error:
                failed.append(type(error).__name__)

        await executor.run(time.sleep, 0.1, priority=Priority.PREFILL, peer="someone")
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
    assert failed == ["ExecutorClosed"]

"""The device's thread: batching, blame, and cancellation that leaves nothing running."""

import functools
import threading
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from petald.executor import (
    MEAN_TIME_S,
    MEAN_WEIGHT,
    Executor,
    ExecutorClosed,
    open_executor,
)
from petald.scheduler import Priority


class Gate:
    """A kernel that waits until it is let go."""

    def __init__(self) -> None:
        self.has_started = threading.Event()
        self.may_end = threading.Event()
        self.has_ended = False

    def __call__(self) -> str:
        self.has_started.set()
        assert self.may_end.wait(10)
        self.has_ended = True
        return "done"


async def run_item(executor: Executor, item: int, out: dict[int, object], batch: object) -> None:
    try:
        timed = await executor.run_batched(
            batch,  # type: ignore[arg-type]
            item,
            priority=Priority.DECODE,
            tokens=1,
            batch_key="same",
        )
        out[item] = timed.value
    except ValueError as error:
        out[item] = error


async def test_a_function_runs_on_the_thread() -> None:
    async with open_executor(name="test") as executor:
        name = await executor.run(lambda: threading.current_thread().name)
    assert name == "petald-test"


async def test_an_error_reaches_its_caller_and_the_thread_goes_on() -> None:
    async with open_executor(name="test") as executor:
        with pytest.raises(ZeroDivisionError):
            await executor.run(lambda: 1 / 0)
        assert await executor.run(lambda: 5) == 5


async def test_waiting_steps_form_one_batch() -> None:
    sizes = []

    def double(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        return [item * 2 for item in items]

    gate = Gate()
    out: dict[int, object] = {}
    async with open_executor(name="test") as executor, trio.open_nursery() as nursery:
        nursery.start_soon(executor.run, gate)
        await trio.to_thread.run_sync(gate.has_started.wait)
        for item in range(5):
            nursery.start_soon(run_item, executor, item, out, double)
        await trio.testing.wait_all_tasks_blocked()
        assert executor.queued == 5
        gate.may_end.set()
    assert out == {item: item * 2 for item in range(5)}
    assert sizes == [5]


async def test_a_bad_item_does_not_fail_the_others_of_its_batch() -> None:
    def refuse_three(items: Sequence[int]) -> Sequence[int]:
        if 3 in items:
            raise ValueError("three")
        return items

    gate = Gate()
    out: dict[int, object] = {}
    async with open_executor(name="test") as executor, trio.open_nursery() as nursery:
        nursery.start_soon(executor.run, gate)
        await trio.to_thread.run_sync(gate.has_started.wait)
        for item in range(5):
            nursery.start_soon(run_item, executor, item, out, refuse_three)
        await trio.testing.wait_all_tasks_blocked()
        gate.may_end.set()
    assert isinstance(out.pop(3), ValueError)
    assert out == {0: 0, 1: 1, 2: 2, 4: 4}


async def test_cancelled_work_that_waits_never_runs() -> None:
    gate, second = Gate(), Gate()
    async with open_executor(name="test") as executor, trio.open_nursery() as nursery:
        nursery.start_soon(executor.run, gate)
        await trio.to_thread.run_sync(gate.has_started.wait)
        with trio.move_on_after(0.01):
            await executor.run(second)
        gate.may_end.set()
    assert not second.has_started.is_set()


async def test_cancelled_work_that_runs_has_ended_before_the_caller_goes_on() -> None:
    gate = Gate()
    async with open_executor(name="test") as executor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.run, gate)
            await trio.to_thread.run_sync(gate.has_started.wait)
            threading.Timer(0.05, gate.may_end.set).start()
            nursery.cancel_scope.cancel()
        assert gate.has_ended


async def test_two_peers_work_interleaves() -> None:
    order: list[str] = []

    def note(items: Sequence[str]) -> Sequence[str]:
        order.extend(items)
        return items

    async def ask(peer: str) -> None:
        await executor.run_batched(
            note, peer, priority=Priority.PREFILL, tokens=8, batch_key="same", peer=peer
        )

    gate = Gate()
    async with open_executor(name="test", max_batch_tokens=8) as executor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.run, gate)
            await trio.to_thread.run_sync(gate.has_started.wait)
            for peer, count in (("greedy", 20), ("modest", 3)):
                for _ in range(count):
                    nursery.start_soon(ask, peer)
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(functools.partial(executor.run, order.append, "called", peer="rare"))
            await trio.testing.wait_all_tasks_blocked()
            assert executor.queued_tokens == 23 * 8 + 1
            assert executor.queued_tokens_of(Priority.PREFILL) == 23 * 8
            gate.may_end.set()
        assert executor.queued_tokens == 0
    assert order == ["called"] + ["greedy", "modest"] * 3 + ["greedy"] * 17


async def test_the_mean_queue_time_follows_waiting_decode_steps_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("petald.executor.time.perf_counter", lambda: now)
    gate, second = Gate(), Gate()
    async with open_executor(name="test") as executor:
        assert executor.mean_queue_s == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.run, gate)
            await trio.to_thread.run_sync(gate.has_started.wait)
            nursery.start_soon(executor.run, second)
            await trio.testing.wait_all_tasks_blocked()
            now += 0.5
            gate.may_end.set()
            await trio.to_thread.run_sync(second.has_started.wait)
            after_wait_s = executor.mean_queue_s
            assert after_wait_s == pytest.approx(0.5 * MEAN_WEIGHT)
            nursery.start_soon(functools.partial(executor.run, int, priority=Priority.PREFILL))
            await trio.testing.wait_all_tasks_blocked()
            now += 0.5
            second.may_end.set()
        assert 0 < executor.mean_queue_s < after_wait_s
        now += 20 * MEAN_TIME_S
        assert executor.mean_queue_s < 1e-6


async def test_what_a_closed_executor_is_asked_fails_and_does_not_wait() -> None:
    gate = Gate()
    errors: list[ExecutorClosed] = []

    async def ask() -> None:
        try:
            await executor.run(int)
        except ExecutorClosed as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        async with open_executor(name="test") as executor:
            nursery.start_soon(executor.run, gate)
            await trio.to_thread.run_sync(gate.has_started.wait)
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            threading.Timer(0.05, gate.may_end.set).start()
        await ask()
    assert gate.has_ended
    assert len(errors) == 2

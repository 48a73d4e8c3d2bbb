"""The thread that runs one device's kernels.

Trio's loop hands work over and sleeps until it is done; the thread takes batches from a
`Scheduler`. It knows nothing of sessions or networks: work is a callable, or an item for the batch
function it was queued with. Where only a share of the device is lent, peers' work has a queue of
its own, and rests; the daemon's own work goes before it, and does not.

Invariant: a piece of work that was cancelled either never started or has ended, so the caller may
free what it used.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from petald.duty_cycle import LONGEST_STRETCH_S, DutyCycle
from petald.scheduler import Priority, Scheduler, Work

T = TypeVar("T")

logger = logging.getLogger(__name__)

MEAN_WEIGHT = 0.1
"""Of the newest batch in the mean queue time: some twenty batches show a change, not one alone."""

MEAN_TIME_S = 5.0
"""After so long without a batch the mean queue time counts for 1/e: well above a batch, which takes
tens of milliseconds, and well below the minutes that a session lasts."""

BatchFunction = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Timed:
    """What a batch gave for one item, and how long it took.

    Attributes:
        value: the item's result.
        queue_s: from being queued to the start of the batch.
        compute_s: of the whole batch.
        items: in the batch.
    """

    value: Any
    queue_s: float
    compute_s: float
    items: int = 1


@dataclass(eq=False, slots=True)
class _Pending:
    """A piece of work that some task awaits."""

    function: BatchFunction
    argument: Any
    queued_at: float
    done: trio.Event = field(default_factory=trio.Event)
    result: Timed | None = None
    error: BaseException | None = None


class ExecutorClosed(Exception):
    """A bug of this daemon: its device's thread was ended before those who use it."""


class Executor:
    """Runs kernels on one thread; made by `open_executor`.

    Attributes:
        batches: that were run.
        batched_items: pieces of work in them.
        computed_s: spent on them.
        rests: how often peers' work waited because the device is lent in part only.
    """

    def __init__(
        self,
        token: trio.lowlevel.TrioToken,
        *,
        max_batch_tokens: int,
        share: float = 1.0,
        synchronise: Callable[[], None] = lambda: None,
    ) -> None:
        self._token = token
        self.share = share
        self._scheduler: Scheduler[_Pending] = Scheduler(max_batch_tokens=max_batch_tokens)
        self._duty = DutyCycle(share) if share < 1 else None
        # Without a limit, both are one queue, in whose order all work stands.
        self._own: Scheduler[_Pending] = (
            Scheduler(max_batch_tokens=max_batch_tokens) if self._duty else self._scheduler
        )
        self._synchronise = synchronise
        self._condition = threading.Condition()
        self._is_closed = False
        # One tuple, so that another thread reads both of one moment.
        self._mean_queue = (0.0, time.perf_counter())
        self._stretch_began_at = math.inf
        self._is_resting = False
        self.batches = 0
        self.batched_items = 0
        self.computed_s = 0.0
        self.rests = 0

    async def run(
        self,
        function: Callable[..., T],
        *args: Any,
        priority: Priority = Priority.DECODE,
        tokens: int = 1,
        peer: str = "",
    ) -> T:
        """Runs a function on the device's thread, which all peers share equally.

        Args:
            function: what to run.
            args: for it.
            priority: its kind.
            tokens: how many rows it computes, which is what peers share by.
            peer: who asked for it.

        Raises:
            ExecutorClosed: the thread has ended, or ends before the function's turn.

        Cancellation: either it never ran, or it has ended; its result is lost.
        """
        call: BatchFunction = functools.partial(_call_one, function)
        timed = await self._submit(Work(self._pending(call, args), priority, tokens, peer=peer))
        value: T = timed.value
        return value

    async def run_batched(
        self,
        function: BatchFunction,
        argument: Any,
        *,
        priority: Priority,
        tokens: int,
        batch_key: Hashable,
        peer: str = "",
    ) -> Timed:
        """Runs ``function([argument, ...])`` together with other work of an equal batch key.

        The function gives one result for each argument. If a batch of several fails, each is run
        alone, so that one caller's fault is not another's.

        Cancellation: as `run`.
        """
        pending = self._pending(function, argument)
        return await self._submit(Work(pending, priority, tokens, (function, batch_key), peer))

    @property
    def queued(self) -> int:
        """How many pieces of work wait."""
        return len(self._scheduler) + (len(self._own) if self._duty else 0)

    @property
    def queued_tokens(self) -> int:
        """How many rows wait, of all kinds."""
        return sum(map(self.queued_tokens_of, Priority))

    def queued_tokens_of(self, priority: Priority) -> int:
        """How many rows of one kind wait."""
        own = self._own.queued_tokens(priority) if self._duty else 0
        return self._scheduler.queued_tokens(priority) + own

    def is_wanted_before(self, priority: Priority) -> bool:
        """Whether a long piece of work is to make way: more urgent work waits, or a rest is due."""
        if self._duty is None:
            return self._scheduler.is_wanted_before(priority)
        return (
            len(self._own) > 0
            or self._scheduler.is_wanted_before(priority)
            or time.perf_counter() - self._stretch_began_at > LONGEST_STRETCH_S
        )

    @property
    def mean_queue_s(self) -> float:
        """How long decode steps waited of late, smoothed; falls towards 0 while none waits."""
        mean_s, at = self._mean_queue
        if self.queued_tokens_of(Priority.DECODE):
            return mean_s
        return mean_s * math.exp((at - time.perf_counter()) / MEAN_TIME_S)

    def _pending(self, function: BatchFunction, argument: Any) -> _Pending:
        return _Pending(function, argument, time.perf_counter())

    async def _submit(self, work: Work[_Pending]) -> Timed:
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._condition:
            if self._is_closed:
                raise ExecutorClosed("the device's thread has ended")
            self._queue_of(work).add(work)
            self._condition.notify()
        pending = work.item
        try:
            await pending.done.wait()
        except trio.Cancelled:
            with self._condition:
                was_queued = self._queue_of(work).remove(work)
            if not was_queued:
                with trio.CancelScope(shield=True):
                    await pending.done.wait()
            raise
        if pending.error is not None:
            raise pending.error
        assert pending.result is not None
        return pending.result

    def _queue_of(self, work: Work[_Pending]) -> Scheduler[_Pending]:
        return self._scheduler if work.peer else self._own

    def run_thread(self) -> None:
        """The thread's main loop; ends after `close`, and fails what is queued then."""
        while (works := self._wait_batch()) is not None:
            batch = [work.item for work in works]
            if works[0].priority is Priority.DECODE:
                self._note_queue_time(batch)
            began_at = self._stretch_began_at = time.perf_counter()
            self._run_batch(batch)
            if self._duty is not None:
                self._synchronise()  # else what was begun goes on while it is said to rest
            ended_at = time.perf_counter()
            self.computed_s += ended_at - began_at
            if self._duty is not None and works[0].peer:
                self._duty.on_computed(began_at, ended_at)
            self._deliver_soon(batch)
            del works, batch  # what they hold on to may be gigabytes of a span that is given up
        for queue in (self._own, self._scheduler):
            while works := queue.next_batch():  # nothing is added any more
                for work in works:
                    work.item.error = ExecutorClosed("the device's thread ended before this began")
                self._deliver_soon([work.item for work in works])

    def _wait_batch(self) -> list[Work[_Pending]] | None:
        """What the device does next, once there is some and it may; none when it is to end."""
        with self._condition:
            while not self._is_closed:
                if works := self._own.next_batch():
                    return works
                rest_s = self._rest_s() if len(self._scheduler) else None
                if rest_s == 0:
                    self._is_resting = False
                    return self._scheduler.next_batch()
                if rest_s and not self._is_resting:
                    self._is_resting = True
                    self.rests += 1
                self._condition.wait(rest_s)
        return None

    def _rest_s(self) -> float:
        """How long peers' work has to wait still."""
        if self._duty is None:
            return 0.0
        is_decode = self._scheduler.queued_tokens(Priority.DECODE) > 0
        return self._duty.rest_s(time.perf_counter(), is_decode=is_decode)

    def close(self) -> None:
        """Tells the thread to end after the batch that it runs."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()

    def _deliver_soon(self, batch: list[_Pending]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(_deliver, batch)

    def _note_queue_time(self, batch: list[_Pending]) -> None:
        now = time.perf_counter()
        queue_s = sum(now - pending.queued_at for pending in batch) / len(batch)
        mean_s, at = self._mean_queue
        # The longer ago the last batch was, the less it says.
        weight = max(MEAN_WEIGHT, 1 - math.exp((at - now) / MEAN_TIME_S))
        self._mean_queue = (mean_s + weight * (queue_s - mean_s), now)

    def _run_batch(self, batch: list[_Pending]) -> None:
        started_at = time.perf_counter()
        try:
            results = batch[0].function([pending.argument for pending in batch])
        except Exception as error:  # the job loop: whatever a kernel raises belongs to its caller
            if len(batch) > 1:
                for pending in batch:
                    self._run_batch([pending])
            else:
                batch[0].error = error
            return
        compute_s = time.perf_counter() - started_at
        self.batches += 1
        self.batched_items += len(batch)
        for pending, result in zip(batch, results, strict=True):
            pending.result = Timed(result, started_at - pending.queued_at, compute_s, len(batch))


def _call_one(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
    return [function(*arguments[0])]


def _deliver(batch: list[_Pending]) -> None:
    for pending in batch:
        pending.done.set()


@asynccontextmanager
async def open_executor(
    *,
    name: str,
    max_batch_tokens: int = 1024,
    share: float = 1.0,
    synchronise: Callable[[], None] = lambda: None,
) -> AsyncIterator[Executor]:
    """Starts a device's thread, and ends it with the block.

    Args:
        name: of the device, for the thread's name.
        max_batch_tokens: the most rows in one batch of several sessions' steps.
        share: the most of its time that peers' work takes.
        synchronise: waits until the device has done what it was given.
    """
    executor = Executor(
        trio.lowlevel.current_trio_token(),
        max_batch_tokens=max_batch_tokens,
        share=share,
        synchronise=synchronise,
    )
    thread = threading.Thread(target=executor.run_thread, name=f"petald-{name}", daemon=True)
    thread.start()
    try:
        yield executor
    finally:
        executor.close()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(thread.join)

"""The next batch for a device.

Pure: work is added and batches are taken; it runs nothing and knows no threads. Decode steps come
before prefill, prefill before backward. Work of the same kind that may share one pass over the
weights is given as one batch. So that a stream of decode steps cannot starve a prefill for ever,
lower work that was passed over `PATIENCE` times is given next.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

T = TypeVar("T")

PATIENCE = 16
"""A prefill piece of 512 tokens takes some ten times a decode step (``benchmarks/decode.py``), so
that decode keeps most of the device, and prefill still moves."""


class Priority(IntEnum):
    """Kinds of work, most urgent first."""

    DECODE = 0
    PREFILL = 1
    BACKWARD = 2


@dataclass(eq=False, slots=True)
class Work(Generic[T]):
    """One piece of work for the device.

    Attributes:
        item: what the caller wants back when it is taken.
        priority: its kind.
        tokens: how many rows it adds to a batch.
        batch_key: only work of equal keys shares a batch; none never shares.
    """

    item: T
    priority: Priority
    tokens: int = 1
    batch_key: object = None


class Scheduler(Generic[T]):
    """The queue in front of one device.

    Args:
        max_batch_tokens: the most rows in one batch of several pieces of work.
    """

    def __init__(self, *, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._queues: dict[Priority, deque[Work[T]]] = {kind: deque() for kind in Priority}
        self._passed_over: dict[Priority, int] = dict.fromkeys(Priority, 0)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, work: Work[T]) -> None:
        """Queues a piece of work, behind all of its kind."""
        self._queues[work.priority].append(work)

    def remove(self, work: Work[T]) -> bool:
        """Takes back a piece of work; says whether it was still queued."""
        try:
            self._queues[work.priority].remove(work)
        except ValueError:
            return False
        return True

    def next_batch(self) -> list[Work[T]]:
        """Takes the pieces of work that the device is to do next, together; empty if there is none.

        The first is the oldest of its kind; others that may join it follow in order.
        """
        waiting = [kind for kind in Priority if self._queues[kind]]
        if not waiting:
            return []
        chosen = next((k for k in waiting if self._passed_over[k] >= PATIENCE), waiting[0])
        for kind in waiting:
            self._passed_over[kind] = 0 if kind is chosen else self._passed_over[kind] + 1
        queue = self._queues[chosen]
        first = queue.popleft()
        batch, tokens = [first], first.tokens
        if first.batch_key is None:
            return batch
        kept: deque[Work[T]] = deque()
        while queue:
            work = queue.popleft()
            if work.batch_key == first.batch_key and (
                tokens + work.tokens <= self._max_batch_tokens
            ):
                batch.append(work)
                tokens += work.tokens
            else:
                kept.append(work)
        self._queues[chosen] = kept
        return batch

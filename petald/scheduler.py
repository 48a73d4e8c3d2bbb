"""The next batch for a device.

Pure: work is added and batches are taken; it runs nothing and knows no threads. Decode steps come
before prefill, prefill before backward. Work of the same kind that may share one pass over the
weights is given as one batch. So that a stream of decode steps cannot starve a prefill for ever,
lower work that was passed over `PATIENCE` times is given next.

Within a kind, those who ask are served equally, counted in tokens (start-time fair queueing). Each
peer with work has a virtual time that grows by the tokens of every piece it is given; the peer
that is furthest behind goes first, and who may share its batch follows in the same order. A peer
that comes, or comes back, starts no earlier than the virtual clock, so that idling earns nothing.

Invariant: of the peers that wait, the furthest ahead is at most one full batch and one piece
ahead of the furthest behind. So, of two peers that began to wait together, neither has ever got
more than that beyond the other while both wait; over any stretch of time, no more than twice that.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
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
    """One piece of work for the device; not to be changed while it is queued.

    Attributes:
        item: what the caller wants back when it is taken.
        priority: its kind.
        tokens: how many rows it adds to a batch.
        batch_key: only work of equal keys shares a batch; none never shares.
        peer: who asked; empty for this daemon itself.
    """

    item: T
    priority: Priority
    tokens: int = 1
    batch_key: Hashable = None
    peer: str = ""


class Scheduler(Generic[T]):
    """The queue in front of one device.

    A call costs some steps for each peer that waits and each piece it gives, however many pieces
    are queued.

    Args:
        max_batch_tokens: the most rows in one batch of several pieces of work.
    """

    def __init__(self, *, max_batch_tokens: int) -> None:
        self._lines: dict[Priority, _Line[T]] = {
            kind: _Line(max_batch_tokens=max_batch_tokens) for kind in Priority
        }
        self._passed_over: dict[Priority, int] = dict.fromkeys(Priority, 0)

    def __len__(self) -> int:
        return sum(line.pieces for line in self._lines.values())

    def queued_tokens(self, priority: Priority) -> int:
        """How many rows of a kind wait; another thread may read it."""
        return self._lines[priority].tokens

    def is_wanted_before(self, priority: Priority) -> bool:
        """Whether work waits that is more urgent than this kind; another thread may read it."""
        return any(self._lines[kind].pieces for kind in Priority if kind < priority)

    def add(self, work: Work[T]) -> None:
        """Queues a piece of work, behind all that its peer has queued of its kind."""
        self._lines[work.priority].add(work)

    def remove(self, work: Work[T]) -> bool:
        """Takes back a piece of work; says whether it was still queued."""
        return self._lines[work.priority].remove(work)

    def next_batch(self) -> list[Work[T]]:
        """Takes the pieces of work that the device is to do next, together; empty if there is none.

        The first is the oldest of the peer that is furthest behind. Others that may join it follow
        in fair order; those of one peer and key are never out of order.
        """
        waiting = [kind for kind in Priority if self._lines[kind].pieces]
        if not waiting:
            return []
        chosen = next((k for k in waiting if self._passed_over[k] >= PATIENCE), waiting[0])
        for kind in waiting:
            self._passed_over[kind] = 0 if kind is chosen else self._passed_over[kind] + 1
        return self._lines[chosen].take()


def _cost(work: Work[T]) -> int:
    # Even work without rows takes a turn.
    return max(1, work.tokens)


@dataclass(eq=False, slots=True)
class _Flow(Generic[T]):
    """What one peer waits for, of one kind.

    Ordered dictionaries serve as queues from whose middle a piece can be taken at once; a plain
    one would walk over what has left its front.

    Attributes:
        start: the virtual time at which its next piece begins.
        stamp: when that was set, in order.
        was_served: since it began to wait.
        pieces: all, oldest first.
        lanes: the same, by batch key.
    """

    start: int
    stamp: int
    was_served: bool = False
    pieces: OrderedDict[Work[T], None] = field(default_factory=OrderedDict)
    lanes: dict[Hashable, OrderedDict[Work[T], None]] = field(default_factory=dict)

    def rank(self) -> tuple[int, bool, int]:
        """Of two, the smaller goes first: of equals the newcomer, then who came first."""
        return self.start, self.was_served, self.stamp

    def push(self, work: Work[T]) -> None:
        self.pieces[work] = None
        self.lanes.setdefault(work.batch_key, OrderedDict())[work] = None

    def discard(self, work: Work[T]) -> None:
        del self.pieces[work]
        lane = self.lanes[work.batch_key]
        del lane[work]
        if not lane:
            del self.lanes[work.batch_key]


class _Line(Generic[T]):
    """All work of one kind, fair by peer.

    The clock is where a peer without a past starts, and never goes back. After a batch it stands no
    earlier than who still waits and is furthest behind, so that whoever had all its work done is
    owed nothing. Up to the peer furthest ahead, it also moves by the batch's share for each that
    waited: else ever new peers could hold it still, and all go before one that was served once.
    """

    def __init__(self, *, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._flows: dict[str, _Flow[T]] = {}
        self._clock = 0
        self._latest = 0
        self._stamps = 0
        # The times ahead of the clock at which peers last had nothing queued, soonest first.
        self._ahead: dict[str, int] = {}
        self._expiry: list[tuple[int, str]] = []
        self.pieces = 0
        self.tokens = 0

    def add(self, work: Work[T]) -> None:
        if not self._flows:
            # Nobody waits, so nobody is owed anything: all are equal again.
            self._clock = max(self._clock, self._latest)
            self._forget()
        flow = self._flows.get(work.peer)
        if flow is None:
            start = max(self._clock, self._ahead.get(work.peer, 0))
            flow = self._flows[work.peer] = _Flow(start, self._next_stamp())
        flow.push(work)
        self.pieces += 1
        self.tokens += work.tokens

    def remove(self, work: Work[T]) -> bool:
        flow = self._flows.get(work.peer)
        if flow is None or work not in flow.pieces:
            return False
        self._drop(flow, work)
        return True

    def take(self) -> list[Work[T]]:
        """Takes the next batch; there must be work."""
        waiting = list(self._flows.values())
        flow = min(waiting, key=_Flow.rank)
        # Joining is cheap but not free to those who cannot join: a peer that is more than a full
        # batch ahead of the first waits for its own turn.
        limit = flow.start + self._max_batch_tokens
        first = next(iter(flow.pieces))
        batch = [first]
        self._serve(flow, first)
        if first.batch_key is not None:
            self._join(batch, limit)
        share = -(-sum(map(_cost, batch)) // len(waiting))
        furthest = max(flow.start for flow in waiting)
        behind = min((flow.start for flow in self._flows.values()), default=furthest)
        self._clock = max(self._clock, behind, min(self._clock + share, furthest))
        self._forget()
        return batch

    def _join(self, batch: list[Work[T]], limit: int) -> None:
        key, tokens = batch[0].batch_key, batch[0].tokens
        ready = [
            (flow.rank(), flow)
            for flow in self._flows.values()
            if flow.start <= limit and key in flow.lanes
        ]
        heapq.heapify(ready)
        while ready and tokens < self._max_batch_tokens:
            flow = heapq.heappop(ready)[1]
            work = next(iter(flow.lanes[key]))
            if tokens + work.tokens > self._max_batch_tokens:
                continue  # and nothing younger of this peer's overtakes it
            self._serve(flow, work)
            batch.append(work)
            tokens += work.tokens
            if flow.start <= limit and key in flow.lanes:
                heapq.heappush(ready, (flow.rank(), flow))

    def _serve(self, flow: _Flow[T], work: Work[T]) -> None:
        flow.start += _cost(work)
        flow.stamp = self._next_stamp()
        flow.was_served = True
        self._latest = max(self._latest, flow.start)
        self._drop(flow, work)

    def _drop(self, flow: _Flow[T], work: Work[T]) -> None:
        flow.discard(work)
        self.pieces -= 1
        self.tokens -= work.tokens
        if flow.pieces:
            return
        del self._flows[work.peer]
        # A peer that was not served since is still there; cancelling again and again adds nothing.
        if flow.start > self._clock and self._ahead.get(work.peer) != flow.start:
            self._ahead[work.peer] = flow.start
            heapq.heappush(self._expiry, (flow.start, work.peer))

    def _forget(self) -> None:
        while self._expiry and self._expiry[0][0] <= self._clock:
            finish, peer = heapq.heappop(self._expiry)
            if self._ahead.get(peer) == finish:
                del self._ahead[peer]

    def _next_stamp(self) -> int:
        self._stamps += 1
        return self._stamps

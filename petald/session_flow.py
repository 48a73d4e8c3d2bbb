"""The rows of a session: submitted, under way through some hops, and done.

Pure: a part of `petald.session`. Every step that is sent has a number of its own, whether it is
new, sent again after a failure, or replayed to new hops; what comes back under a number that was
forgotten is passed over.

How rows are sent again. The bits of a row that a hop computes depend on how many rows it was
computed with: a product of one row adds up in another order than one of many. An *exact* replay
therefore repeats the steps just as they were submitted, one row where it was one row, so that a
like machine caches the same bits; it takes as long as those steps did. Another goes in long pieces,
as a prefill does, several times as quick, and differs in last bits.

Invariant: rows are *committed* when every border between two hops has seen them and the last hop
has done them; only those survive a failure, and they always do.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from p2p.wire.session_messages import Wanted
from p2p.wire.tensor import RAW, WireTensor
from petald.session_actions import History, SendStep
from petald.session_build import Build
from petald.session_hop import HopRecord, HopState
from petald.session_settings import Replay

MAX_IN_FLIGHT = 8
"""Steps of one route under way: more than most chains have hops, so that none waits idle. A
server takes twice as many before it stops reading."""

REPLAY_TOKENS = 128
"""As for prefill: hops overlap, and products of matrices are bound by arithmetic."""

MAX_UNCOPIED = 256
"""Steps whose copies have not all come, before the hop that keeps them back is given up."""


@dataclass(eq=False, slots=True)
class Pending:
    """A step that was submitted and is not done; without a number it is not under way."""

    position: int
    tokens: int
    wanted: str
    number: int | None = None

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.position + self.tokens


@dataclass(eq=False, slots=True)
class SentStep:
    """A step under way.

    Attributes:
        ticket: of the pending step that its result is for, if it is for one.
        build: whose hops it is replayed to; none where it goes through the chain.
        route: its hops, in order.
        reached: how many of them have done it, in order, as far as their outputs have come.
        reached_at: when the last of these came.
        silent: the numbers of the hops whose outputs have not come.
        is_done: whether its result has.
    """

    number: int
    position: int
    tokens: int
    wanted: str
    ticket: int | None
    build: Build | None
    route: tuple[HopRecord, ...]
    reached_at: float
    silent: set[int]
    reached: int = 0
    is_done: bool = False

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.position + self.tokens

    @property
    def result_rows(self) -> int:
        """How many rows of output are wanted."""
        return {Wanted.NONE: 0, Wanted.LAST: 1}.get(Wanted(self.wanted), self.tokens)


class Flow:
    """All rows of one session.

    Args:
        make_history: a new, empty history.
        replay: whether rows are sent again in the steps in which they were submitted.

    Attributes:
        histories: for each border of the chain, by the block after it, the rows that crossed it;
            those before block 0 are what was submitted.
    """

    def __init__(self, make_history: Callable[[], History], *, replay: Replay) -> None:
        self.histories: dict[int, History] = {0: make_history()}
        self._replay = replay
        self._starts = array("q")  # of the steps that were submitted, in order
        self._done_rows = 0
        self._pending: dict[int, Pending] = {}
        self._sent: dict[int, SentStep] = {}
        self._in_flight = 0
        self._redo_at = 0
        self._last_number = 0

    @property
    def rows(self) -> int:
        """How many were submitted, and not taken back."""
        return self.histories[0].rows

    @property
    def last_number(self) -> int:
        """Of the step that was sent last."""
        return self._last_number

    @property
    def tickets(self) -> tuple[int, ...]:
        """Of the steps that are not done."""
        return tuple(self._pending)

    def find(self, number: int, hop: HopRecord | None) -> SentStep | None:
        """The step under way of this number, if the hop's output for it is still to come."""
        sent = self._sent.get(number)
        return sent if sent is not None and hop is not None and hop.id in sent.silent else None

    def committed(self, borders: Collection[int]) -> int:
        """How many rows all of these borders have seen, and the last hop has done."""
        return min([self._done_rows, *(self.histories[border].rows for border in borders)])

    def submit(self, ticket: int, position: int, hidden: WireTensor, wanted: str) -> None:
        """Takes rows, at the end of those there are."""
        self._note_codec(hidden)
        self.histories[0].append(hidden)
        self._starts.append(position)
        self._pending[ticket] = Pending(position, hidden.shape[0], wanted)

    def withdraw(self, ticket: int) -> int | None:
        """Takes a step back; gives its position, if it was not done."""
        pending = self._pending.pop(ticket, None)
        return None if pending is None else pending.position

    def rewind(self, position: int) -> list[int]:
        """Takes back all rows from a position on; gives the tickets of steps that are lost.

        A step that reaches beyond the position is to be sent again, as far as it counts.
        """
        for history in self.histories.values():
            history.truncate(min(history.rows, position))
        del self._starts[bisect_left(self._starts, position) :]
        self._done_rows = min(self._done_rows, position)
        self._redo_at = min(self._redo_at, position)
        late = [ticket for ticket, pending in self._pending.items() if pending.end > position]
        for ticket in late:
            del self._pending[ticket]
        for number, sent in list(self._sent.items()):
            if sent.end > position:
                self._drop(number)
                self._count_done(sent)
                if sent.build is None:
                    self._redo_at = min(self._redo_at, sent.position)
                else:
                    sent.build.sent = min(sent.build.sent, sent.position)
                    sent.build.done = min(sent.build.done, sent.position)
        return late

    def halt(self) -> None:
        """Forgets what is under way through the chain: it will be sent again."""
        self.forget(None)
        self._in_flight = 0
        for pending in self._pending.values():
            pending.number = None

    def resume(self, committed: int) -> None:
        """What is not committed is to be sent, in order.

        What crossed a border beyond that, and what came of it, does not count: it will be computed
        again, by other hops perhaps, to other bits.
        """
        for border, history in self.histories.items():
            if border:
                history.truncate(min(history.rows, committed))
        self._done_rows = min(self._done_rows, committed)
        self._redo_at = committed

    def forget(self, build: Build | None) -> None:
        """Forgets what is under way to a build's hops, or else through the chain."""
        for number in [n for n, sent in self._sent.items() if sent.build is build]:
            self._drop(number)

    def piece_end(self, position: int, end: int, max_step_tokens: int) -> int:
        """Where a piece ends that is sent again from a position on, if it goes no further."""
        if self._replay is not Replay.EXACT:
            return min(end, position + min(REPLAY_TOKENS, max_step_tokens))
        following = bisect_right(self._starts, position)
        return min(end, self._starts[following]) if following < len(self._starts) else end

    def _note_codec(self, hidden: WireTensor) -> None:
        if self._replay is Replay.AUTO and hidden.codec != RAW:
            self._replay = Replay.EXACT

    def _drop(self, number: int) -> None:
        sent = self._sent.pop(number)
        for hop in sent.route:
            if hop.id in sent.silent:
                hop.owed += 1

    def pump(self, chain: Sequence[HopRecord], max_step_tokens: int, now: float) -> list[SendStep]:
        """What may be sent now, in order: what was submitted, and what is to be done again."""
        actions: list[SendStep] = []
        for ticket, pending in self._pending.items():
            actions += self._redo(pending.position, chain, max_step_tokens, now)
            if self._in_flight >= MAX_IN_FLIGHT or self._redo_at < pending.position:
                return actions
            if pending.number is None:
                actions += self._send_pending(ticket, pending, chain, now)
        return actions + self._redo(self.rows, chain, max_step_tokens, now)

    def _redo(
        self, until: int, chain: Sequence[HopRecord], max_step_tokens: int, now: float
    ) -> list[SendStep]:
        actions: list[SendStep] = []
        while self._redo_at < until and self._in_flight < MAX_IN_FLIGHT:
            end = self.piece_end(self._redo_at, until, max_step_tokens)
            hidden = self.histories[0].read(self._redo_at, end)
            actions.append(self.send(chain, hidden, self._redo_at, now))
            self._redo_at += hidden.shape[0]
        return actions

    def _send_pending(
        self, ticket: int, pending: Pending, chain: Sequence[HopRecord], now: float
    ) -> list[SendStep]:
        actions = []
        start = pending.position
        while start < pending.end:  # more than once only where a history changes its codec
            hidden = self.histories[0].read(start, pending.end)
            is_last = start + hidden.shape[0] == pending.end
            wanted = pending.wanted if is_last else Wanted.NONE
            step = self.send(chain, hidden, start, now, wanted, ticket if is_last else None)
            actions.append(step)
            pending.number = step.number
            start += hidden.shape[0]
        self._redo_at = max(self._redo_at, pending.end)
        return actions

    def send(
        self,
        route: Sequence[HopRecord],
        hidden: WireTensor,
        position: int,
        now: float,
        wanted: str = Wanted.NONE,
        ticket: int | None = None,
        *,
        build: Build | None = None,
        until: int | None = None,
    ) -> SendStep:
        """Gives rows a number and sends them on their way."""
        self._last_number += 1
        number = self._last_number
        self._sent[number] = SentStep(
            number=number,
            position=position,
            tokens=hidden.shape[0],
            wanted=wanted,
            ticket=ticket,
            build=build,
            route=tuple(route),
            reached_at=now,
            silent={hop.id for hop in route},
        )
        if build is None:
            self._in_flight += 1
        else:
            build.in_flight += 1
        return SendStep(route[0].id, number, position, hidden, wanted, until)

    def take_output(self, hop: HopRecord, sent: SentStep, hidden: WireTensor, now: float) -> None:
        """The copy of what a hop pushed to the next."""
        histories = self.histories if sent.build is None else sent.build.histories
        history = histories[hop.at.end]
        if history.rows >= sent.position:  # else rows are missing before it, and it is of no use
            self._note_codec(hidden)
            history.truncate(sent.position)
            history.append(hidden)
        self._note_progress(hop, sent, now)

    def take_result(self, hop: HopRecord, sent: SentStep, now: float) -> int | None:
        """The end of a step; gives the ticket of the pending step that is done with it."""
        self._count_done(sent)
        sent.is_done = True
        if sent.build is not None:
            sent.build.done = max(sent.build.done, sent.end)
        elif self._done_rows >= sent.position:
            self._done_rows = sent.end
        self._note_progress(hop, sent, now)
        if sent.ticket is None or self._pending.pop(sent.ticket, None) is None:
            return None
        return sent.ticket

    def take_stale(self, hop: HopRecord, now: float) -> None:
        """An output that nobody waits for any more: it shows that the hop is at work."""
        if hop.owed:
            hop.owed -= 1
            hop.last_output_at = now
            hop.probe = None

    def suspects(self) -> list[tuple[HopRecord, SentStep, float]]:
        """Of each route, the hop that the oldest step under way waits for, and since when."""
        found = []
        routes: set[int] = set()
        for sent in self._sent.values():
            # A build is not done before the copies have come that its hops' history is made of.
            if id(sent.build) in routes or (sent.is_done and sent.build is None):
                continue
            routes.add(id(sent.build))
            hop = sent.route[sent.reached]
            if sent.is_done:
                hop = next(each for each in sent.route if each.id in sent.silent)
            if hop.state is HopState.OPEN:
                found.append((hop, sent, max(sent.reached_at, hop.last_output_at)))
        return found

    def drop_withheld(self) -> HopRecord | None:
        """Forgets a step whose copies do not come; gives the hop that keeps them back."""
        if len(self._sent) < MAX_UNCOPIED:
            return None
        oldest = next(iter(self._sent.values()))
        if not oldest.is_done:
            return None
        del self._sent[oldest.number]
        return next(hop for hop in oldest.route if hop.id in oldest.silent)

    def close(self) -> None:
        """Gives back what the histories hold."""
        for history in self.histories.values():
            history.close()
        self._pending.clear()
        self._sent.clear()

    def _count_done(self, sent: SentStep) -> None:
        if sent.is_done:
            return
        if sent.build is not None:
            sent.build.in_flight -= 1
        else:
            self._in_flight -= 1

    def _note_progress(self, hop: HopRecord, sent: SentStep, now: float) -> None:
        index = sent.route.index(hop)
        if index:
            sent.route[index - 1].link_failures.clear()
        if index >= sent.reached:
            if index == sent.reached:
                hop.laps.add(sent.tokens, now - max(sent.reached_at, hop.last_output_at))
            sent.reached = index if hop is sent.route[-1] else index + 1
            sent.reached_at = now
        hop.last_output_at = now
        hop.probe = None
        sent.silent.discard(hop.id)
        if not sent.silent:
            del self._sent[sent.number]

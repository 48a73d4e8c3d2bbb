"""When a server moves to other blocks, as a state machine.

Pure: what others serve goes in with the time, actions come out. A driver does this, for ever:

    wait until `next_deadline()`, or for `next_look_s()` where there is none
    read the view afresh; ``now`` is the time *before* that reading began
    carry out what ``on_load(read_load(view, own=peer), now)`` gives; where the view is a sample,
        after `petald.block_load.confirm_gaps`

and tells of what became of an action (`on_claimed`, `on_loaded`, `on_moved`, `on_move_failed`).
While a span is loaded the reading goes on: a `WithdrawClaim` then ends the move.

How it works. A move goes through these states, and back to resting from any of them:

    RESTING    at each look, the best other span is weighed against staying
    WAITING    one is worth it; a delay by chance, and another look
    CLAIMING   the claim is being announced
    CLAIMED    it is; who claimed earlier counts as moved. Another look soon, and if the move is
               still worth it:
    LOADING    the new span is loaded beside the old one, which is served on
    LOADED     it waits for the claim to be known, looks a last time, and switches
    SWITCHING  until the driver says that it is done

At a weakness that is less than a gap many servers look in turn, each at its own time. What sets out
to mend it must be about what is missing there, or all of them would: so a server passes its chance
by, except with a probability that is in proportion to the part of the swarm's throughput that is
missing (`MoveSettings.haste`).

A gap cannot wait for that. The delay before a claim on one is one of Nonnenmacher's and Biersack's
(Scalable feedback for large groups, IEEE/ACM Transactions on Networking 7(3), 1999): ``suppress_s *
log2(1 + u * N)`` with ``u`` by chance from 0 to 1. Of N servers that see the gap at once about one
has claimed it after ``suppress_s``, and twice as many as before after each further one; so those
that act before they see the others act are few, however many there are.

When a move is worth it is a matter of ski rental (Karlin, Manasse, Rudolph, Sleator: Competitive
snoopy caching, Algorithmica 3, 1988): nobody knows for how long a gain would last, for others come,
go and move too. A move is made when what the server has forgone by staying, and what it would gain
within ``foresight_s``, add up to what it costs. So great gains are taken at once, small ones only
in a swarm that is quiet, and what is forgone in vain is at most about what the moves cost.

What a move costs grows with the time that a server has been where it is, for its sessions gather
there. So it is those who came last that move on, and most servers stay for hours.

Invariant: nobody switches away from a block unless another server serves it that has no claim to
leave it, in a view read at least ``known_s`` after the own claim was announced. If every claim is
in every view that is read ``known_s`` later, then no set of servers can leave a block empty: the
last of them to look would have seen the claims of all the others. That needs no clocks that agree,
and no order of the claims; the order only decides who gives way. Where two such others serve the
block, ``likely_known_s`` is enough: it takes two claims that are late at once to leave it empty.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from enum import Enum, auto

import numpy as np

from petald.block_load import BlockLoad, Capacity
from petald.move_actions import (
    FinishMove,
    MakeClaim,
    MoveAction,
    MoveCounts,
    MoveSettings,
    StartMove,
    WithdrawClaim,
)
from petald.span_scores import SpanScores, gain_limit, score_spans
from petald.swarm import Booleans, Floats

SPARE, EARLY_SPARE = 1, 2
"""So many other servers must stay on a block that is left; two where the claim to leave it may not
be known everywhere yet."""

YOUTH = 3
"""A move is free at first, costs an eighth at half of `MoveSettings.young_s`, and then soon all."""

LOOK_S = 8.0
"""Between two looks at a small swarm: about as often as views change."""

LOOK_SERVER_S = 0.005
MOST_LOOK_S = 60.0
"""For each server of a large one a view takes longer to read, and one death matters less."""

MOST_BETWEEN_LOOKS_S = 60.0
"""A gain counts as forgone for no longer before a look than views are apart: it may be newer."""


def look_period_s(num_servers: int) -> float:
    """How long a server waits from one look to the next in the mean, by how many it sees."""
    return min(LOOK_S + LOOK_SERVER_S * num_servers, MOST_LOOK_S)


def next_look_s(num_servers: int, rng: random.Random) -> float:
    """How long it waits this time, where no deadline is nearer."""
    return look_period_s(num_servers) * rng.uniform(0.6, 1.4)


class MoveState(Enum):
    """Where a move stands; see the module's account."""

    RESTING = auto()
    WAITING = auto()
    CLAIMING = auto()
    CLAIMED = auto()
    LOADING = auto()
    LOADED = auto()
    SWITCHING = auto()


class MovePlanner:
    """Decides the moves of one server; see the module's account.

    Args:
        peer: its own peer id.
        span: that it serves.
        capacity: of the server, for this model.
        settings: how moves are weighed.
        now: the time.
        rng: of the delays.
    """

    def __init__(
        self,
        peer: str,
        span: tuple[int, int],
        capacity: Capacity,
        *,
        settings: MoveSettings,
        now: float,
        rng: random.Random,
    ) -> None:
        self._peer = peer
        self._span = span
        self._capacity = capacity
        self._settings = settings
        self._rng = rng
        self._state = MoveState.RESTING
        self._target = span
        self._is_urgent = False
        self._deadline: float | None = None
        self._claim_ms = 0
        self._claimed_at = now
        self._known_at = math.inf
        self._until = math.inf
        self._arrived_at = self._rested_at = self._spent_until = now
        self._failed_until = -math.inf
        self._forgone_s = 0.0
        self._looked_at = now
        self._considered_at = -math.inf
        self._counts = MoveCounts()

    @property
    def span(self) -> tuple[int, int]:
        """That is served now."""
        return self._span

    @property
    def claim(self) -> tuple[int, int] | None:
        """The span that is claimed now, to be announced."""
        is_free = self._state in (MoveState.RESTING, MoveState.WAITING)
        return None if is_free else self._target

    @property
    def is_urgent(self) -> bool:
        """Whether a claim stands on blocks that nobody serves."""
        return self._is_urgent and self.claim is not None

    @property
    def state(self) -> MoveState:
        """Where a move stands."""
        return self._state

    def statistics(self) -> MoveCounts:
        """What it has gone through."""
        return self._counts

    def next_deadline(self) -> float | None:
        """When a fresh view is wanted; None: at the driver's own rhythm."""
        return self._deadline

    def set_capacity(self, capacity: Capacity) -> None:
        """What the server can do has been measured anew."""
        self._capacity = capacity

    def on_load(self, load: BlockLoad, now: float) -> list[MoveAction]:
        """Looks at the swarm.

        Args:
            load: what the others do, claims counted as made; without this server.
            now: when the reading of the view began.
        """
        if self._state is MoveState.RESTING:
            self._consider(load, now)
            return []
        is_due = self._deadline is not None and now >= self._deadline
        if self._state is MoveState.WAITING:
            return self._claim(load, now) if is_due else []
        if self._state in (MoveState.CLAIMED, MoveState.LOADING, MoveState.LOADED):
            return self._pursue(load, now, is_due=is_due)
        return []

    def on_claimed(self, made_at_ms: int, now: float) -> None:
        """The claim is announced.

        Args:
            made_at_ms: as the announcement says it.
            now: when it was out.
        """
        if self._state is not MoveState.CLAIMING:
            return
        self._state = MoveState.CLAIMED
        self._claim_ms = made_at_ms
        self._claimed_at = now
        settings = self._settings
        self._known_at = now + settings.likely_known_s
        self._until = self._known_at + settings.patience_s
        self._deadline = now + min(settings.look_s, settings.likely_known_s / 2)

    def on_loaded(self, now: float) -> None:
        """The new span is loaded, and not served yet."""
        if self._state is MoveState.LOADING:
            self._state = MoveState.LOADED
            self._deadline = max(now, self._known_at)
            self._until = self._deadline + self._settings.patience_s

    def on_moved(self, start: int, end: int, now: float) -> None:
        """A span is served now, and announced; also one that the planner did not ask for."""
        if self._state is MoveState.SWITCHING:
            urgent = self._counts.urgent_moves + self._is_urgent
            self._counts = replace(self._counts, moves=self._counts.moves + 1, urgent_moves=urgent)
            self._spend(now)
        self._span = (start, end)
        self._arrived_at = now
        self._rest(now + self._settings.rest_s)

    def on_move_failed(self, now: float) -> None:
        """The claim was not announced, the span not loaded, or the switch not made."""
        self._counts = replace(self._counts, failed=self._counts.failed + 1)
        self._failed_until = now + self._settings.failed_rest_s
        self._rest(now)

    def give_up(self, now: float) -> None:
        """The server takes no sessions for now: whatever it was about to do is off."""
        self._rest(now)

    def _spend(self, now: float) -> None:
        """Counts a move: each takes up its part of an hour, and ``burst`` of them may be ahead."""
        settings = self._settings
        part_s = 3600.0 / settings.hourly
        self._spent_until = max(self._spent_until, now) + part_s
        self._rested_at = max(self._rested_at, self._spent_until - (settings.burst - 1) * part_s)

    def _rest(self, rested_at: float) -> None:
        self._state, self._target, self._deadline = MoveState.RESTING, self._span, None
        self._rested_at = max(self._rested_at, rested_at)
        self._forgone_s = 0.0

    # The states.

    def _consider(self, load: BlockLoad, now: float) -> None:
        """Waits for another look, if there is a better place now."""
        since_s = min(now - self._considered_at, MOST_BETWEEN_LOOKS_S)
        self._considered_at = now
        found = self._choose(load, now)
        if found is None:
            return
        _, self._is_urgent = found
        rivals = load.num_servers
        if not self._is_urgent:
            hourly = self._settings.haste * (1 / (rivals + 1) + self._missing(load))
            if self._rng.random() >= hourly * since_s / 3600.0:
                return
            rivals = 1
        self._state = MoveState.WAITING
        delay = math.log2(1 + self._rng.random() * rivals)
        self._deadline = now + self._settings.suppress_s * delay

    def _claim(self, load: BlockLoad, now: float) -> list[MoveAction]:
        found = self._choose(load, now)
        if found is None:
            self._rest(now)
            return []
        self._target, self._is_urgent = found
        self._state, self._deadline = MoveState.CLAIMING, None
        self._counts = replace(self._counts, claims=self._counts.claims + 1)
        return [MakeClaim(*self._target)]

    def _pursue(self, load: BlockLoad, now: float, *, is_due: bool) -> list[MoveAction]:
        """Goes on with a claimed move, if it still holds with those done that were claimed before.

        What it costs does not count any more where it is being spent.
        """
        before = load.without_claims_after(self._claim_ms, self._peer)
        may_leave = self._can_leave(before, SPARE)
        if now > self._until or not self._still_helps(before) or not may_leave:
            return self._withdraw(now)
        if not is_due:
            return []
        if self._state is MoveState.CLAIMED:
            self._state, self._deadline = MoveState.LOADING, None
            return [StartMove(*self._target)]
        if self._state is MoveState.LOADED:
            if not self._can_leave(load, self._spare(now)):
                # Others are to withdraw their claims, or the own one is not known for sure yet.
                self._deadline = now + self._settings.look_s
                known_at = self._claimed_at + self._settings.known_s
                if now < known_at:
                    self._deadline = min(self._deadline, known_at)
                return []
            self._state, self._deadline = MoveState.SWITCHING, None
            return [FinishMove(*self._target)]
        return []

    def _still_helps(self, load: BlockLoad) -> bool:
        scores = self._score(load)
        if self._is_urgent:
            return scores.newly_covered(*self._target) > scores.newly_covered(*self._span)
        gain = (scores.worth(*self._target) - scores.worth(*self._span)) / scores.share
        return gain > (self._settings.min_gain if self._state is MoveState.CLAIMED else 0.0)

    def _can_leave(self, load: BlockLoad, spare: int) -> bool:
        """Whether so many others stay on every block that is left."""
        few_L = load.settled_L < spare
        start, end = self._span
        few_L[:start] = few_L[end:] = False
        few_L[slice(*self._target)] = False
        return not few_L.any()

    def _spare(self, now: float) -> int:
        """How many must stay on a block that is left now."""
        is_early = now < self._claimed_at + self._settings.known_s
        return EARLY_SPARE if is_early else SPARE

    def _withdraw(self, now: float) -> list[MoveAction]:
        self._counts = replace(self._counts, withdrawn=self._counts.withdrawn + 1)
        self._rest(now)
        return [WithdrawClaim()]

    # The weighing.

    def _choose(self, load: BlockLoad, now: float) -> tuple[tuple[int, int], bool] | None:
        """The best span to move to, and whether that is urgent; None: stay."""
        if now < self._failed_until:
            return None
        start, end = self._span
        is_whole = bool(load.planned_L[:start].all() and load.planned_L[end:].all())
        settings = self._settings
        if is_whole and now < self._rested_at:
            return None
        if is_whole and self._is_hopeless(load):
            self._forgone_s, self._looked_at = 0.0, now
            return None
        scores = self._score(load)
        covers_more_WS = scores.newly_covered_WS > scores.newly_covered(start, end)
        urgent_WS = covers_more_WS & self._allowed(scores, load, EARLY_SPARE)
        most_WS = np.where(urgent_WS, scores.newly_covered_WS, 0.0)
        urgent = self._best(scores.worth_WS, urgent_WS & (most_WS == most_WS.max()))
        if urgent is not None:
            return urgent, True
        if now < self._rested_at:
            return None
        gain_WS = (scores.worth_WS - scores.worth(start, end)) / scores.share
        gain_WS = np.where(self._allowed(scores, load, SPARE), gain_WS, -1.0)
        since_s = min(now - self._looked_at, MOST_BETWEEN_LOOKS_S)
        self._looked_at = now
        value_WS = gain_WS * settings.foresight_s - self._cost_s(scores, now)
        best = self._best(value_WS, gain_WS > settings.min_gain)
        if best is None:
            self._forgone_s = 0.0
            return None
        row, first = best[1] - best[0] - 1, best[0]
        self._forgone_s += gain_WS[row, first] * since_s
        return (best, False) if value_WS[row, first] + self._forgone_s > 0 else None

    def _is_hopeless(self, load: BlockLoad) -> bool:
        """Whether it is plain without looking at any span that none is worth a move."""
        throughput_L = self._with_own(load)
        # Of several groups that are read apart, what is lacking evens out where they are added up.
        lacking = (1.0 - self._settings.enough) / math.sqrt(load.share)
        if throughput_L.min() >= (1.0 - lacking) * throughput_L.mean():
            return True
        return gain_limit(load, self._capacity, self._span) <= self._settings.min_gain

    def _with_own(self, load: BlockLoad) -> Floats:
        start, end = self._span
        throughput_L = load.throughput_L.copy()
        throughput_L[start:end] += load.speed_of(self._capacity) / (end - start)
        return throughput_L

    def _missing(self, load: BlockLoad) -> float:
        """The part of the swarm's throughput that is elsewhere than it should be."""
        throughput_L = self._with_own(load)
        mean = float(throughput_L.mean())
        return float(np.maximum(mean - throughput_L, 0.0).mean()) / mean

    def _best(self, value_WS: Floats, is_allowed_WS: Booleans) -> tuple[int, int] | None:
        """The span of greatest value; of equals, one by chance."""
        if not is_allowed_WS.any():
            return None
        allowed_WS = np.where(is_allowed_WS, value_WS, -np.inf)
        row, start = self._rng.choice(np.argwhere(allowed_WS == allowed_WS.max()).tolist())
        return start, start + row + 1

    def _score(self, load: BlockLoad) -> SpanScores:
        start, end = self._span
        fit = max(self._capacity.fit, end - start)
        return score_spans(load, replace(self._capacity, fit=fit))

    def _allowed(self, scores: SpanScores, load: BlockLoad, spare: int) -> Booleans:
        """Which spans can be taken without leaving a block on which too few others stay."""
        allowed_WS = scores.is_possible_WS
        bound = np.flatnonzero(load.settled_L[slice(*self._span)] < spare)
        if len(bound):
            first, last = self._span[0] + bound[0], self._span[0] + bound[-1]
            rows, starts = np.ogrid[1 : len(allowed_WS) + 1, : load.num_blocks]
            allowed_WS = allowed_WS & (starts <= first) & (starts + rows > last)
        return allowed_WS

    def _cost_s(self, scores: SpanScores, now: float) -> Floats:
        """What a move to each span costs, as time of this server."""
        settings = self._settings
        start, end = self._span
        lengths = np.arange(1, len(scores.worth_WS) + 1)[:, None]
        starts = np.arange(scores.worth_WS.shape[1])[None, :]
        kept_WS = np.minimum(starts + lengths, end) - np.maximum(starts, start)
        new_WS = lengths - np.maximum(kept_WS, 0)
        grown = min(1.0, (now - self._arrived_at) / settings.young_s)
        drain_s = settings.drain_s * grown**YOUTH
        cost_WS: Floats = drain_s + settings.load_block_s * new_WS
        return cost_WS

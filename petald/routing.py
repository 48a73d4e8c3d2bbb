"""The choice of a chain: which peers a session crosses, and when to leave one for another.

Pure: functions of the swarm view and of the penalties that this peer keeps. The chain chosen is the
one of least expected time per decode step, which is the ways between its hops, and in each hop the
wait for the device, the time in its kernels, and the time that its output takes to leave. A way
that neither of two servers measured is taken for the longest that it can be: through the client.
(Anything less would make a detour over a near server seem to shorten the way to a far one.)

How it works: border after border, it is known for every server at what cost the blocks before the
border can be done so that this server does the last of them (`_Search.done_s`). A server that holds
the next block is entered from whichever other server makes that cheapest, if this beats going on in
it from an earlier border; then every server that holds the block adds its time for one block. What
makes a border quick is that an estimated way is a sum of one part for each of its ends: one server
is the cheapest to leave for all, except for itself and for those whose way from it is known. These
few look at the next cheapest, and so on. A known way shorter than its estimate can beat that; it
is looked at only where the server's cost is low enough for the greatest such gain that it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from petald.coverage import check_blocks, find_usable, penalties_by_server
from petald.swarm import Booleans, Columns, Floats, Integers, SwarmView

UNKNOWN_ROUND_TRIP_S = 0.05
"""For a peer that was never measured: a common distance between two homes of one continent.
It ranks the unknown between near and far, so that neither is a reason to avoid it."""

MOVE_RATIO = 0.7
"""A move must promise steps this much shorter. Measured times of one chain differ by some tens of
percent from minute to minute; a lesser gain is as likely noise, and two sessions would swap places
for ever."""

MOVE_GAIN = 2.0
"""What a move saves must be this many times what it costs. The gain is a forecast and the session
may end early, while the cost of rebuilding the caches is sure, and others pay it too."""

FEW = 3
"""So many servers are looked at one by one, rather than all at once once more; that takes the same
time. A matter of speed alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hop:
    """A server, and the part of its span that a session uses."""

    peer: str
    addresses: tuple[str, ...]
    start: int
    end: int


def choose_chain(
    view: SwarmView,
    *,
    needed_tokens: int,
    start: int = 0,
    end: int | None = None,
    before: str | None = None,
    after: str | None = None,
    penalties_s: Mapping[str, float] | None = None,
    excluded: Collection[str] = frozenset(),
    holding: Collection[str] = frozenset(),
    hosted: str | None = None,
) -> tuple[Hop, ...]:
    """The chain of least expected time per decode step; of equals, the same one everywhere.

    Args:
        view: the swarm view.
        needed_tokens: room in the KV cache that every hop must have.
        start: the first block to cover.
        end: the block after the last one; the model's end by default.
        before: the peer that hands the first hop its input; the client by default.
        after: the peer that the last hop hands its output; the client by default.
        penalties_s: seconds added for each hop of a peer that failed lately; infinity excludes it.
        excluded: peers that are not to be used.
        holding: peers that have promised the session room already, and need no more.
        hosted: the full name of an adapter that every hop must host; none for none.

    Raises:
        MissingBlocks: no chain covers the blocks; names those that nobody usable holds.
        ValueError: there are no such blocks in the model.
    """
    start, end = check_blocks(view, start, end)
    columns = view.columns
    penalty_s = penalties_by_server(columns, penalties_s)
    is_usable = find_usable(
        view,
        start=start,
        end=end,
        needed_tokens=needed_tokens,
        penalty_s=penalty_s,
        excluded=excluded,
        holding=holding,
        hosted=hosted,
    )
    search = _Search(columns, is_usable, columns.queue_s + columns.send_s + penalty_s)
    search.run(start, end, _ends_s(columns, before, is_back=False))
    return search.chain_to(end, _ends_s(columns, after, is_back=True))


def chain_cost_s(
    view: SwarmView,
    hops: Sequence[Hop],
    *,
    before: str | None = None,
    after: str | None = None,
    penalties_s: Mapping[str, float] | None = None,
) -> float:
    """The expected time per decode step of a chain, as `choose_chain` reckons.

    Returns:
        Infinity if the view lacks a hop's peer, or its span does not hold the hop's blocks.
    """
    columns, penalties = view.columns, penalties_s or {}
    total_s = 0.0
    for hop in hops:
        position = columns.position.get(hop.peer)
        if position is None or not (
            columns.start[position] <= hop.start < hop.end <= columns.end[position]
        ):
            return float("inf")
        compute_s = float(columns.block_s[position]) * (hop.end - hop.start)
        wait_s = float(columns.queue_s[position]) + float(columns.send_s[position])
        total_s += wait_s + penalties.get(hop.peer, 0.0) + compute_s
    path = [before, *(hop.peer for hop in hops), after]
    return total_s + sum(_way_s(columns, *pair) for pair in itertools.pairwise(path))


def should_move(
    *, current_s: float, better_s: float, remaining_steps: float, rebuild_s: float
) -> bool:
    """Whether a session should leave its chain for a better one.

    Args:
        current_s: time per step now.
        better_s: expected time per step on the other chain.
        remaining_steps: that the session is expected to take still.
        rebuild_s: time to bring the other chain's caches to where the session is.
    """
    saved_s = (current_s - better_s) * remaining_steps
    return better_s < MOVE_RATIO * current_s and saved_s > MOVE_GAIN * rebuild_s


class _Search:
    """One run over the borders. What follows are N server's values, by its position.

    Attributes:
        done_s: (N,) least cost of the blocks before the border when this server did the last one;
            infinite if it cannot have.
        entered: for each border, which servers are better entered there than before, and from
            which one each (-1: from what comes before the chain).
    """

    def __init__(self, columns: Columns, is_usable: Booleans, hop_s: Floats) -> None:
        self.columns = columns
        self.ways = columns.ways
        self.half_s = _client_ways_s(columns)  # a server's part in its estimated ways
        self.gain_s = _greatest_gains_s(columns, self.half_s)
        self.start = columns.start
        self.end = np.where(is_usable, columns.end, np.int16(-1))
        self.hop_s = np.where(is_usable, hop_s, 0.0)  # an infinite penalty is not to be added up
        self.done_s = np.full(len(columns.servers), np.inf)
        self.marks = np.zeros(len(columns.servers), np.bool_)
        self.entered: dict[int, tuple[Integers, Integers]] = {}

    def run(self, start: int, end: int, way_in_s: Floats) -> None:
        """Does all blocks, in order."""
        for border in range(start, end):
            can_do = (self.start <= border) & (self.end > border)
            if border == start:
                enter_s, source = way_in_s, np.full(len(can_do), -1)
            else:
                enter_s, source = self._enter(can_do)
            total_s = enter_s + self.hop_s
            entered = np.flatnonzero(can_do & (total_s < self.done_s))
            self.done_s[entered] = total_s[entered]
            self.entered[border] = entered, source[entered]
            self.done_s = np.where(can_do, self.done_s + self.columns.block_s, np.inf)

    def _enter(self, can_do: Booleans) -> tuple[Floats, Integers]:
        """What it costs to have reached each server, and from which one."""
        leave_s = self.done_s + self.half_s
        cheapest = int(leave_s.argmin())
        least_s = leave_s[cheapest]
        # What cannot do the block is as if reached for less than nothing: no way improves it.
        enter_s = np.where(can_do, least_s + self.half_s, -np.inf)
        source = np.full(len(can_do), cheapest)
        barred = self._barred(cheapest)
        barred = barred[can_do[barred]]
        while len(barred) > FEW:
            leave_s[cheapest] = np.inf
            cheapest = int(leave_s.argmin())
            least_s = leave_s[cheapest]
            enter_s[barred] = least_s + self.half_s[barred]
            source[barred] = cheapest
            if least_s == np.inf:
                break
            still = self._barred(cheapest)
            self.marks[still] = True
            barred = barred[self.marks[barred]]
            self.marks[still] = False
        else:
            for server in barred:
                enter_s[server], source[server] = self._enter_one(int(server), leave_s)
        self._enter_by_known_ways(float(least_s), enter_s, source)
        return enter_s, source

    def _barred(self, server: int) -> Integers:
        """Those that cannot be reached from a server by an estimated way."""
        return np.append(self.ways.to[self.ways.of(server)], server)

    def _enter_one(self, server: int, leave_s: Floats) -> tuple[float, int]:
        """The cheapest way to one server, looking at each other one."""
        pairs = self.ways.of(server)
        near = self.ways.to[pairs]
        reach_s = leave_s + self.half_s[server]
        reach_s[near] = self.done_s[near] + self.ways.way_back_s[pairs]
        reach_s[server] = np.inf
        source = int(reach_s.argmin())
        return float(reach_s[source]), source

    def _enter_by_known_ways(self, least_s: float, enter_s: Floats, source: Integers) -> None:
        """Lowers in place what is cheaper to reach by a known way.

        Args:
            least_s: no server that is reached by an estimated way is reached from one that is more
                costly to leave than this.
            enter_s: (N,) what was found so far.
            source: (N,) from where.
        """
        leavers = np.flatnonzero(self.done_s < least_s + self.gain_s)
        first = self.ways.first[leavers]
        counts = self.ways.first[leavers + 1] - first
        # The pairs of all leavers, one after the other.
        skipped = np.cumsum(counts) - counts
        pairs = np.arange(int(counts.sum())) + np.repeat(first - skipped, counts)
        to = self.ways.to[pairs]
        reach_s = np.repeat(self.done_s[leavers], counts) + self.ways.way_s[pairs]
        better = np.flatnonzero(reach_s < enter_s[to])
        to, reach_s = to[better], reach_s[better]
        order = np.lexsort((reach_s, to))  # stable: of equals, the first leaver
        to, reach_s, better = to[order], reach_s[order], better[order]
        is_best = np.ones(len(to), np.bool_)
        is_best[1:] = to[1:] != to[:-1]
        enter_s[to[is_best]] = reach_s[is_best]
        source[to[is_best]] = np.repeat(leavers, counts)[better[is_best]]

    def chain_to(self, end: int, way_out_s: Floats) -> tuple[Hop, ...]:
        """The best chain that ends at the border that `run` came to."""
        hops: list[Hop] = []
        at = int((self.done_s + way_out_s).argmin())
        while at >= 0:
            start, source = self._entrance(at, end)
            server = self.columns.servers[at]
            addresses = server.announcement.addresses
            hops.append(Hop(peer=server.peer, addresses=addresses, start=start, end=end))
            at, end = source, start
        return tuple(reversed(hops))

    def _entrance(self, server: int, end: int) -> tuple[int, int]:
        """At which border, and from where, a server that did the blocks to `end` was entered."""
        while True:
            end -= 1
            entered, source = self.entered[end]
            at = int(np.searchsorted(entered, server))
            if at < len(entered) and entered[at] == server:
                return end, int(source[at])


def _client_ways_s(columns: Columns) -> Floats:
    """(N,) one way between the client and each server."""
    trips_s = columns.round_trip_s
    return np.where(np.isnan(trips_s), UNKNOWN_ROUND_TRIP_S, trips_s) / 2


def _client_way_s(columns: Columns, peer: str) -> float:
    position = columns.position.get(peer)
    trip_s = None if position is None else columns.servers[position].round_trip_s
    return (UNKNOWN_ROUND_TRIP_S if trip_s is None else trip_s) / 2


def _greatest_gains_s(columns: Columns, half_s: Floats) -> Floats:
    """(N,) by how much at most a known way from a server beats the other's part of an estimate.

    Very low for a server from which no way is known; finite, so that infinity can be added.
    """
    gains_s = np.full(len(columns.servers), -1e30)
    first = columns.ways.first
    has_ways = np.flatnonzero(first[1:] > first[:-1])
    if len(has_ways):
        by_pair_s = half_s[columns.ways.to] - columns.ways.way_s
        gains_s[has_ways] = np.maximum.reduceat(by_pair_s, first[has_ways])
    return gains_s


def _ends_s(columns: Columns, peer: str | None, *, is_back: bool) -> Floats:
    """(N,) one way to each server from a peer, or back from each to it; none is the client."""
    ways_s = _client_ways_s(columns)
    if peer is None:
        return ways_s
    ways_s = ways_s + _client_way_s(columns, peer)
    position = columns.position.get(peer)
    if position is not None:
        ways, pairs = columns.ways, columns.ways.of(position)
        ways_s[ways.to[pairs]] = (ways.way_back_s if is_back else ways.way_s)[pairs]
        ways_s[position] = 0.0
    return ways_s


def _way_s(columns: Columns, before: str | None, after: str | None) -> float:
    """One way from a peer to another; none is the client."""
    if before == after:
        return 0.0
    if before is None or after is None:
        return _client_way_s(columns, before or after or "")
    left, reached = columns.position.get(before), columns.position.get(after)
    if left is not None and reached is not None:
        pairs = columns.ways.of(left)
        at = pairs.start + int(np.searchsorted(columns.ways.to[pairs], reached))
        if at < pairs.stop and columns.ways.to[at] == reached:
            return float(columns.ways.way_s[at])
    return _client_way_s(columns, before) + _client_way_s(columns, after)

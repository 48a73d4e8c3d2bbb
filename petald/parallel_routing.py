"""The choice of parallel chains: how forward and backward passes are split for most throughput.

Pure: a function of the swarm view and of the penalties that this peer keeps. The model: pieces of a
batch follow each other through the hops as through a pipeline, so that what a hop takes in all
counts, and not how long a piece is under way. A server does `1 / token_s` block-tokens a second,
which is its *capacity*, on whatever blocks of its span; a backward pass costs every server the same
multiple of that. A server that was penalised counts for less: its penalty is added to the time of
each token in each block. The ways between servers, and what they carry, count for nothing here.

How it works:

1. The greatest throughput is exact (`_Cuts`). It is a transport problem, so its answer is that of
   the tightest set of blocks: the capacity of all servers that hold any of them, divided by their
   number. As spans have no gaps, a dynamic program finds that set.
2. Servers are assigned to blocks so that every block gets this throughput (`_assign`).
3. Chains are taken out of the assignment, the widest first, each so that it stays with a server
   for as long as it can (`_take_chains`).
4. If that takes more chains than are allowed, as many chains of equal width as are allowed are made
   as wide as they can be (`_widest_lane`). With capacities rounded down to whole blocks of such
   a chain this is the same transport problem; it then has an answer in whole numbers, which steps 2
   and 3 find. Last, each chain takes what the others leave over (`_widen`).

Invariant: all chains together never ask more of a server than its capacity.

Shapes: N servers by position, L blocks that are asked for, counted from the first of them, P pieces
of an assignment, C chains.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from petald.coverage import check_blocks, find_usable, penalties_by_server
from petald.routing import Hop
from petald.swarm import Booleans, Floats, Integers, SwarmView

MAX_CHAINS = 8
"""By default. More chains mean fewer hops in each, and fewer rows of the batch for each."""

TOLERANCE = 1e-8
"""Relative: the total is less than the greatest that there is by no more than this."""

MARGIN = TOLERANCE / 10
"""Relative: so much of its capacity is left to every server, so that no rounding asks more of one
than it can do, and so much of the flow is not worth a chain."""

ROUNDING = 1e-12
"""Relative: sums of 10,000 floats differ by less."""

LEAST_TOKEN_S, MOST_TOKEN_S = 1e-9, 1e6
"""No device does a block-token in less, and none that takes longer is of use. A server that
announces zero claims no endless capacity, and no finite penalty makes a number too small to use."""

HALVINGS = 12
"""Of the range in which the width of equal chains is sought, which is then known to 1 in 4,000:
less than what anyone measures. What is missed there `_widen` adds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainShare:
    """One of several parallel chains.

    Attributes:
        hops: cover all blocks in order. A peer can come twice.
        tokens_per_s: of the whole throughput, what goes through this chain.
    """

    hops: tuple[Hop, ...]
    tokens_per_s: float


def choose_parallel_chains(
    view: SwarmView,
    *,
    start: int = 0,
    end: int | None = None,
    max_chains: int = MAX_CHAINS,
    penalties_s: Mapping[str, float] | None = None,
    excluded: Collection[str] = frozenset(),
) -> tuple[ChainShare, ...]:
    """The split over chains of most throughput, the widest first; of equals, the same everywhere.

    The total is the greatest that there is, within `TOLERANCE`, unless the chains into which it was
    split are more than are allowed. Then it is what is kept by the better of two ways: the widest
    of these chains alone, or chains of equal width, the widest that there are to 1 in 4,000. None
    of the chains could be wider beside the others.

    Args:
        view: the swarm view.
        start: the first block to cover.
        end: the block after the last one; the model's end by default.
        max_chains: at least one.
        penalties_s: seconds added for each token in each block of a peer that failed lately;
            infinity excludes it.
        excluded: peers that are not to be used.

    Raises:
        MissingBlocks: no chain covers the blocks; names those that nobody usable holds.
        ValueError: there are no such blocks in the model, or no chain is allowed.
    """
    if max_chains < 1:
        raise ValueError(f"at least one chain must be allowed; max_chains={max_chains} came")
    start, end = check_blocks(view, start, end)
    columns = view.columns
    penalty_s = penalties_by_server(columns, penalties_s)
    is_usable = find_usable(
        view, start=start, end=end, needed_tokens=0, penalty_s=penalty_s, excluded=excluded
    )
    is_usable &= (columns.start < end) & (columns.end > start)
    token_s = (columns.token_s + penalty_s).clip(LEAST_TOKEN_S, MOST_TOKEN_S)
    supply = _Supply.sort(
        np.flatnonzero(is_usable),
        start=columns.start.clip(start, end) - start,
        end=columns.end.clip(start, end) - start,
        capacity=(1 - MARGIN) / token_s,
    )
    chains = []
    for width, runs in _split(supply, end - start, max_chains):
        hops = []
        for run in runs:
            server = columns.servers[int(supply.position[run.server])]
            addresses = server.announcement.addresses
            span = {"start": start + run.start, "end": start + run.end}
            hops.append(Hop(peer=server.peer, addresses=addresses, **span))
        chains.append(ChainShare(hops=tuple(hops), tokens_per_s=width))
    return tuple(sorted(chains, key=lambda chain: -chain.tokens_per_s))


@dataclass(frozen=True, slots=True)
class _Supply:
    """The servers that take part, in the order in which they are spent: the earliest end first.

    Of equal ends the earliest start comes first, so that a server is spent before another is begun.

    Attributes:
        position: (N,) in the view's columns.
        start: (N,) first block.
        end: (N,) the block after the last one.
        capacity: (N,) block-tokens a second.
    """

    position: Integers
    start: Integers
    end: Integers
    capacity: Floats

    @classmethod
    def sort(cls, position: Integers, *, start: Integers, end: Integers, capacity: Floats) -> Self:
        order = position[np.lexsort((start[position], end[position]))]  # stable
        return cls(
            order, start[order].astype(np.int64), end[order].astype(np.int64), capacity[order]
        )


@dataclass(frozen=True, slots=True)
class _Run:
    """A hop to be.

    Attributes:
        server: its number in the supply.
        start: first block.
        end: the block after the last one.
    """

    server: int
    start: int
    end: int


_Chains = list[tuple[float, list[_Run]]]
"""Each with its width: tokens a second, or lanes."""


def _split(supply: _Supply, blocks: int, max_chains: int) -> _Chains:
    """The chains, none too many, and their tokens a second."""
    flow = _Cuts(supply, supply.capacity, blocks).greatest_flow()
    lane = flow / max_chains
    assignment = _assign(supply, lane, blocks, max_chains)
    chains, is_whole = _take_chains(assignment, max_chains)
    chains = [(width * lane, runs) for width, runs in chains]
    if is_whole:
        return chains
    lane = _widest_lane(supply, blocks, max_chains, lane)
    assignment = _assign(supply, lane, blocks, max_chains, is_whole=True)
    equal = [(width * lane, runs) for width, runs in _take_chains(assignment, max_chains)[0]]
    ways = _widen(supply, equal), _widen(supply, chains)
    return max(ways, key=lambda way: sum(width for width, _ in way))


class _Cuts:
    """The sets of blocks, each with the capacity of all servers that hold any of it."""

    def __init__(self, supply: _Supply, capacity: Floats, blocks: int) -> None:
        size = blocks + 1
        spans = np.bincount(supply.start * size + supply.end, capacity, size * size)
        by_start = np.cumsum(spans.reshape(size, size)[:, ::-1], axis=1)[:, ::-1]  # by least end
        holding = np.triu(by_start[:blocks, 1:])  # [start, block]: begins here, holds it
        # [block, start]: what holds the block and begins at the start or later. A sum of what is
        # not negative, so that a much quicker server does not drown the others in rounding.
        self.joining = np.ascontiguousarray(np.cumsum(holding[::-1], axis=0)[::-1].T)

    def greatest_flow(self) -> float:
        """The most that every block can get at once.

        No set of blocks gets more than its capacity, and by the theorem of max-flow and min-cut
        some set gets no less. From a flow that is too great the next is the share, capacity by
        number of blocks, of the set that lacks most at it (Dinkelbach, Management Science 13,
        1967). Each share is less than the last, and few are needed.
        """
        flow = float(self.joining[:, 0].min())
        while True:
            _, cut = self.scarcest(flow)
            before = [0, *(block + 1 for block in cut[:-1])]
            share = float(self.joining[cut, before].sum()) / len(cut)
            if share >= flow * (1 - ROUNDING):
                return flow
            flow = share

    def scarcest(self, flow: float) -> tuple[float, list[int]]:
        """The set of blocks whose capacity exceeds what it must get by least, and by how much.

        Capacity adds up from block to block of a set: with each come the servers that hold it and
        begin after the one before it.
        """
        blocks = len(self.joining)
        excess = np.zeros(blocks + 1)  # [b + 1]: the least of the sets whose last block is b
        before = np.zeros(blocks + 1, np.int64)
        for block, joining in enumerate(self.joining):
            totals = excess[: block + 1] + joining[: block + 1]
            least = totals.argmin()
            before[block + 1] = least
            excess[block + 1] = totals[least] - flow
        at = int(excess[1:].argmin()) + 1
        least_excess = float(excess[at])
        cut: list[int] = []
        while at:
            cut.append(at - 1)
            at = int(before[at])
        return least_excess, cut[::-1]


def _widest_lane(supply: _Supply, blocks: int, max_chains: int, bound: float) -> float:
    """The greatest width, nearly, of which so many chains of equal width can be.

    Args:
        supply: the servers.
        blocks: that are to be covered.
        max_chains: how many chains.
        bound: no width is greater.
    """

    def is_possible(lane: float) -> bool:
        cuts = _Cuts(supply, np.floor(supply.capacity / lane), blocks)
        return cuts.scarcest(max_chains)[0] >= 0  # exact: these are whole numbers

    low, high = bound / 2, bound
    while not is_possible(low):
        low, high = low / 2, low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_possible(middle) else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class _Assignment:
    """Which server gives how much to which block: the pieces, by server, then by block.

    Attributes:
        server: (P,) its number in the supply.
        block: (P,)
        rate: (P,) in lanes.
        flow: what every block gets, in lanes.
    """

    server: Integers
    block: Integers
    rate: Floats
    flow: float


def _assign(
    supply: _Supply, lane: float, blocks: int, lanes: int, *, is_whole: bool = False
) -> _Assignment:
    """Gives every block so many lanes, from servers in as few long runs as that allows.

    Args:
        supply: the servers; together they can do it.
        lane: the tokens a second of each lane.
        blocks: that are to be covered.
        lanes: that each block must get.
        is_whole: a server takes whole lanes only.
    """
    capacity = np.floor(supply.capacity / lane) if is_whole else supply.capacity / lane
    round_up = np.ceil if is_whole else np.positive
    even = _assign_in_order(supply, capacity, blocks, lanes, round_up)
    if even.flow >= lanes * (1 - ROUNDING):
        return even
    return _assign_in_order(supply, capacity, blocks, lanes, None)


def _assign_in_order(
    supply: _Supply, capacity: Floats, blocks: int, lanes: int, round_up: np.ufunc | None
) -> _Assignment:
    """Gives lanes to block after block, from the servers that end first.

    Args:
        supply: the servers.
        capacity: (N,) in blocks of one lane.
        blocks: that are to be covered.
        lanes: that each block should get.
        round_up: makes the assignment even: a server gives at first only what it can for the rest
            of its span, so rounded, and more only if all together give too little. That makes
            chains of far fewer hops, and nearly always each block gets its lanes. Without, always.
    """
    # Proof: where an assignment takes here from a server that ends later, and from one that ends
    # earlier not until a later block, the two can change places: both hold both blocks.

    # What the lanes cannot use is no capacity: it would only spoil the rounding.
    left = np.minimum(capacity, lanes * (supply.end - supply.start).astype(np.float64))
    by_start = np.argsort(supply.start, kind="stable")
    begins = np.searchsorted(supply.start[by_start], np.arange(blocks + 1))
    active = np.empty(0, np.int64)
    servers, counts, rates = [], [], []
    flow = float(lanes)
    for block in range(blocks):
        active = active[(supply.end[active] > block) & (left[active] > 0)]
        active = np.concatenate((active, by_start[begins[block] : begins[block + 1]]))
        active.sort()
        room = left[active]
        rate = np.zeros(len(room))
        if round_up is not None:
            pace = round_up(room / (supply.end[active] - block))
            rate = _spend(np.minimum(room, pace), lanes)
        rate += _spend(room - rate, lanes - float(rate.sum()))
        flow = min(flow, float(rate.sum()))
        used = np.flatnonzero(rate)
        servers.append(active[used])
        rates.append(rate[used])
        counts.append(len(used))
        left[active] = room - rate
    server, rate = np.concatenate(servers), np.concatenate(rates)
    order = np.argsort(server, kind="stable")
    block_of = np.repeat(np.arange(blocks), counts)
    return _Assignment(server[order], block_of[order], rate[order], flow)


def _spend(room: Floats, amount: float) -> Floats:
    """Takes an amount out of what there is, the first of it first."""
    before = room.cumsum() - room
    spent: Floats = np.minimum(room, np.maximum(amount - before, 0.0))
    return spent


def _take_chains(assignment: _Assignment, max_chains: int) -> tuple[_Chains, bool]:
    """Takes chains out of an assignment, always the widest that is left.

    Any piece can follow any piece of the block before. The widest chain is therefore as wide as the
    widest piece of the block where that is least. Of pieces that are wide enough it takes, again
    and again, the one whose server goes on for longest, which makes the fewest hops of that width.

    Returns:
        The chains, with their widths in lanes, and whether nothing is left.
    """
    rate, rest = assignment.rate.copy(), assignment.flow
    chains: _Chains = []
    by_block = np.argsort(assignment.block, kind="stable")
    first = np.flatnonzero(np.diff(assignment.block[by_block], prepend=-1))
    bounds = [*first.tolist(), len(by_block)]
    is_followed = (np.diff(assignment.server) == 0) & (np.diff(assignment.block) == 1)
    while rest > MARGIN * assignment.flow and len(chains) < max_chains:
        width = float(np.maximum.reduceat(rate[by_block], first).min())
        is_wide = rate >= width * (1 - ROUNDING)
        last = _last_of_run(is_wide, is_followed)
        until = np.where(is_wide, assignment.block[last] + 1, 0)[by_block]
        runs: list[_Run] = []
        block = 0
        while block < len(first):
            at = bounds[block] + int(until[bounds[block] : bounds[block + 1]].argmax())
            piece, end = int(by_block[at]), int(until[at])
            runs.append(_Run(int(assignment.server[piece]), block, end))
            rate[piece : piece + end - block] -= width
            block = end
        chains.append((width, runs))
        rest -= width
    return chains, rest <= MARGIN * assignment.flow


def _last_of_run(is_wide: Booleans, is_followed: Booleans) -> Integers:
    """(P,) where the run of wide pieces of one server ends that a piece is in."""
    stops = np.append(~(is_followed & is_wide[1:]), True)
    last: Integers = np.flatnonzero(stops)[np.cumsum(stops) - stops]
    return last


def _widen(supply: _Supply, chains: _Chains) -> _Chains:
    """Raises the tokens a second of chains until none can have more.

    All rise alike, and those stop that cross a server which is spent.
    """
    used = [(number, run) for number, (_, runs) in enumerate(chains) for run in runs]
    servers, at = np.unique([run.server for _, run in used], return_inverse=True)
    load = np.zeros((len(chains), len(servers)))  # blocks of each chain on each server
    for column, (number, run) in zip(at.tolist(), used, strict=True):
        load[number, column] += run.end - run.start
    widths = np.array([width for width, _ in chains])
    rises = np.ones(len(chains), np.bool_)
    while rises.any():
        asked = (widths[:, np.newaxis] * load).sum(axis=0)
        left = np.maximum(supply.capacity[servers] - asked, 0.0)
        weight = load[rises].sum(axis=0)
        rise = np.divide(left, weight, out=np.full(len(servers), np.inf), where=weight > 0)
        widths[rises] += rise.min()
        rises &= ~(load[:, rise <= rise.min()] > 0).any(axis=1)
    return [(float(width), runs) for width, (_, runs) in zip(widths, chains, strict=True)]

"""How much every block can get at once from the servers that hold it, and what each server gives.

Pure. A transport problem: servers have a capacity, in block-tokens a second, which they can spend
on any blocks of their span; all blocks need the same flow, in tokens a second. As spans have no
gaps, its tightest cut is found by a dynamic program, and servers can be spent from the first block
to the last. A *lane* is a part of the flow, as wide as one of several equal chains would be.

Invariant: an assignment never takes more of a server than its capacity, but for rounding.

Shapes: N servers, L blocks, counted from the first that is asked for, P pieces of an assignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Self

import numpy as np

from petald.swarm import Floats, Integers

ROUNDING = 1e-12
"""Relative: sums of 10,000 floats differ by less."""

HALVINGS = 12
"""Of the range in which the width of equal chains is sought, which is then known to 1 in 4,000:
less than what anyone measures. The chains made of it can still be widened."""


@dataclass(frozen=True, slots=True)
class Supply:
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
        """Orders the servers at these positions; all else is given for every position."""
        order = position[np.lexsort((start[position], end[position]))]  # stable
        return cls(
            order, start[order].astype(np.int64), end[order].astype(np.int64), capacity[order]
        )


class Cuts:
    """The sets of blocks, each with the capacity of all servers that hold any of it."""

    def __init__(self, supply: Supply, capacity: Floats, blocks: int) -> None:
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


def widest_lane(supply: Supply, blocks: int, max_chains: int, bound: float) -> float:
    """The greatest width, nearly, of which so many chains of equal width can be.

    Args:
        supply: the servers.
        blocks: that are to be covered.
        max_chains: how many chains.
        bound: no greater width is asked for.
    """

    def is_possible(lane: float) -> bool:
        cuts = Cuts(supply, np.floor(supply.capacity / lane), blocks)
        return cuts.scarcest(max_chains)[0] >= 0  # exact: these are whole numbers

    if is_possible(bound):
        return bound
    low, high = bound / 2, bound
    while not is_possible(low):
        low, high = low / 2, low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_possible(middle) else (low, middle)
    return low


class Order(Enum):
    """Who gives to a block first; the way that makes the fewest hops comes first.

    Attributes:
        STEADY: those that gave to the block before, then those that end last; each at an even pace.
        EVEN: those that end first; each at an even pace.
        BY_END: those that end first, all that they can.
    """

    STEADY = auto()
    EVEN = auto()
    BY_END = auto()


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which server gives how much to which block: the pieces, by server, then by block.

    Attributes:
        server: (P,) its number in the supply.
        block: (P,)
        rate: (P,) in lanes.
        flow: what every block gets, in lanes.
        width: every block has a piece at least as wide as this, in lanes.
    """

    server: Integers
    block: Integers
    rate: Floats
    flow: float
    width: float


def assign(
    supply: Supply, lane: float, blocks: int, lanes: int, *, is_whole: bool = False
) -> Assignment:
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
    for order in (Order.STEADY, Order.EVEN):
        assignment = _assign_in_order(supply, capacity, blocks, lanes, order, round_up)
        if assignment.flow >= lanes * (1 - ROUNDING):
            return assignment
    return _assign_in_order(supply, capacity, blocks, lanes, Order.BY_END, round_up)


def _assign_in_order(
    supply: Supply,
    capacity: Floats,
    blocks: int,
    lanes: int,
    order: Order,
    round_up: np.ufunc,
) -> Assignment:
    """Gives lanes to block after block.

    At an even pace, a server gives at first only what it can for the rest of its span, and more
    only if all together give too little. That makes chains of far fewer hops, and nearly always
    each block gets its lanes; where one does not, this ends there. By end, all always do.

    Args:
        supply: the servers.
        capacity: (N,) in blocks of one lane.
        blocks: that are to be covered.
        lanes: that each block should get.
        order: of the servers.
        round_up: makes of an even pace what a server can give.
    """
    # Proof: where an assignment takes here from a server that ends later, and from one that ends
    # earlier not until a later block, the two can change places: both hold both blocks.

    # What the lanes cannot use is no capacity: it would only spoil the rounding.
    left = np.minimum(capacity, lanes * (supply.end - supply.start).astype(np.float64))
    by_start = np.argsort(supply.start, kind="stable")
    begins = np.searchsorted(supply.start[by_start], np.arange(blocks + 1))
    active = np.empty(0, np.int64)
    servers, rates = [active], [np.empty(0)]
    gave = np.zeros(len(capacity), np.bool_)  # to the block before
    flow = width = float(lanes)
    for block in range(blocks):
        active = active[(supply.end[active] > block) & (left[active] > 0)]
        active = np.concatenate((active, by_start[begins[block] : begins[block + 1]]))
        active.sort()  # by end
        if order is Order.STEADY:
            goes_on = gave[active]
            active = np.concatenate((active[goes_on], active[~goes_on][::-1]))
        room = left[active]
        rate = np.zeros(len(room))
        if order is not Order.BY_END:
            pace = round_up(room / (supply.end[active] - block))
            rate = _spend(np.minimum(room, pace), lanes)
        rate += _spend(room - rate, lanes - float(rate.sum()))
        flow = min(flow, float(rate.sum()))
        if order is not Order.BY_END and flow < lanes * (1 - ROUNDING):
            break
        width = min(width, float(rate.max()))
        left[active] = room - rate
        gave[servers[-1]] = False
        servers.append(active[rate > 0])
        rates.append(rate[rate > 0])
        gave[servers[-1]] = True
    block_of = np.repeat(np.arange(len(servers) - 1), [len(some) for some in servers[1:]])
    server = np.concatenate(servers)
    by_server = np.argsort(server, kind="stable")
    rate = np.concatenate(rates)[by_server]
    return Assignment(server[by_server], block_of[by_server], rate, flow, width)


def _spend(room: Floats, amount: float) -> Floats:
    """Takes an amount out of what there is, the first of it first."""
    before = room.cumsum() - room
    spent: Floats = np.minimum(room, np.maximum(amount - before, 0.0))
    return spent

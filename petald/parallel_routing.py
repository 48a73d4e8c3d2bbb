"""The choice of parallel chains: how forward and backward passes are split for most throughput.

Pure: a function of the swarm view and of the penalties that this peer keeps. The model: pieces of a
batch follow each other through the hops as through a pipeline, so that what a hop takes in all
counts, and not how long a piece is under way. A server does `1 / token_s` block-tokens a second,
which is its *capacity*, on whatever blocks of its span; a backward pass costs every server the same
multiple of that. A server that was penalised counts for less: its penalty is added to the time of
each token in each block. The ways between servers, and what they carry, count for nothing here.

How it works:

1. The greatest throughput is exact (`Cuts`): that of the tightest set of blocks, which is the
   capacity of all servers that hold any of them, divided by their number.
2. Servers are assigned to blocks so that every block gets this throughput (`assign`).
3. Chains are taken out of the assignment, the widest first, each so that it stays with a server
   for as long as it can (`_take_chains`).
4. If that takes more chains than are allowed, as many chains of equal width as are allowed are made
   as wide as they can be (`widest_lane`). With capacities rounded down to whole blocks of such
   a chain this is the same transport problem; it then has an answer in whole numbers, which steps 2
   and 3 find. Last, each chain takes what the others leave over (`_widen`).

Invariant: all chains together never ask more of a server than its capacity.

Shapes: P pieces of an assignment.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from petald.block_flow import ROUNDING, Assignment, Cuts, Supply, assign, widest_lane
from petald.coverage import check_blocks, find_usable, penalties_by_server
from petald.routing import Hop
from petald.swarm import Booleans, Integers, SwarmView

MAX_CHAINS = 8
"""By default. More chains mean fewer hops in each, and fewer rows of the batch for each."""

TOLERANCE = 1e-8
"""Relative: the total is less than the greatest that there is by no more than this."""

MARGIN = TOLERANCE / 10
"""Relative: so much of its capacity is left to every server, so that no rounding asks more of one
than it can do, and so much of the flow is not worth a chain."""

LEAST_TOKEN_S, MOST_TOKEN_S = 1e-9, 1e6
"""No device does a block-token in less, and none that takes longer is of use. A server that
announces zero claims no endless capacity, and no finite penalty makes a number too small to use."""


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
    max_tokens_per_s: float = float("inf"),
    penalties_s: Mapping[str, float] | None = None,
    excluded: Collection[str] = frozenset(),
    hosted: str | None = None,
) -> tuple[ChainShare, ...]:
    """The split over chains of most throughput, the widest first; of equals, the same everywhere.

    The total is the greatest that there is, within `TOLERANCE`, or what the caller can send if that
    is less, unless the chains into which it was split are more than are allowed. Then it is what is
    kept by the better of two ways: the widest of these chains alone, or chains of equal width, the
    widest that there are to 1 in 4,000; and none of them could be wider beside the others.

    Args:
        view: the swarm view.
        start: the first block to cover.
        end: the block after the last one; the model's end by default.
        max_chains: at least one.
        max_tokens_per_s: what the caller can send at most, above zero. The less is asked of a large
            swarm, the fewer hops a chain has.
        penalties_s: seconds added for each token in each block of a peer that failed lately;
            infinity excludes it.
        excluded: peers that are not to be used.
        hosted: the full name of an adapter that every hop must host; none for none.

    Raises:
        MissingBlocks: no chain covers the blocks; names those that nobody usable holds.
        ValueError: there are no such blocks in the model, or no chain is allowed, or no token.
    """
    if max_chains < 1 or not max_tokens_per_s > 0:
        raise ValueError(
            "at least one chain and some tokens must be allowed; "
            f"max_chains={max_chains}, max_tokens_per_s={max_tokens_per_s} came"
        )
    start, end = check_blocks(view, start, end)
    columns = view.columns
    penalty_s = penalties_by_server(columns, penalties_s)
    is_usable = find_usable(
        view,
        start=start,
        end=end,
        needed_tokens=0,
        penalty_s=penalty_s,
        excluded=excluded,
        hosted=hosted,
    )
    is_usable &= (columns.start < end) & (columns.end > start)
    token_s = (columns.token_s + penalty_s).clip(LEAST_TOKEN_S, MOST_TOKEN_S)
    supply = Supply.sort(
        np.flatnonzero(is_usable),
        start=columns.start.clip(start, end) - start,
        end=columns.end.clip(start, end) - start,
        capacity=(1 - MARGIN) / token_s,
    )
    chains = []
    for width, runs in _split(supply, end - start, max_chains, max_tokens_per_s):
        hops = []
        for run in runs:
            server = columns.servers[int(supply.position[run.server])]
            addresses = server.announcement.addresses
            span = {"start": start + run.start, "end": start + run.end}
            hops.append(Hop(peer=server.peer, addresses=addresses, **span))
        chains.append(ChainShare(hops=tuple(hops), tokens_per_s=width))
    return tuple(sorted(chains, key=lambda chain: -chain.tokens_per_s))


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


def _split(supply: Supply, blocks: int, max_chains: int, max_flow: float) -> _Chains:
    """The chains, none too many, and their tokens a second."""
    flow = min(max_flow, Cuts(supply, supply.capacity, blocks).greatest_flow())
    lane = flow / max_chains
    assignment = assign(supply, lane, blocks, max_chains)
    ways: list[_Chains] = []
    # No chain is wider than the first. Where that is too little, none of them is worth taking out.
    if assignment.width * max_chains >= assignment.flow * (1 - MARGIN):
        chains, is_all = _take_chains(assignment, max_chains)
        chains = [(width * lane, runs) for width, runs in chains]
        if is_all:
            return chains
        ways.append(_widen(supply, chains))
    lane = widest_lane(supply, blocks, max_chains, lane)
    assignment = assign(supply, lane, blocks, max_chains, is_whole=True)
    equal = [(width * lane, runs) for width, runs in _take_chains(assignment, max_chains)[0]]
    ways.append(_widen(supply, equal))
    chains = max(ways, key=lambda way: sum(width for width, _ in way))
    excess = max(1.0, sum(width for width, _ in chains) / max_flow)
    return [(width / excess, runs) for width, runs in chains]


def _take_chains(assignment: Assignment, max_chains: int) -> tuple[_Chains, bool]:
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


def _widen(supply: Supply, chains: _Chains) -> _Chains:
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

"""The choice of a chain: which peers a session crosses.

Pure: a function of the swarm view and of the penalties that this peer keeps. The chain chosen is
the one of least expected time per decode step, which is, for each hop, the way there and the time
in its kernels. The way between two servers is not known to a client; it is taken to be half the
mean of their round trips from here, since a message pushed from one to the next goes one way only.

How it works: for every block number in order, it is known at what cost the blocks before it can be
done, and at which server such a way ends. A way is led on by any other server that holds the next
block, for as many blocks as it holds. What a server adds does not depend on the one before it but
by the way between them, so of all ways to a border only the best two, by different servers, matter.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace

from petald.errors import MissingBlocks
from petald.swarm import Server, SwarmView, format_ranges, missing_ranges

UNKNOWN_ROUND_TRIP_S = 0.05
"""For a peer that was never measured: a common distance between two homes of one continent.
It ranks the unknown between near and far, so that neither is a reason to avoid it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hop:
    """A server, and the part of its span that a session uses."""

    peer: str
    addresses: tuple[str, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Way:
    """The best known way to have done the blocks before some border, ending at one server."""

    cost_s: float
    server: Server
    start: int
    before: _Way | None


def choose_chain(
    view: SwarmView, *, needed_tokens: int, penalties_s: Mapping[str, float] | None = None
) -> tuple[Hop, ...]:
    """The chain of least expected time per decode step.

    Args:
        view: the swarm view.
        needed_tokens: room in the KV cache that every hop must have.
        penalties_s: seconds added for a peer that failed lately; infinity excludes it.

    Raises:
        MissingBlocks: no chain covers the model; names the blocks that nobody usable holds.
    """
    penalties = penalties_s or {}
    usable = [
        server
        for server in view.servers
        if server.is_serving
        and server.announcement.free_cache_tokens >= needed_tokens
        and penalties.get(server.peer, 0.0) != float("inf")
    ]
    usable.sort(key=lambda server: server.peer)  # ties fall the same way everywhere
    ways: list[dict[str, _Way]] = [{} for _ in range(view.num_blocks + 1)]
    for border in range(view.num_blocks):
        best = heapq.nsmallest(2, ways[border].values(), key=_cost_to_leave_s)
        for server in usable:
            if server.start <= border < server.end:
                penalty_s = penalties.get(server.peer, 0.0)
                arrived = _arrive(server, border, best, penalty_s)
                if arrived is not None:
                    _lead_on(arrived, ways)
    finished = ways[view.num_blocks].values()
    if not finished:
        raise _missing(view, usable, needed_tokens)
    best_way = min(finished, key=lambda way: way.cost_s + _one_way_s(way.server))
    return _unwind(best_way, view.num_blocks)


def _cost_to_leave_s(way: _Way) -> float:
    return way.cost_s + _one_way_s(way.server) / 2


def _arrive(server: Server, border: int, best: list[_Way], penalty_s: float) -> _Way | None:
    """The best way to bring a step to a server at a border."""
    if border == 0:
        return _Way(_one_way_s(server) + penalty_s, server, 0, None)
    before = next((way for way in best if way.server.peer != server.peer), None)
    if before is None:
        return None
    cost_s = _cost_to_leave_s(before) + _one_way_s(server) / 2 + penalty_s
    return _Way(cost_s, server, border, before)


def _lead_on(arrived: _Way, ways: list[dict[str, _Way]]) -> None:
    """Notes what is reached when a server does one block, two, and so on to its span's end."""
    server = arrived.server
    for end in range(arrived.start + 1, server.end + 1):
        cost_s = arrived.cost_s + _compute_s(server, end - arrived.start)
        known = ways[end].get(server.peer)
        if known is None or cost_s < known.cost_s:
            ways[end][server.peer] = replace(arrived, cost_s=cost_s)


def _one_way_s(server: Server) -> float:
    measured = server.round_trip_s
    return (UNKNOWN_ROUND_TRIP_S if measured is None else measured) / 2


def _compute_s(server: Server, blocks: int) -> float:
    return server.announcement.step_ms / 1e3 * blocks / (server.end - server.start)


def _unwind(way: _Way, end: int) -> tuple[Hop, ...]:
    hops: list[Hop] = []
    at: _Way | None = way
    while at is not None:
        hops.append(
            Hop(
                peer=at.server.peer,
                addresses=at.server.announcement.addresses,
                start=at.start,
                end=end,
            )
        )
        end = at.start
        at = at.before
    return tuple(reversed(hops))


def _missing(view: SwarmView, usable: list[Server], needed_tokens: int) -> MissingBlocks:
    counts = [0] * view.num_blocks
    for server in usable:
        for block in range(server.start, server.end):
            counts[block] += 1
    ranges = missing_ranges(counts)
    text = f"no server that can be used now holds blocks {format_ranges(ranges)}"
    if missing_ranges(view.coverage()) != ranges:
        text += f" (some hold them, but failed just now or have no room for {needed_tokens} tokens)"
    return MissingBlocks(text + "; `petalctl swarm` shows who holds what", ranges=tuple(ranges))

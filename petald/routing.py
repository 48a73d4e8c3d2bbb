"""The choice of a chain: which peers a session crosses.

Pure: a function of the swarm view and of the penalties that this peer keeps. The chain chosen is
the one of least expected time per decode step, which is, for each hop, the way there and the time
in its kernels. The way between two servers is not known to a client; it is taken to be half the
mean of their round trips from here, since a message pushed from one to the next goes one way only.

How it works: the best way to have done the blocks ``[0, b)`` and be at the server that did the last
of them is found for every ``b`` in order. A hop may begin wherever another one's span ends, so a
server is left only at the end of its span or where the next server's span begins; that keeps the
number of states at (servers x distinct span borders).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    borders = sorted(
        {0, view.num_blocks}
        | {server.start for server in usable}
        | {server.end for server in usable}
    )
    ways: dict[int, list[_Way]] = {border: [] for border in borders}
    for border in borders[:-1]:
        for server in usable:
            if not server.start <= border < server.end:
                continue
            arrived = _arrive(server, border, ways[border], penalties.get(server.peer, 0.0))
            if arrived is None:
                continue
            for leave in borders:
                if border < leave <= server.end:
                    cost_s = arrived.cost_s + _compute_s(server, leave - border)
                    ways[leave].append(_Way(cost_s, server, border, arrived.before))
    finished = [
        (way.cost_s + _one_way_s(way.server), index)
        for index, way in enumerate(ways[view.num_blocks])
    ]
    if not finished:
        raise _missing(view, usable, needed_tokens)
    return _unwind(ways[view.num_blocks][min(finished)[1]], view.num_blocks)


def _arrive(server: Server, border: int, before: list[_Way], penalty_s: float) -> _Way | None:
    """The best way to bring a step to a server at a border."""
    if border == 0:
        return _Way(_one_way_s(server) + penalty_s, server, 0, None)
    candidates = [
        (way.cost_s + (_one_way_s(way.server) + _one_way_s(server)) / 2 + penalty_s, index)
        for index, way in enumerate(before)
        if way.server.peer != server.peer
    ]
    if not candidates:
        return None
    cost_s, index = min(candidates)
    return _Way(cost_s, server, border, before[index])


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

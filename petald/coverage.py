"""Which servers a choice may use, and which blocks they leave uncovered.

Pure: what every choice of a route asks of the swarm view before it reckons.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from petald.errors import MissingBlocks
from petald.swarm import Booleans, Columns, Floats, SwarmView, format_ranges, missing_ranges


def check_blocks(view: SwarmView, start: int, end: int | None) -> tuple[int, int]:
    """The blocks that are asked for; to the model's end by default.

    Raises:
        ValueError: there are no such blocks in the model.
    """
    end = view.num_blocks if end is None else end
    if not 0 <= start < end <= view.num_blocks:
        raise ValueError(f"blocks {start}:{end} are no part of a model of {view.num_blocks} blocks")
    return start, end


def penalties_by_server(columns: Columns, penalties_s: Mapping[str, float] | None) -> Floats:
    """(N,) the penalty of each server; zero where there is none."""
    values = np.zeros(len(columns.servers))
    for peer, penalty_s in (penalties_s or {}).items():
        position = columns.position.get(peer)
        if position is not None:
            values[position] = penalty_s
    return values


def find_usable(
    view: SwarmView,
    *,
    start: int,
    end: int,
    needed_tokens: int,
    penalty_s: Floats,
    excluded: Collection[str],
    holding: Collection[str] = frozenset(),
) -> Booleans:
    """(N,) the servers that serve, have room, and are neither excluded nor penalised for ever.

    Args:
        view: the swarm view.
        start: the first block that is to be covered.
        end: the block after the last one.
        needed_tokens: room in the KV cache that a server must have.
        penalty_s: (N,) infinity bars a server.
        excluded: peers that are not to be used.
        holding: peers that have promised the session room already, and need no more.

    Raises:
        MissingBlocks: they do not cover the blocks; names those that none of them holds.
    """
    columns = view.columns
    has_room = columns.free_cache_tokens >= max(needed_tokens, 0)
    has_room[[columns.position[peer] for peer in holding if peer in columns.position]] = True
    is_usable = has_room & (columns.free_cache_tokens >= 0) & (penalty_s < np.inf)
    is_usable[[columns.position[peer] for peer in excluded if peer in columns.position]] = False
    ranges = _uncovered(columns, is_usable, start, end)
    if ranges:
        raise _missing(view, ranges, start, end, needed_tokens)
    return is_usable


def _uncovered(
    columns: Columns, is_usable: Booleans, start: int, end: int
) -> list[tuple[int, int]]:
    """The ranges within [start, end) that none of these servers holds."""
    size = end - start + 1
    begins = np.bincount((columns.start[is_usable].clip(start, end) - start), minlength=size)
    ends = np.bincount((columns.end[is_usable].clip(start, end) - start), minlength=size)
    counts = np.cumsum(begins - ends)[:-1].tolist()
    return [(start + first, start + last) for first, last in missing_ranges(counts)]


def _missing(
    view: SwarmView, ranges: list[tuple[int, int]], start: int, end: int, needed_tokens: int
) -> MissingBlocks:
    text = f"no server that can be used now holds blocks {format_ranges(ranges)}"
    is_serving = view.columns.free_cache_tokens >= 0
    if _uncovered(view.columns, is_serving, start, end) != ranges:
        no_room = f" or have no room for {needed_tokens} tokens" if needed_tokens > 0 else ""
        text += f" (some hold them, but failed just now{no_room})"
    return MissingBlocks(text + "; `petalctl swarm` shows who holds what", ranges=tuple(ranges))

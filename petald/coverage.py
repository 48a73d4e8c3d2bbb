"""Which servers a choice may use, and which blocks they leave uncovered.

Pure: what every choice of a route asks of the swarm view before it reckons.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from petald.errors import BadRequest, MissingBlocks
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
    hosted: str | None = None,
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
        hosted: the full name of an adapter that a server must host.

    Raises:
        MissingBlocks: they do not cover the blocks; names those that none of them holds.
    """
    columns = view.columns
    has_room = columns.free_cache_tokens >= max(needed_tokens, 0)
    has_room[[columns.position[peer] for peer in holding if peer in columns.position]] = True
    is_usable = has_room & (columns.free_cache_tokens >= 0) & (penalty_s < np.inf)
    is_usable[[columns.position[peer] for peer in excluded if peer in columns.position]] = False
    if hosted is not None:
        is_usable &= _hosts(columns, hosted)
    ranges = _uncovered(columns, is_usable, start, end)
    if ranges:
        raise _missing(view, ranges, start, end, needed_tokens, hosted)
    return is_usable


def find_hosted(view: SwarmView, name: str, *, start: int = 0, end: int | None = None) -> str:
    """The full name of an adapter that servers host, of which there may be several of one name.

    Args:
        view: the swarm view.
        name: as users say it; a full name is given back as it is.
        start: the first block that is to be covered.
        end: the block after the last one; the model's end by default.

    Raises:
        MissingBlocks: no adapter of this name is hosted for all the blocks.
        BadRequest: several are; names them.
    """
    if "@" in name:
        return name
    start, end = check_blocks(view, start, end)
    columns = view.columns
    is_serving = columns.free_cache_tokens >= 0
    candidates = sorted(full for full in columns.adapters if full.startswith(f"{name}@"))
    gaps = {
        full: _uncovered(columns, is_serving & columns.adapters[full], start, end)
        for full in candidates
    }
    whole = [full for full in candidates if not gaps[full]]
    if len(whole) > 1:
        raise BadRequest(
            f"servers host different adapters under the name {name!r}; say which: "
            f"{', '.join(whole)}"
        )
    if whole:
        return whole[0]
    if not candidates:
        raise MissingBlocks(
            f"no server hosts an adapter {name!r} now; `petalctl swarm` shows which there are",
            ranges=((start, end),),
        )
    fewest = min(candidates, key=lambda full: sum(last - first for first, last in gaps[full]))
    missing = "; ".join(f"{full} lacks blocks {format_ranges(gaps[full])}" for full in candidates)
    raise MissingBlocks(
        f"no adapter {name!r} is hosted for all blocks {start}:{end} now: {missing}",
        ranges=tuple(gaps[fewest]),
    )


def _hosts(columns: Columns, full_name: str) -> Booleans:
    """(N,) which servers host an adapter."""
    return columns.adapters.get(full_name, np.zeros(len(columns.servers), np.bool_))


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
    view: SwarmView,
    ranges: list[tuple[int, int]],
    start: int,
    end: int,
    needed_tokens: int,
    hosted: str | None,
) -> MissingBlocks:
    text = f"no server that can be used now holds blocks {format_ranges(ranges)}"
    is_serving = view.columns.free_cache_tokens >= 0
    if hosted is not None:
        text += f" with the adapter {hosted!r}"
        is_serving &= _hosts(view.columns, hosted)
    if _uncovered(view.columns, is_serving, start, end) != ranges:
        no_room = f" or have no room for {needed_tokens} tokens" if needed_tokens > 0 else ""
        text += f" (some hold them, but failed just now{no_room})"
    return MissingBlocks(text + "; `petalctl swarm` shows who holds what", ranges=tuple(ranges))

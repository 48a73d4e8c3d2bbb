"""Which blocks of a model are hosted, and how often: from a count for each block to a few words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from p2p.wire.control_messages import ServerStatus

MAX_BAR_CELLS = 60

CLEARLY_LESS = 0.75
"""Blocks with less than this part of the mean need help; servers even out what is less than that
(``benchmarks/swarm_sim.py``)."""


def covered_ranges(coverage: Sequence[int]) -> list[tuple[int, int, int]]:
    """Ranges of blocks that equally many servers hold: ``(start, end, servers)``."""
    ranges = []
    start = 0
    for servers, group in groupby(coverage):
        end = start + len(list(group))
        ranges.append((start, end, servers))
        start = end
    return ranges


def uncovered_ranges(coverage: Sequence[int]) -> list[tuple[int, int]]:
    """The ranges of blocks that nobody holds."""
    return [(start, end) for start, end, servers in covered_ranges(coverage) if servers == 0]


def coverage_cells(coverage: Sequence[int], most: int = MAX_BAR_CELLS) -> list[int]:
    """A bar's cells, each the least count of the blocks that it stands for.

    One cell for each block, up to `most` cells.
    """
    blocks = len(coverage)
    cells = min(blocks, most)
    edges = [cell * blocks // cells for cell in range(cells + 1)] if cells else [0]
    return [min(coverage[start:end]) for start, end in pairwise(edges)]


def describe_coverage(coverage: Sequence[int]) -> str:
    """The ranges with their servers: two of ``0:10`` are written ``0:10 ×2``."""  # noqa: RUF002
    return ", ".join(
        f"{start}:{end} ×{servers}"  # noqa: RUF001
        for start, end, servers in covered_ranges(coverage)
        if servers
    )


def count_coverage(spans: Iterable[tuple[int, int]], blocks: int) -> list[int]:
    """For each block, how many spans hold it."""
    counts = [0] * blocks
    for start, end in spans:
        for block in range(start, min(end, blocks)):
            counts[block] += 1
    return counts


def block_steps(servers: Iterable[ServerStatus], blocks: int) -> list[float]:
    """For each block, the decode steps a second of its servers, of those that take sessions."""
    steps = [0.0] * blocks
    for server in servers:
        if server.state == "serving":
            for block in range(server.start, min(server.end, blocks)):
                steps[block] += server.steps_per_s
    return steps


def weakest_ranges(steps: Sequence[float]) -> list[tuple[int, int]]:
    """The ranges of blocks whose servers do the least, where that is clearly less than the mean.

    A job crosses all blocks, so these are what limits how many can run at once.
    """
    least, mean = min(steps, default=0.0), sum(steps) / max(len(steps), 1)
    if least >= CLEARLY_LESS * mean:
        return []
    most = (least + CLEARLY_LESS * mean) / 2
    flags = [int(one <= most) for one in steps]
    return [(start, end) for start, end, is_weak in covered_ranges(flags) if is_weak]

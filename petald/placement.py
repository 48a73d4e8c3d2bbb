"""The choice of a span: which blocks this server takes.

Pure. How many blocks fit is arithmetic on bytes; which they are follows from how well each block is
covered already.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from petald.errors import ConfigError

MEMORY_SHARE = 0.5
"""Of the memory that is free, what a server takes when it is not told: the machine has an owner."""


def parse_blocks(text: str) -> tuple[int, int]:
    """Reads a span as people write it, ``0:10``.

    Raises:
        ConfigError: it is none.
    """
    start_text, colon, end_text = text.partition(":")
    if colon and start_text.isdecimal() and end_text.isdecimal():
        start, end = int(start_text), int(end_text)
        if start < end:
            return start, end
    raise ConfigError(f'blocks are written as START:END, say 0:10, or "auto"; {text!r} came')


def count_fitting_blocks(block_bytes: Sequence[int], *, memory_bytes: int) -> int:
    """How many consecutive blocks fit, wherever they begin; 0 if not one does.

    Args:
        block_bytes: of each block, its weights and its part of the KV-cache arena.
        memory_bytes: what may be taken.
    """
    fitting = 0
    taken = 0
    for size in sorted(block_bytes, reverse=True):
        taken += size
        if taken > memory_bytes:
            break
        fitting += 1
    return fitting


def choose_span(coverage: Sequence[int], *, length: int, rng: random.Random) -> tuple[int, int]:
    """The window of blocks that needs a server most.

    That is the window whose sorted counts of servers come first in lexicographic order; among equal
    ones, chance decides, so that servers which start together spread.

    Args:
        coverage: for each block of the model, how many servers hold it.
        length: of the window, at least 1.
        rng: breaks ties.
    """
    length = min(length, len(coverage))
    windows = range(len(coverage) - length + 1)
    needs = [sorted(coverage[start : start + length]) for start in windows]
    least = min(needs)
    start = rng.choice([start for start in windows if needs[start] == least])
    return start, start + length

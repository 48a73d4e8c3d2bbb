"""How many blocks a server can take, and how people write which.

Pure, and without numpy, for the configuration reads it. Which blocks a server takes if nobody said
so is chosen in `petald.span_choice`.
"""

from __future__ import annotations

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

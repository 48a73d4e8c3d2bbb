"""Into which pieces a batch is cut. Pure.

Invariant: a piece is whole sequences, and all of them together are the batch, in order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

PIECES_PER_HOP = 4
"""So many pieces for each hop of the chains: of h hops, h - 1 wait idle while the first piece comes
and the last one goes, which then is less than a quarter of the time."""

LEAST_TOKENS = 128
MOST_TOKENS = 1024
"""Fewer tokens make slow matrix products, and more do not make them quicker
(``benchmarks/training.py``)."""

MOST_ADAPTER_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Cut:
    """One piece.

    Attributes:
        first: its first sequence.
        sequences: how many it has.
    """

    first: int
    sequences: int


def cut_batch(
    sequences: int, tokens: int, *, hops: int, hidden_size: int = 1, adapter_elements: int = 0
) -> tuple[Cut, ...]:
    """Cuts a batch for a pipeline.

    Args:
        sequences: of the batch.
        tokens: of each.
        hops: of all chains together.
        hidden_size: D.
        adapter_elements: numbers of the largest part of an adapter that one hop has. Each piece
            brings a gradient of it back, which should not be more than the hidden states.
    """
    size = sequences * tokens // (PIECES_PER_HOP * max(1, hops))
    size = min(max(size, LEAST_TOKENS), MOST_TOKENS)
    size = max(size, min(adapter_elements // (2 * hidden_size), MOST_ADAPTER_TOKENS))
    # As even as can be, so that none is left over at the end.
    count = max(1, -(-sequences // max(1, size // tokens)))
    borders = [sequences * number // count for number in range(count + 1)]
    return tuple(Cut(first, end - first) for first, end in itertools.pairwise(borders))

"""Which sequences each step sees: a function of seed and step. Standard library only.

So a run that goes on from a checkpoint sees what it would have seen, with no more to remember than
how many steps were done. Every sequence is seen once before any is seen again.
"""

from __future__ import annotations

import random

HELD_OUT_MOST = 64
"""Sequences; more of them cost time at each measurement, and make it hardly more exact."""


class DataOrder:
    """The order of the sequences, epoch by epoch.

    Args:
        count: how many sequences there are; at least one.
        seed: of the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def batch(self, number: int, size: int) -> list[int]:
        """The sequences of one batch.

        Args:
            number: of the batch, from 0; batches lie one after the other, across epochs.
            size: of every batch.
        """
        first = number * size
        return [self._at(position) for position in range(first, first + size)]

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, self._count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(self._count))
            random.Random(f"order {self._seed} {epoch}").shuffle(self._order)
        return self._order[index]


def split_held_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """The sequences to train on, and those held out: chosen by the seed, at most `HELD_OUT_MOST`.

    Args:
        count: of all.
        share: to be held out, below 1; at least one sequence is, unless it is 0.
        seed: of the choice.
    """
    wanted = min(HELD_OUT_MOST, max(1, round(count * share))) if share else 0
    held_out = set(random.Random(f"held out {seed}").sample(range(count), min(wanted, count)))
    return [index for index in range(count) if index not in held_out], sorted(held_out)

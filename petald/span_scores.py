"""What every span that a server could host would be worth to the swarm.

Pure. The swarm is as quick as its least-served block, and no placement can lift that above the mean
over the blocks (the *bound*), which is the same for all placements. The minimum alone is a poor
guide, though: one server's move seldom lifts it where several blocks are short. So what is judged
is a smooth stand-in for it, the power mean of the blocks' throughputs, in units of the bound, with
an exponent so low (``-POWER``) that the least-served blocks govern it. It is 1 where all blocks are
served alike, and less anywhere else.

How it works: a server of ``v`` block-steps a second adds ``v / n`` to each of ``n`` blocks. For
each ``n`` the gain of every block is computed once; the gain of a window is then the difference of
two prefix sums. So all windows of all lengths cost as much as ``fit`` passes over the blocks.

Servers go without a word, too, and what a quick one did on few blocks leaves a deep hole in them.
So of each span is subtracted what the loss of its server would take from an otherwise even swarm,
times how likely that is: in a small swarm a quick server had better spread over all blocks that it
fits; in a large one it makes no difference.

And chains are to be short: of each span is subtracted what the handling of a message costs, which
is spread over its blocks.

Shapes: L blocks, W lengths of a span (row ``n - 1`` is for ``n`` blocks), S first blocks of a span.
Where a window does not end within the model its entry is of no meaning and never allowed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from petald.block_load import BlockLoad, Capacity
from petald.swarm import Booleans, Floats, Integers

POWER = 8
"""Of the power mean. With less, a wide shallow dip outweighs the block that governs; with much more
only one block is seen and several servers that mend different dips see nothing in it: see
benchmarks/swarm_sim.py."""

FLOOR = 0.05
"""Added to every block's throughput, in units of the bound, so that a block without any is bad
beyond all others, and not infinitely bad."""

LOSS = 0.014
"""Of the time, the part in which what a server did is missing, because it went and nobody has taken
its place yet: some 150 s (until it is forgotten, and others have looked, claimed and loaded) of
three hours that a server stays where a third is replaced in an hour."""

HOP = 1.0
"""What each message costs, in time of a block: the server that handles it has so much less to give,
and the job waits for its way. Without this, spans in large swarms shrink to one or two blocks."""

HOP_SERVERS = 850
"""In a swarm of so many, half of that; of few, by the square, next to nothing: it takes spans of
all lengths there to serve all blocks alike, and chains are hardly the shorter for it."""

LONE = 0.8
"""What a block with one server lacks, in parts of what a mean server contributes: so much may be
given up for a second one. A block without any lacks that twice: otherwise nobody would take it who
leaves others with one. The expected loss alone (`LOSS`, of all that the swarm does, for some four
blocks that one server is alone on) is less than half of that, but jobs that stand still are worse
than slow ones: with that, 25 to 28 servers, which could hold the model three times, had a gap in
six of 40 simulated hours of churn, and with this in one to four."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanScores:
    """What spans are worth.

    Attributes:
        worth_WS: the power mean, in units of the bound, with the server on that span; less what is
            to be expected of its loss, and what its messages cost.
        newly_covered_WS: how many blocks it would cover that nobody else is to cover.
        is_possible_WS: whether the span lies in the model, and all of it is here.
        share: of the server in what the swarm does in all, itself included.
    """

    worth_WS: Floats
    newly_covered_WS: Floats
    is_possible_WS: Booleans
    share: float

    def worth(self, start: int, end: int) -> float:
        """Of one span; of one longer than fits now, as if it had been cut."""
        row = min(end - start, len(self.worth_WS)) - 1
        return float(self.worth_WS[row, start])

    def newly_covered(self, start: int, end: int) -> int:
        """Of one span, likewise."""
        row = min(end - start, len(self.worth_WS)) - 1
        return int(self.newly_covered_WS[row, start])


def score_spans(load: BlockLoad, capacity: Capacity) -> SpanScores:
    """Judges every span that fits.

    Args:
        load: what the others do.
        capacity: of the server; at least one block fits.
    """
    num_blocks = load.num_blocks
    fit = min(capacity.fit, num_blocks)
    speed = load.speed_of(capacity)
    total = float(load.throughput_L.sum()) + speed
    bound = total / num_blocks
    relative_L = load.throughput_L / bound + FLOOR
    lengths, ends_WS, is_possible_WS = _windows(num_blocks, fit)
    if capacity.missing:
        is_missing_L = np.isin(np.arange(num_blocks), list(capacity.missing))
        is_possible_WS = is_possible_WS & (_counts(is_missing_L, ends_WS) == 0)
    need_L = _need(relative_L)
    gain_WL = need_L - _need(relative_L + (speed / bound / lengths)[:, None])
    gained_WS = _window_sums(gain_WL, ends_WS)
    need_WS = np.maximum(need_L.sum() - gained_WS, num_blocks * 1e-12)
    empty_WS = _counts(load.planned_L == 0, ends_WS)
    lacking_WS = np.maximum(2 - load.planned_L, 0).sum() - _counts(load.planned_L < 2, ends_WS)
    return SpanScores(
        worth_WS=(need_WS / num_blocks) ** (-1 / POWER)
        - FLOOR
        - load.share * LOSS * _hole(speed / bound, lengths, num_blocks)[:, None]
        - load.share * LONE / (load.num_servers + 1) * lacking_WS
        - _hop(load) * speed / total / lengths[:, None],
        newly_covered_WS=empty_WS,
        is_possible_WS=is_possible_WS,
        share=speed / total,
    )


def gain_limit(load: BlockLoad, capacity: Capacity, span: tuple[int, int]) -> float:
    """More than a server can gain the swarm by any move, in parts of what it contributes.

    A power mean is concave, so no move gains more than its slope promises: at best all that the
    server does goes from the mean slope over its span to the steepest slope there is. That takes a
    tenth of the time of `score_spans`, and in a balanced swarm nearly every look ends with it.
    """
    start, end = span
    speed = load.speed_of(capacity)
    throughput_L = load.throughput_L.copy()
    throughput_L[start:end] += speed / (end - start)
    relative_L = throughput_L / throughput_L.mean() + FLOOR
    need_L = _need(relative_L)
    need = need_L.mean()
    slope_L = need_L / relative_L * (need ** (-1 / POWER) / need)
    share, bound = speed / throughput_L.sum(), throughput_L.mean()
    lengths = np.array([end - start, max(capacity.fit, end - start)], np.float64)
    own_hole, least_hole = _hole(speed / bound, lengths, load.num_blocks)
    planned_L = load.planned_L.copy()
    planned_L[start:end] += 1
    lone = LONE / (load.num_servers + 1) * np.count_nonzero(planned_L < 2)
    risk = load.share * (LOSS * (own_hole - least_hole) + lone) / share
    hops = _hop(load) * (1 / lengths[0] - 1 / lengths[1])
    return float(slope_L.max() - slope_L[start:end].mean() + risk + hops)


def _hop(load: BlockLoad) -> float:
    servers = load.num_servers / load.share
    return HOP * servers**2 / (servers**2 + HOP_SERVERS**2)


def _hole(relative_speed: float, lengths: Floats, num_blocks: int) -> Floats:
    """What the loss of a server takes from an even swarm, for each length of its span."""
    left = np.maximum(1.0 - relative_speed / lengths, 0.0) + FLOOR
    even = _need(np.array(1.0 + FLOOR))
    need = even + lengths / num_blocks * (_need(left) - even)
    hole: Floats = 1.0 + FLOOR - need ** (-1 / POWER)
    return hole


def _need(relative: Floats) -> Floats:
    square = relative * relative
    fourth = square * square
    return 1.0 / (fourth * fourth)  # to the power of -POWER, and much quicker than that


@functools.lru_cache(maxsize=64)
def _windows(num_blocks: int, fit: int) -> tuple[Floats, Integers, Booleans]:
    """Lengths (W,), the end of each window (W, S), and whether it is within the model."""
    lengths = np.arange(1, fit + 1)
    ends = np.arange(num_blocks)[None, :] + lengths[:, None]
    return lengths.astype(np.float64), np.minimum(ends, num_blocks), ends <= num_blocks


def _counts(is_such_L: Booleans, ends_WS: Integers) -> Floats:
    """How many such blocks each window has."""
    if not is_such_L.any():  # nearly always, in a swarm of any size
        return np.zeros(ends_WS.shape)
    sums = np.concatenate([[0.0], np.cumsum(is_such_L)])
    counts: Floats = sums[ends_WS] - sums[:-1]
    return counts


def _window_sums(values_WL: Floats, ends_WS: Integers) -> Floats:
    sums = np.zeros((values_WL.shape[0], values_WL.shape[1] + 1))
    np.cumsum(values_WL, axis=1, out=sums[:, 1:])
    windows: Floats = np.take_along_axis(sums, ends_WS, axis=1) - sums[:, :-1]
    return windows

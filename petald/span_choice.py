"""The choice of a span by a server that joins, and of a model by one that could host several.

Pure. Blocks that nobody serves come first of all; then the span counts with which the whole swarm
does best, which may be shorter than what fits: see `petald.span_scores`.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from petald.block_load import BlockLoad, Capacity
from petald.span_scores import score_spans
from petald.swarm import Booleans

AS_GOOD = 0.01
"""Spans whose gain is within this part of the best one's are as good: the view is older than that
is exact, and servers that start together must not all take the same one."""

M = TypeVar("M", bound=Hashable)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOffer:
    """A model that a server could host.

    Attributes:
        load: what the others do for it.
        capacity: what this server could do for it.
        demand: steps a second that are asked of the model; none where that is not known.
    """

    load: BlockLoad
    capacity: Capacity
    demand: float | None = None

    @property
    def is_here(self) -> Booleans:
        """Of which blocks this server has the weights, ``(L,)``."""
        return ~np.isin(np.arange(self.load.num_blocks), list(self.capacity.missing))

    @property
    def coverable(self) -> float:
        """The part of the model that nobody serves and this server could, at most."""
        if self.load.planned_L.all():
            return 0.0
        scores = score_spans(self.load, self.capacity)
        covered_WS = np.where(scores.is_possible_WS, scores.newly_covered_WS, 0.0)
        return float(covered_WS.max()) / self.load.num_blocks


def choose_span(load: BlockLoad, capacity: Capacity, *, rng: random.Random) -> tuple[int, int]:
    """The span that a server without one does the swarm most good on.

    Args:
        load: what the others do, claims counted as made.
        capacity: of the server; at least one block fits, and one is here.
        rng: chooses between spans that are as good, so that servers that start together spread.
    """
    num_blocks = load.num_blocks
    if not (load.planned_L.any() or capacity.missing):
        return _choose_tile(num_blocks, min(capacity.fit, num_blocks), rng)
    scores = score_spans(load, capacity)
    covered_WS = np.where(scores.is_possible_WS, scores.newly_covered_WS, -1.0)
    candidates = np.flatnonzero(covered_WS == covered_WS.max())
    worth = scores.worth_WS.ravel()[candidates]
    least_gain = (worth.max() - worth.min()) * (1 - AS_GOOD)
    good = candidates[worth >= worth.min() + least_gain]
    row, start = divmod(int(good[rng.randrange(len(good))]), num_blocks)
    return start, start + row + 1


def _choose_tile(num_blocks: int, fit: int, rng: random.Random) -> tuple[int, int]:
    """One of the fewest equal parts that the model can be cut into.

    Where nobody serves yet, whole windows by chance would cover the model's ends least: the first
    block lies in one of them, a middle one in as many as there are blocks in a window.
    """
    tiles = -(-num_blocks // fit)
    tile = rng.randrange(tiles)
    return tile * num_blocks // tiles, (tile + 1) * num_blocks // tiles


def choose_model(offers: Mapping[M, ModelOffer], *, rng: random.Random) -> M:
    """The model that needs a server most.

    First comes the one of which this server can cover most that nobody does, relative to its size.
    Where it can cover nothing anew, the one whose least-served block is furthest behind what is
    asked of it, of the blocks that are here. A model whose demand is not known is taken to be asked
    for what it would get if the throughput of all the models were shared out evenly.

    Args:
        offers: by whatever the models are known by, one at least; a block of each fits and is here.
        rng: breaks ties.
    """
    bounds = [float(offer.load.throughput_L.mean()) / offer.load.share for offer in offers.values()]
    usual = sum(bounds) / len(bounds)

    def need(offer: ModelOffer) -> tuple[float, float]:
        coverable = offer.coverable
        demand = usual if offer.demand is None else offer.demand
        served = float(offer.load.throughput_L[offer.is_here].min()) / offer.load.share
        if demand <= 0:
            return -coverable, float("inf")
        return -coverable, served / demand

    needs = {name: need(offer) for name, offer in offers.items()}
    most = min(needs.values())
    return rng.choice([name for name, one in needs.items() if one == most])

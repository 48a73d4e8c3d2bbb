"""A lane: one of the parallel chains that a batch goes through, and what becomes of it.

Pieces know nothing of each other, so a lane is but a plan: which server runs which blocks now. Who
finds that a hop fails has it replaced; the pieces that come later, and those that failed with it,
find the new one. Invariant: the hops of a lane cover its blocks, in order, without a gap.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import trio

from kernels.errors import BadAdapter
from p2p.wire.pass_messages import (
    CODE_MISSING_ADAPTER,
    CODE_NOT_FINITE,
    CODE_SEQUENCE_TOO_LONG,
    CODE_UNKNOWN_ADAPTER,
)
from petald.errors import HopFailed, MissingBlocks, NotFinite
from petald.parallel_routing import ChainShare
from petald.routing import Hop
from petald.session_actions import Moved, Waiting

LEAST_PIECES = 0.5
"""A chain whose share of the batch is less than half a piece would only be waited for."""

RETRY_S = 1.0
"""Between two looks for a server where there is none."""

FINAL_REASONS = (CODE_NOT_FINITE, CODE_SEQUENCE_TOO_LONG, CODE_MISSING_ADAPTER)
"""Where no other server is left after such a failure, waiting is of no use."""

INNOCENT_REASONS = (
    "draining",
    "overloaded",
    CODE_UNKNOWN_ADAPTER,
    CODE_SEQUENCE_TOO_LONG,
    CODE_MISSING_ADAPTER,
)
"""A server that refuses in good faith is not used by this job, but not penalised."""

News = Callable[[Moved | Waiting], None]


class PassChooser(Protocol):
    """Who knows the swarm."""

    async def choose_lanes(
        self, *, start: int, end: int, max_lanes: int, excluded: frozenset[str], is_retry: bool
    ) -> Sequence[ChainShare]:
        """Parallel chains for some blocks, the widest first.

        Raises:
            MissingBlocks: nobody can run some of them now.
        """

    def penalise(self, peer: str) -> None:
        """A peer did not do its part."""


@dataclass(eq=False, slots=True)
class LaneKeeper:
    """What the lanes of one batch share.

    Attributes:
        chooser: finds servers.
        max_wait_s: how long to wait where nobody can run some blocks.
        on_news: told of what happens to a chain; must not block.
        excluded: peers that failed here.
        repeated: how many requests failed.
        waiting_since: for blocks that nobody new can run, by the first one: since when, until a
            piece got through them.
    """

    chooser: PassChooser
    max_wait_s: float
    on_news: News
    excluded: set[str] = field(default_factory=set)
    repeated: int = 0
    waiting_since: dict[int, float] = field(default_factory=dict)

    def on_success(self, hop: Hop) -> None:
        """A piece got through some blocks."""
        for block in [block for block in self.waiting_since if hop.start <= block < hop.end]:
            del self.waiting_since[block]

    async def choose(
        self, start: int, end: int, *, max_lanes: int = 1, last: Exception | None = None
    ) -> Sequence[ChainShare]:
        """Chains for some blocks; waits where there are none.

        Args:
            start: first block.
            end: the block after the last one.
            max_lanes: how many.
            last: how the server failed that is to be replaced.

        Raises:
            MissingBlocks: it was waited long enough, though some may have been tried meanwhile.
            HopFailed, BadAdapter: as ``last``, where it is of no use to wait.
            NotFinite: in the place of such a ``last``, where there is nobody else to ask.
        """
        while True:
            try:
                return await self.chooser.choose_lanes(
                    start=start,
                    end=end,
                    max_lanes=max_lanes,
                    excluded=frozenset(self.excluded),
                    is_retry=last is not None,
                )
            except MissingBlocks as error:
                if last is not None and is_final(last):
                    if isinstance(last, HopFailed) and last.reason == CODE_NOT_FINITE:
                        raise NotFinite(
                            f"the only server of blocks {start}:{end} gives numbers that are not "
                            "finite; lower the learning rate, or look at what is sent"
                        ) from last
                    raise last from error
                now = trio.current_time()
                waited_s = now - self.waiting_since.setdefault(start, now)
                if waited_s >= self.max_wait_s:
                    if last is None:
                        raise
                    text = f"{error}; the last that was tried: {last}"
                    raise MissingBlocks(text, ranges=error.ranges) from last
                self.on_news(Waiting(str(error), waited_s, self.max_wait_s))
            # Whoever failed once may be back; the penalties still make it the last choice.
            self.excluded.clear()
            await trio.sleep(min(RETRY_S, self.max_wait_s))


class Lane:
    """One chain.

    Args:
        keeper: of the batch.
        hops: that cover its blocks.
        share: of the batch that should go through it; 1 where it is to take what it can.
    """

    def __init__(self, keeper: LaneKeeper, hops: Sequence[Hop], share: float = 1.0) -> None:
        self.share = share
        self._keeper = keeper
        self._hops = tuple(hops)
        self._placed = (0,) * len(self._hops)  # the generation of each
        self._lock = trio.Lock()
        self.generation = 0

    @property
    def hops(self) -> tuple[Hop, ...]:
        """As they are now."""
        return self._hops

    def hops_between(self, start: int, end: int) -> tuple[Hop, ...]:
        """The hops for some blocks, the first and the last cut to fit."""
        return tuple(
            replace(hop, start=max(hop.start, start), end=min(hop.end, end))
            for hop in self._hops
            if hop.start < end and start < hop.end
        )

    def on_success(self, hop: Hop) -> None:
        """A piece got through a hop."""
        self._keeper.on_success(hop)

    async def replace(self, failed: Hop, error: HopFailed | BadAdapter, generation: int) -> None:
        """Finds others for the blocks of a hop that failed, unless that was done meanwhile.

        Args:
            failed: the hop.
            error: how it failed.
            generation: of the lane, when it was asked.

        Raises:
            MissingBlocks: there are none, for longer than is to be waited.
            HopFailed, BadAdapter: it is of no use to wait.
        """
        keeper = self._keeper
        keeper.repeated += 1
        began_at = trio.current_time()
        async with self._lock:
            at = next((n for n, hop in enumerate(self._hops) if _holds(hop, failed)), None)
            if at is None or self._placed[at] > generation:
                return
            reason = error.reason if isinstance(error, HopFailed) else error.code
            if reason not in INNOCENT_REASONS and isinstance(error, HopFailed):
                keeper.chooser.penalise(failed.peer)
            keeper.excluded.add(failed.peer)
            old = self._hops[at]
            chains = await keeper.choose(old.start, old.end, last=error)
            new = chains[0].hops
            self.generation += 1
            self._hops = (*self._hops[:at], *new, *self._hops[at + 1 :])
            placed = (self.generation,) * len(new)
            self._placed = (*self._placed[:at], *placed, *self._placed[at + 1 :])
        keeper.on_news(
            Moved(
                old.start,
                old.end,
                (old.peer,),
                tuple(hop.peer for hop in new),
                reason or "hop_failed",
                silent_s=0.0,
                pause_s=trio.current_time() - began_at,
                replayed_tokens=0,
                handed_over_tokens=0,
            )
        )


def make_lanes(keeper: LaneKeeper, chains: Sequence[ChainShare], pieces: int) -> list[Lane]:
    """Lanes for the chains that are worth a piece.

    The widest takes whatever is left, so that no piece waits for a slow one; the others no more
    than their share.
    """
    total = sum(chain.tokens_per_s for chain in chains)
    lanes = [Lane(keeper, chains[0].hops)]
    for chain in chains[1:]:
        share = chain.tokens_per_s / total
        if share * pieces >= LEAST_PIECES:
            lanes.append(Lane(keeper, chain.hops, share))
    return lanes


def is_final(error: Exception) -> bool:
    """Whether another try at the same server would end the same."""
    if isinstance(error, HopFailed):
        return error.reason in FINAL_REASONS
    return isinstance(error, BadAdapter | NotFinite)


def largest_hop(chains: Sequence[ChainShare]) -> int:
    """The most blocks that one hop has."""
    hops = itertools.chain.from_iterable(chain.hops for chain in chains)
    return max(hop.end - hop.start for hop in hops)


def _holds(hop: Hop, failed: Hop) -> bool:
    return hop.peer == failed.peer and hop.start <= failed.start and failed.end <= hop.end

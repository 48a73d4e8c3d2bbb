"""The first span of a server that may host any: chosen beside others that choose at the same time.

A choice is announced as a claim before anything is loaded, and looked at again when others' claims
can be known: of two that take the same place the later one chooses again. So servers that start
together cover a model together.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

import trio

from petald.block_load import BlockLoad, Capacity, confirm_gaps, read_load, wants_whole
from petald.log import get_logger
from petald.span_choice import choose_span
from petald.span_scores import score_spans
from petald.swarm import Announcement, Claim, ServerState, SwarmView

log = get_logger(__name__)

SETTLE_S = 1.0
"""Between a claim and the second look: an announcement is out, and read, in less on most ways."""

MAX_CHOICES = 5
"""Each time somebody else was quicker. The rest is left to moves."""

CLEARLY_BETTER = 0.25
"""Of the range of what spans are worth: for less than that nobody chooses again, since each choice
takes a second, and others choose meanwhile."""


class ReadView(Protocol):
    """Gives the swarm view of now."""

    async def __call__(self, *, whole: bool = False) -> SwarmView:
        """Reads it; in a large swarm that is a sample, unless it is to be whole."""


async def read_place(read_view: ReadView, own: str) -> BlockLoad:
    """What a server without a place decides by: its view, and a whole one where that lacks blocks.

    Args:
        read_view: reads.
        own: the peer id of the server.
    """
    load = read_load(await read_view(), own=own)
    if wants_whole(load):
        load = confirm_gaps(load, read_load(await read_view(whole=True), own=own))
    return load


class Joining:
    """A server that hosts nothing yet; what it announces of itself.

    Args:
        template: its announcement, but for what the claim decides.
        wall_clock: seconds since the epoch; orders the claims.
    """

    def __init__(
        self, template: Announcement, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._template = template
        self._wall_clock = wall_clock
        self.claim: Claim | None = None

    def claim_span(self, start: int, end: int) -> Claim:
        """Says from now on that these blocks are going to be hosted."""
        made_at_ms = int(self._wall_clock() * 1e3)
        self.claim = claim = Claim(start=start, end=end, made_at_ms=made_at_ms)
        return claim

    def give_up(self) -> None:
        """Says from now on that nothing is going to be hosted after all."""
        self._template = replace(self._template, state=ServerState.LEAVING)

    def make_announcement(self) -> Announcement:
        """What this server says of itself, when it has claimed something."""
        claim = self.claim
        assert claim is not None
        return replace(self._template, start=claim.start, end=claim.end, claim=claim)


async def choose_first_span(
    joining: Joining,
    capacity: Capacity,
    *,
    peer: str,
    read_view: ReadView,
    announce: Callable[[], Awaitable[object]],
    rng: random.Random,
) -> tuple[int, int]:
    """Chooses a span, and claims it.

    Args:
        joining: holds the claim.
        capacity: of this server.
        peer: its id.
        read_view: reads the swarm view.
        announce: tells the swarm what ``joining`` says, at once.
        rng: of choices among equals, and of delays.
    """
    load = await read_place(read_view, peer)
    for choice in range(1, MAX_CHOICES + 1):
        start, end = choose_span(load, capacity, rng=rng)
        claim = joining.claim_span(start, end)
        log.debug("claimed a first span", blocks=f"{start}:{end}", servers=load.num_servers)
        await announce()
        if choice == MAX_CHOICES:
            break
        await trio.sleep(SETTLE_S * rng.uniform(0.7, 1.3))
        load = await read_place(read_view, peer)
        load = load.without_claims_after(claim.made_at_ms, peer)
        if _is_as_good_as_any(load, capacity, start, end):
            break
    return start, end


def _is_as_good_as_any(load: BlockLoad, capacity: Capacity, start: int, end: int) -> bool:
    scores = score_spans(load, capacity)
    covered = scores.newly_covered(start, end)
    if covered < scores.newly_covered_WS[scores.is_possible_WS].max():
        return False
    is_rival_WS = scores.is_possible_WS & (scores.newly_covered_WS == covered)
    worths = scores.worth_WS[is_rival_WS]
    span = float(worths.max() - worths.min())
    return bool(scores.worth(start, end) >= worths.max() - CLEARLY_BETTER * span)

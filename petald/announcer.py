"""Keeping the own announcement in the directory: at once, then often enough not to expire.

What every reader of the swarm has to fetch anew is told only where it would change what readers do:
load and measured times are hints, and swing. As long as it is not, the directory is told only that
the announcement still holds.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable

import trio

from p2p.directory import Directory
from p2p.errors import P2PError
from petald.log import get_logger
from petald.swarm import Announcement, directory_key

log = get_logger(__name__)

TTL_S = 45.0
"""Below the design's minute, so that a dead server is forgotten within it."""

PERIOD_S = 15.0
"""Two announcements may be lost before one expires."""

FIRST_PERIOD_S = 2.0
"""While nobody but the own peer holds the record: the bootstrap may not have answered yet."""

WITHDRAW_DEADLINE_S = 3.0

RENEW_S = 300.0
"""What is not worth telling is told after so long: round trips, and times that crept."""

TIME_RATIO = 1.25
"""A step's or a token's time, the wait for the device and that for the link, that others should
know of: a choice of a chain errs by a quarter of one hop."""

WAIT_MS = 5.0
"""Of both waits, on both sides of `TIME_RATIO`: less is nothing beside a step."""

CACHE_RATIO = 2.0
CACHE_PART = 1 / 8
"""Free tokens that others should know of: twice or half as many, or an eighth of the cache."""


def is_worth_telling(told: Announcement, said: Announcement) -> bool:
    """Whether others should know what a server says now, by what they were told."""
    steady = dataclasses.replace(
        said,
        step_ms=told.step_ms,
        prefill_ms=told.prefill_ms,
        queue_ms=told.queue_ms,
        send_ms=told.send_ms,
        free_cache_tokens=told.free_cache_tokens,
        round_trips=told.round_trips,
    )
    if steady != told or (said.round_trips and not told.round_trips):
        return True
    free, told_free = said.free_cache_tokens, told.free_cache_tokens
    return (
        _ratio(said.step_ms, told.step_ms) > TIME_RATIO
        or _ratio(said.prefill_ms, told.prefill_ms) > TIME_RATIO
        or _ratio(said.queue_ms + WAIT_MS, told.queue_ms + WAIT_MS) > TIME_RATIO
        or _ratio(said.send_ms + WAIT_MS, told.send_ms + WAIT_MS) > TIME_RATIO
        or _ratio(free, told_free) > CACHE_RATIO
        or abs(free - told_free) > CACHE_PART * said.cache_tokens
    )


def _ratio(one: float, other: float) -> float:
    """Of the greater to the lesser; infinite where one of them is nothing."""
    if one == other:
        return 1.0
    return max(one, other) / min(one, other) if min(one, other) > 0 else math.inf


class Announcer:
    """Announces this daemon's server.

    Args:
        directory: where to.
        make_announcement: says what holds now.
        rng: spreads the announcements of a swarm that started together.
        wall_clock: seconds since the epoch; orders the announcements.
    """

    def __init__(
        self,
        directory: Directory,
        make_announcement: Callable[[], Announcement],
        *,
        rng: random.Random,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._wall_clock = wall_clock
        self._directory = directory
        self._make = make_announcement
        self._rng = rng
        self._changed = trio.Event()
        self._told: Announcement | None = None
        self._told_at = -math.inf

    def speak_for(self, make_announcement: Callable[[], Announcement]) -> None:
        """Lets another say what holds from now on."""
        self._make = make_announcement

    def announce_soon(self) -> None:
        """Something changed that others should know before the period is over."""
        self._changed.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Announces until cancelled; started when the first announcement is out."""
        has_started = False
        while True:
            holders = await self.publish()
            if not has_started:
                task_status.started()
                has_started = True
            period_s = PERIOD_S if holders > 1 else FIRST_PERIOD_S
            with trio.move_on_after(period_s * self._rng.uniform(0.8, 1.2)):
                await self._changed.wait()
            self._changed = trio.Event()

    async def withdraw(self) -> None:
        """Announces what `make_announcement` says now (that this server leaves), once, at once."""
        with trio.move_on_after(WITHDRAW_DEADLINE_S):
            await self.publish()

    async def publish(self) -> int:
        """Announces what holds now, at once; says how many peers hold it, 0 if it failed."""
        said, now = self._make(), trio.current_time()
        if (
            self._told is None
            or now - self._told_at >= RENEW_S
            or is_worth_telling(self._told, said)
        ):
            self._told, self._told_at = said, now
        try:
            return await self._directory.publish(
                directory_key(self._told.model),
                self._told.encode(),
                ttl_s=TTL_S,
                sequence=int(self._wall_clock() * 1e3),
            )
        except P2PError as error:
            log.warning("announcement failed", code=error.code, reason=str(error))
            return 0

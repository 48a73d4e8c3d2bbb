"""Keeping the own announcement in the directory: at once, then often enough not to expire."""

from __future__ import annotations

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
        announcement = self._make()
        try:
            return await self._directory.publish(
                directory_key(announcement.model),
                announcement.encode(),
                ttl_s=TTL_S,
                sequence=int(self._wall_clock() * 1e3),
            )
        except P2PError as error:
            log.warning("announcement failed", code=error.code, reason=str(error))
            return 0

"""Taking turns at something that one at a time may use, peer by peer.

Each peer that waits gets every n-th turn, however many of its requests wait. Invariant: a turn that
was given is used, or passed on.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Turns:
    """Who is next."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: OrderedDict[str, deque[trio.Event]] = OrderedDict()

    @asynccontextmanager
    async def take(self, peer: str) -> AsyncIterator[None]:
        """Waits for a turn, and has it within the block."""
        await trio.lowlevel.checkpoint()
        if self._is_taken:
            await self._wait(peer)
        self._is_taken = True
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, peer: str) -> None:
        event = trio.Event()
        self._waiting.setdefault(peer, deque()).append(event)
        try:
            await event.wait()
        except trio.Cancelled:
            if event.is_set():  # it was given meanwhile
                self._pass_on()
            else:
                own = self._waiting[peer]
                own.remove(event)
                if not own:
                    del self._waiting[peer]
            raise

    def _pass_on(self) -> None:
        if not self._waiting:
            self._is_taken = False
            return
        peer, own = self._waiting.popitem(last=False)
        event = own.popleft()
        if own:
            self._waiting[peer] = own  # behind all others
        event.set()

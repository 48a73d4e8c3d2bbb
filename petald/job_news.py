"""What an app is told of the chains of its job, while the job goes on.

Invariant: whoever has news never waits for the app to read them; what it does not read in time is
not told.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from p2p.wire.control_messages import MAX_MOVES, Chain, ChainMove, Progress
from p2p.wire.message import Message
from petald.session_actions import Moved, Waiting

WAITING_PERIOD_S = 5.0
"""Between two tellings that a job still waits: it is tried more often than a person can read."""

MAX_TOLD = 2048
"""Characters of why a job waits: it quotes what peers say."""

MAX_NEWS = 16
"""News of the chain that wait for an app to read; what is more is not told."""


class JobNews:
    """The news of one job.

    Args:
        job: its number.
        send: takes what the app is to be told.
        chain: gives the chain as it is, for the news of a move.

    Attributes:
        moves: what happened to the chains, the last so many.
    """

    def __init__(
        self,
        job: int,
        send: Callable[[Message], Awaitable[None]],
        *,
        chain: Callable[[], Chain] = lambda: (),
    ) -> None:
        self.moves: deque[ChainMove] = deque(maxlen=MAX_MOVES)
        self._job = job
        self._send = send
        self._chain = chain
        self._waiting_told_at = -math.inf
        self._news_in, self._news_out = trio.open_memory_channel[Progress](MAX_NEWS)

    def on_news(self, news: Moved | Waiting) -> None:
        """Takes news; does not block."""
        if isinstance(news, Waiting):
            now = trio.current_time()
            if now - self._waiting_told_at < WAITING_PERIOD_S:
                return
            self._waiting_told_at = now
            limits = f"(for {news.waited_s:.0f} s; waiting up to {news.limit_s:.0f})"
            text = f"{news.text[:MAX_TOLD]} {limits}"
            told = Progress(job=self._job, event="waiting", text=text)
        elif not news.old:  # the chain as it was opened is told of by itself
            return
        else:
            move = _wire_move(news)
            self.moves.append(move)
            text = f"blocks {move.start}:{move.end} moved after {move.reason}"
            told = Progress(job=self._job, event="moved", text=text, move=move, chain=self._chain())
        with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError):
            self._news_in.send_nowait(told)

    async def tell(self) -> None:
        """Tells the app, until it is cancelled."""
        async for told in self._news_out:
            await self._send(told)


def _wire_move(moved: Moved) -> ChainMove:
    return ChainMove(
        start=moved.start,
        end=moved.end,
        old=moved.old,
        new=moved.new,
        reason=moved.code,
        silent_s=moved.silent_s,
        pause_s=moved.pause_s,
        replayed_tokens=moved.replayed_tokens,
        handed_over_tokens=moved.handed_over_tokens,
    )

"""Many rows through a session: in pieces, several under way at once.

So the hops work on them as a pipeline. Pieces are submitted in order, whatever makes them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from p2p.wire.session_messages import Wanted
from p2p.wire.tensor import WireTensor
from petald.chain_client import ChainSession
from petald.errors import PetaldError
from petald.session_actions import StepResultRows

WINDOW = 4
"""Pieces under way at once: more than most chains have hops, so that none waits idle, and few
enough that a failure loses little."""

PIECE_TOKENS = 128
"""Small enough that the hops of a chain overlap on a prompt of some hundred tokens, large enough
that the matrix products are bound by arithmetic (``benchmarks/decode.py``)."""

MakePiece = Callable[[int, int], Awaitable[WireTensor]]


async def run_pieces(
    session: ChainSession,
    start: int,
    end: int,
    make_piece: MakePiece,
    *,
    is_last_wanted: bool,
    on_piece: Callable[[int], Awaitable[None]] | None = None,
) -> list[StepResultRows]:
    """Runs the rows ``[start, end)`` of a session; gives the pieces' results, in order.

    Args:
        session: open; cut back to ``start`` first.
        start: position of the first row.
        end: the one after the last; at least one row is needed.
        make_piece: gives some of the rows, ``[tokens, hidden]``, in the session's codec.
        is_last_wanted: only the last row's output is wanted, and not all of them.
        on_piece: told of how many rows a piece had that is done.

    Raises:
        PetaldError: as `ChainSession.run_step`; what was wanted first of those that failed.

    Cancellation: as `ChainSession.run_step`, from the first piece on that was not done.
    """
    size = min(PIECE_TOKENS, session.max_step_tokens)
    starts = range(start, end, size)
    results: dict[int, StepResultRows] = {}
    failures: list[PetaldError] = []
    window = trio.CapacityLimiter(WINDOW)

    async def run_piece(
        first: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        last = min(first + size, end)
        hidden = await make_piece(first, last)
        wanted = Wanted.ALL
        if is_last_wanted:
            wanted = Wanted.LAST if last == end else Wanted.NONE
        async with window:
            task_status.started()
            try:
                results[first] = await session.run_step(hidden, position=first, wanted=wanted)
            except PetaldError as error:
                failures.append(error)
                return
        if on_piece is not None:
            await on_piece(last - first)

    async with trio.open_nursery() as nursery:
        for first in starts:
            await nursery.start(run_piece, first)
            if failures:
                break
    if failures:
        raise failures[0]
    return [results[first] for first in starts]

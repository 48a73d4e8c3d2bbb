"""The rows of a batch as an app sends them, while they come.

They go into a history as they arrive, so that whoever reads the socket never waits. Invariant: row
n of the history is row n of the batch.

Shapes: D hidden size.
"""

from __future__ import annotations

import trio

from p2p.wire.tensor import RAW, WireTensor
from petald.errors import BadRequest, PetaldError
from petald.history import InputHistory

FLOATS = ("float64", "float32", "bfloat16", "float16")


class IncomingRows:
    """Rows on their way.

    Args:
        history: takes them; empty.
        rows: how many will come.
    """

    def __init__(self, history: InputHistory, rows: int) -> None:
        self.history = history
        self.rows = rows
        self._received = 0
        self._form: tuple[str, tuple[int, ...]] | None = None
        self._error: PetaldError | None = None
        self._more = trio.Event()

    def take(self, row: int, hidden: WireTensor) -> None:
        """Takes the next rows, ``[rows, D]``; what is wrong with them is told to those who wait."""
        if self._error is None:
            try:
                self._check(row, hidden)
                self.history.append(hidden)
                self._received += hidden.shape[0]
            except PetaldError as error:
                self._error = error
        self._more.set()
        self._more = trio.Event()

    async def wait_for(self, row: int) -> None:
        """Waits until all rows before this one are here.

        Raises:
            BadRequest: what came is no such batch.
            SessionLost: it cannot be kept.
        """
        while self._received < row:
            if self._error is not None:
                raise self._error
            await self._more.wait()

    def _check(self, row: int, hidden: WireTensor) -> None:
        count = hidden.shape[0] if len(hidden.shape) == 2 else 0
        if not count or not hidden.shape[1] or row != self._received or row + count > self.rows:
            raise BadRequest(
                f"rows of the shape {list(hidden.shape)} came at row {row}; of {self.rows} rows, "
                f"those from {self._received} on were expected"
            )
        form = (hidden.dtype, hidden.shape[1:])
        if hidden.codec != RAW or hidden.dtype not in FLOATS or form != (self._form or form):
            raise BadRequest(
                f"rows of {hidden.dtype} {list(hidden.shape)} as {hidden.codec[:32]!r} came; raw "
                "floats of one kind and width were expected"
            )
        self._form = form

"""What crossed the borders between hops: kept by the client, to rebuild a hop from.

All histories of a daemon share one limit of memory; what goes beyond it lies in unnamed temporary
files. Rows are kept as they were on the wire, encoded, so that a codec that loses bits is replayed
to the same ones. A file is read and written on the event loop: a step's rows are a few KB, which
the page cache takes in microseconds, and a replay reads no more than a piece at a time.

Invariant: what `read` gives is what `append` took, row for row, in the same dtype and codec.
"""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import IO

from p2p.wire.tensor import WireTensor
from petald.errors import SessionLost


class HistoryStore:
    """The memory that histories share.

    Args:
        limit_bytes: beyond which they go to files.
        folder: for the files; the system's own for temporary files if none is given.
    """

    def __init__(self, *, limit_bytes: int, folder: Path | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._folder = folder
        self.memory_bytes = 0
        self.spilled_bytes = 0

    def open(self) -> InputHistory:
        """A new, empty history."""
        return InputHistory(self)

    def has_room(self, size: int) -> bool:
        """Whether so many more bytes may be kept in memory."""
        return self.memory_bytes + size <= self._limit_bytes

    def make_file(self) -> IO[bytes]:
        """A file without a name, which is gone when it is closed."""
        return tempfile.TemporaryFile(prefix="petald-history-", dir=self._folder)


@dataclass(eq=False, slots=True)
class _Part:
    """Rows of one dtype and codec.

    Attributes:
        offset: where they begin in the history's file; none where they are in memory.
    """

    dtype: str
    codec: str
    hidden_size: int
    row_bytes: int
    start: int
    rows: int = 0
    memory: bytearray = field(default_factory=bytearray)
    offset: int | None = None


class InputHistory:
    """A `petald.session_actions.History` of wire tensors; made by `HistoryStore.open`.

    What goes to a file goes to one, however often the codec changes: a peer may change it at every
    step, and files are few.
    """

    def __init__(self, store: HistoryStore) -> None:
        self._store = store
        self._parts: list[_Part] = []
        self._file: IO[bytes] | None = None
        self._file_bytes = 0

    @property
    def rows(self) -> int:
        """How many there are."""
        return self._parts[-1].start + self._parts[-1].rows if self._parts else 0

    def append(self, hidden: WireTensor) -> None:
        """Adds rows, ``[tokens, hidden]``, at the end.

        Raises:
            SessionLost: they cannot be written; the history is of no more use.
        """
        tokens, hidden_size = hidden.shape
        row_bytes = len(hidden.data) // tokens
        part = self._parts[-1] if self._parts else None
        if part is None or (part.dtype, part.codec, part.row_bytes) != (
            hidden.dtype,
            hidden.codec,
            row_bytes,
        ):
            part = _Part(hidden.dtype, hidden.codec, hidden_size, row_bytes, self.rows)
            self._parts.append(part)
        try:
            self._write(part, hidden.data)
        except OSError as error:
            raise SessionLost(
                f"what a session sent cannot be kept ({error.strerror}); free some disk space, or "
                "set [route] history_bytes higher"
            ) from error
        part.rows += tokens

    def truncate(self, rows: int) -> None:
        """Forgets all rows from a position on."""
        while self._parts and self._parts[-1].start >= rows:
            self._drop(self._parts.pop())
        if self._parts:
            part = self._parts[-1]
            kept = min(part.rows, rows - part.start)
            freed = (part.rows - kept) * part.row_bytes
            part.rows = kept
            if not freed:
                return
            if part.offset is not None:
                self._store.spilled_bytes -= freed
                self._file_bytes -= freed
            else:
                del part.memory[kept * part.row_bytes :]
                self._store.memory_bytes -= freed

    def read(self, start: int, end: int) -> WireTensor:
        """Rows from ``start`` on, up to ``end`` or to where their dtype or codec changes."""
        part = self._parts[bisect_right(self._parts, start, key=attrgetter("start")) - 1]
        count = min(end - start, part.rows - (start - part.start))
        if count < 1:
            raise ValueError(f"rows {start}:{end} are not in a history of {self.rows}")
        first = (start - part.start) * part.row_bytes
        size = count * part.row_bytes
        if part.offset is not None:
            assert self._file is not None
            data = os.pread(self._file.fileno(), size, part.offset + first)
        else:
            data = bytes(memoryview(part.memory)[first : first + size])
        return WireTensor(part.dtype, (count, part.hidden_size), data, part.codec)

    def close(self) -> None:
        """Gives back memory and the file."""
        while self._parts:
            self._drop(self._parts.pop())
        if self._file is not None:  # what was to be its first part could not be written
            self._file.close()
            self._file = None

    def _write(self, part: _Part, data: bytes | memoryview) -> None:
        store = self._store
        if part.offset is None and not store.has_room(len(data)):
            self._spill(part)
        if part.offset is None:
            part.memory += data
            store.memory_bytes += len(data)
        else:
            self._write_to_file(data)

    def _spill(self, part: _Part) -> None:
        """Moves the last part from memory to the end of the file."""
        offset = self._file_bytes
        self._write_to_file(part.memory)
        part.offset = offset
        self._store.memory_bytes -= len(part.memory)
        part.memory = bytearray()

    def _write_to_file(self, data: bytes | bytearray | memoryview) -> None:
        if self._file is None:
            self._file = self._store.make_file()
        _write_all(self._file, data, self._file_bytes)  # or what was there stays as it was
        self._file_bytes += len(data)
        self._store.spilled_bytes += len(data)

    def _drop(self, part: _Part) -> None:
        """Gives back what the last part held, which is the end of the file if it is there."""
        size = part.rows * part.row_bytes
        if part.offset is None:
            self._store.memory_bytes -= size
            return
        self._store.spilled_bytes -= size
        self._file_bytes = part.offset
        if self._file is not None and not part.offset:
            self._file.close()
            self._file = None


def _write_all(file: IO[bytes], data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written

"""Decode steps whose kernels are recorded once and launched together.

On a GPU a decode step is hundreds of small kernels, and launching each from Python takes longer
than it runs. What depends on nothing but the number of rows is recorded for each number of rows,
when that comes up first, as a graph that one call launches: a whole step, where attention is a
kernel that reads from a tensor where the sequences are. Attention whose shapes grow with every
token stays outside, and what lies between two such attentions is a graph.

Others choose through which blocks their steps go. So what goes through a part of them is recorded
only when it has come up several times, and of such recordings there are only so many: the one that
was used longest ago is freed for the next. Steps through all of them are recorded at once, and
stay.

What a graph reads and writes must always lie in the same places, so its inputs and outputs are
buffers, one set for each number of rows, and the arena is that of the recording. Recording is done
by a `Recorder`: `CudaRecorder` makes CUDA graphs; in tests, one for the CPU calls the work again.

Shapes: S rows, D hidden size, N query heads, K key and value heads, H head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.block import DecoderBlock, Place
from kernels.decode_kernel import place_rows
from kernels.kv_cache import CacheArena
from kernels.rotary import Positions

MAX_ROWS = 16
"""More sequences at once are rare, and their kernels are long enough to hide the launches."""

WARM_UPS = 2
"""Runs before a recording, in which libraries allocate what they need and choose their kernels."""

RECORD_AT = WARM_UPS + 1
"""A part is recorded when it comes up for the third time: recording runs it as often. So, by ski
rental, recordings take about as long as the steps themselves at most, whatever is asked for."""

MAX_PARTS = MAX_ROWS
"""Recorded parts, of one number of rows each: as many as all blocks have recordings, none of which
is smaller. So parts take no more memory than those do."""

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs some work, and gives what does the same work again on the same memory."""


class CudaRecorder:
    """Records CUDA graphs.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # What graphs need only while they run they may share, since they run one after the other.
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all: cuBLAS keeps tens of MiB for each that it was ever used on.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the work; see `Recorder`."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(WARM_UPS):
                        work()
            finally:  # also where it fails: what is done instead writes to the same places
                current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads go on using the device meanwhile: they encode what is sent.
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                work()
        return graph.replay


_Part = tuple[int, int, int]
"""A number of rows, and through which blocks."""


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Where the graphs of one number of rows read and write."""

    hidden_SD: torch.Tensor
    x_SD: torch.Tensor
    projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    attended_SA: torch.Tensor
    positions: Positions
    places_2S: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one graph does.

    Attributes:
        rows: of the step.
        ended: the block that it ends, after an attention outside of graphs; or none.
        whole: the blocks that it runs through, attention included.
        begun: the block that it begins, up to an attention outside of graphs; or none.
    """

    rows: int
    ended: int | None
    whole: range
    begun: int | None


class StepGraphs:
    """The decode steps of a span.

    Args:
        blocks: of the span; the kernels of each are the same whatever the numbers are.
        record: makes graphs.
    """

    def __init__(self, blocks: Sequence[DecoderBlock], record: Recorder) -> None:
        self._blocks = blocks
        self._record = record
        self._buffers: dict[int, _Buffers] = {}
        self._graphs: dict[_Piece, Callable[[], None]] = {}
        self._parts: dict[_Part, int] = {}  # how often each has come up
        self._recorded_parts: dict[_Part, None] = {}  # the one used last is the last
        self._arena: weakref.ref[CacheArena] | None = None

    @property
    def recorded(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def takes(self, places: Sequence[Place], blocks: tuple[int, int]) -> bool:
        """Whether `run` is to do a step; counts how often its blocks are gone through.

        It is one of not too many sequences, each of one token, through all blocks or through some
        that come up often.

        Args:
            places: of the sequences.
            blocks: as for `run`.
        """
        rows = len(places)
        if rows > MAX_ROWS or any(place.tokens != 1 for place in places):
            return False
        if blocks == (0, len(self._blocks)):
            return True
        part = rows, *blocks
        seen = self._parts[part] = self._parts.get(part, 0) + 1
        if seen < RECORD_AT:
            return False
        self._recorded_parts.pop(part, None)
        self._recorded_parts[part] = None
        if len(self._recorded_parts) > MAX_PARTS:
            self._free(next(iter(self._recorded_parts)))
        return True

    def run(
        self,
        hidden_SD: torch.Tensor,
        positions: Positions,
        places: Sequence[Place],
        arena: CacheArena,
        blocks: tuple[int, int],
    ) -> torch.Tensor:
        """Runs one token of each sequence through some of the blocks, ``[S, D]``.

        Args:
            hidden_SD: their rows.
            positions: of each row.
            places: of the sequences.
            arena: with the keys and values of all the span's blocks.
            blocks: the first, and the one after the last, counted from the span's first.

        Raises:
            `kernels.decode_kernel.kernel_failures`: the work cannot be recorded on this device.
                What the cache has of these tokens is to be written again.
        """
        self._attach(arena)
        rows = len(places)
        buffers = self._buffers.get(rows)
        if buffers is None:
            buffers = self._buffers[rows] = self._make_buffers(hidden_SD, positions)
        # Recording runs the work, which then writes into the cache where this step will.
        buffers.places_2S.copy_(place_rows(places, hidden_SD.device))
        pieces = self._cut(rows, *blocks)
        graphs = [self._find(piece, arena) for piece in pieces]
        # ... and into the other buffers, so what it runs on comes now.
        buffers.hidden_SD.copy_(hidden_SD)
        for kept, given in zip(buffers.positions, positions, strict=True):
            for kept_part, given_part in zip(kept, given, strict=True):
                kept_part.copy_(given_part)
        for piece, graph in zip(pieces, graphs, strict=True):
            graph()
            if piece.begun is not None:
                cache_KTH = arena.keys_KTH[piece.begun], arena.values_KTH[piece.begun]
                attend = self._blocks[piece.begun].attend
                buffers.attended_SA.copy_(attend(buffers.projected, places, cache_KTH))
        return buffers.hidden_SD.clone()

    def _free(self, part: _Part) -> None:
        """Forgets a part, which then has to come up anew, and the graphs that no others need."""
        del self._parts[part], self._recorded_parts[part]
        whole = [(rows, 0, len(self._blocks)) for rows in self._buffers]
        kept = {piece for one in [*whole, *self._recorded_parts] for piece in self._cut(*one)}
        self._graphs = {piece: graph for piece, graph in self._graphs.items() if piece in kept}

    def _attach(self, arena: CacheArena) -> None:
        """Forgets the graphs that read another arena."""
        if self._arena is None or self._arena() is not arena:
            self._arena = weakref.ref(arena)
            self._graphs = {
                piece: graph for piece, graph in self._graphs.items() if not piece.whole
            }

    def _cut(self, rows: int, first: int, last: int) -> list[_Piece]:
        """A step in pieces, between which are the attentions that cannot be recorded."""
        pieces = []
        ended, start = None, first
        for number in range(first, last):
            if not self._blocks[number].has_decode_kernel:
                pieces.append(_Piece(rows, ended, range(start, number), number))
                ended, start = number, number + 1
        return [*pieces, _Piece(rows, ended, range(start, last), None)]

    def _make_buffers(self, hidden_SD: torch.Tensor, positions: Positions) -> _Buffers:
        x_SD, *projected = self._blocks[0].begin(hidden_SD, positions)
        queries, keys, values = (torch.zeros_like(part).contiguous() for part in projected)
        return _Buffers(
            hidden_SD=torch.zeros_like(hidden_SD).contiguous(),
            x_SD=torch.zeros_like(x_SD),
            projected=(queries, keys, values),
            attended_SA=torch.zeros_like(queries.flatten(1)),
            positions=tuple(
                (cos_S1H.clone().contiguous(), sin_S1H.clone().contiguous())
                for cos_S1H, sin_S1H in positions
            ),
            places_2S=torch.zeros(
                2, hidden_SD.shape[0], dtype=torch.int64, device=hidden_SD.device
            ),
        )

    def _find(self, piece: _Piece, arena: CacheArena) -> Callable[[], None]:
        """The graph of a piece of a step."""
        graph = self._graphs.get(piece)
        if graph is not None:
            return graph
        buffers = self._buffers[piece.rows]

        def work() -> None:
            hidden_SD = buffers.hidden_SD
            if piece.ended is not None:
                finish = self._blocks[piece.ended].finish
                hidden_SD = finish(hidden_SD, buffers.x_SD, buffers.attended_SA)
            for number in piece.whole:
                block = self._blocks[number]
                cache_KTH = arena.keys_KTH[number], arena.values_KTH[number]
                x_SD, *projected = block.begin(hidden_SD, buffers.positions)
                attended_SA = block.attend_rows(projected, buffers.places_2S, cache_KTH)
                hidden_SD = block.finish(hidden_SD, x_SD, attended_SA)
            if piece.begun is not None:
                x_SD, *projected = self._blocks[piece.begun].begin(hidden_SD, buffers.positions)
                buffers.x_SD.copy_(x_SD)
                for kept, made in zip(buffers.projected, projected, strict=True):
                    kept.copy_(made)
            if hidden_SD is not buffers.hidden_SD:
                buffers.hidden_SD.copy_(hidden_SD)

        graph = self._graphs[piece] = self._record(work)
        return graph

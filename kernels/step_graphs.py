"""Decode steps whose kernels are recorded once and launched together.

On a GPU a decode step is hundreds of small kernels, and launching each from Python takes longer
than it runs. What lies between the attentions of two blocks depends on nothing but the number of
rows: it is recorded for each number of rows, when that comes up first, as a graph that one call
launches. Attention itself, whose shapes grow with every token, stays outside: it is a few kernels.

What a graph reads and writes must always lie in the same places, so its inputs and outputs are
buffers, one set for each number of rows. Recording is done by a `Recorder`: `CudaRecorder` makes
CUDA graphs; in tests, one for the CPU calls the work again.

Shapes: S rows, D hidden size, N query heads, K key and value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.block import DecoderBlock, Place
from kernels.kv_cache import CacheArena
from kernels.rotary import Positions

MAX_ROWS = 16
"""More sequences at once are rare, and their kernels are long enough to hide the launches."""

WARM_UPS = 2
"""Runs before a recording, in which libraries allocate what they need and choose their kernels."""

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
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    work()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads go on using the device meanwhile: they encode what is sent.
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                work()
        return graph.replay


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Where the graphs of one number of rows read and write."""

    hidden_SD: torch.Tensor
    x_SD: torch.Tensor
    projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    attended_SA: torch.Tensor
    positions: Positions


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
        self._graphs: dict[tuple[int, int | None, int | None], Callable[[], None]] = {}

    @property
    def recorded(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def takes(self, places: Sequence[Place]) -> bool:
        """Whether it is a decode step, of not too many sequences."""
        return len(places) <= MAX_ROWS and all(place.tokens == 1 for place in places)

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
            RuntimeError: the work cannot be recorded on this device. What the cache has of these
                tokens is to be written again.
        """
        first, last = blocks
        rows = len(places)
        buffers = self._buffers.get(rows)
        if buffers is None:
            buffers = self._buffers[rows] = self._make_buffers(hidden_SD, positions)
        between = [self._find(rows, at, at - 1) for at in range(first + 1, last)]
        graphs = [self._find(rows, first, None), *between, self._find(rows, None, last - 1)]
        # Recording has run the work, so what it runs on comes now.
        buffers.hidden_SD.copy_(hidden_SD)
        for kept, given in zip(buffers.positions, positions, strict=True):
            for kept_part, given_part in zip(kept, given, strict=True):
                kept_part.copy_(given_part)
        for number, graph in zip(range(first, last), graphs, strict=False):
            graph()
            cache_KTH = arena.keys_KTH[number], arena.values_KTH[number]
            attended_SA = self._blocks[number].attend(buffers.projected, places, cache_KTH)
            buffers.attended_SA.copy_(attended_SA)
        graphs[-1]()
        return buffers.hidden_SD.clone()

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
        )

    def _find(self, rows: int, begun: int | None, ended: int | None) -> Callable[[], None]:
        """The graph that ends one block, after its attention, and begins another, before it."""
        graph = self._graphs.get((rows, begun, ended))
        if graph is not None:
            return graph
        buffers = self._buffers[rows]

        def work() -> None:
            if ended is not None:
                finish = self._blocks[ended].finish
                buffers.hidden_SD.copy_(
                    finish(buffers.hidden_SD, buffers.x_SD, buffers.attended_SA)
                )
            if begun is not None:
                x_SD, *projected = self._blocks[begun].begin(buffers.hidden_SD, buffers.positions)
                buffers.x_SD.copy_(x_SD)
                for kept, made in zip(buffers.projected, projected, strict=True):
                    kept.copy_(made)

        graph = self._graphs[rows, begun, ended] = self._record(work)
        return graph

"""A span of blocks: the weights that one server hosts, and steps through them.

Knows neither sessions nor peers: a step is rows and caches. One thread owns a span and its arena.
Invariant: a sequence's length changes only when a step has passed the last block, so that a step
which raises leaves every sequence as it was.

Shapes: S packed rows, B batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.adapter import SpanAdapter
from kernels.block import DecoderBlock, Place
from kernels.checkpoint import Checkpoint
from kernels.decode_kernel import kernel_failures, place_rows, tell_failure
from kernels.errors import CorruptCheckpoint, OutOfDeviceMemory
from kernels.kv_cache import CacheArena, SequenceCache
from kernels.layer_loader import LayerLoader
from kernels.memory import give_back_free_memory
from kernels.model_config import ModelConfig
from kernels.quant.formats import UNQUANTISED
from kernels.rotary import Positions, RotaryTable
from kernels.step_graphs import Recorder, StepGraphs
from kernels.weight_names import block_shapes


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive new tokens of one sequence in a step's packed rows.

    Attributes:
        cache: the sequence's.
        tokens: how many rows.
    """

    cache: SequenceCache
    tokens: int


class Span:
    """The blocks ``[start, end)`` of a model; made by `load_span`.

    Attributes:
        graphs_failure: why decode steps are not recorded any more; empty where nothing failed.
    """

    def __init__(
        self,
        config: ModelConfig,
        start: int,
        blocks: Sequence[DecoderBlock],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.start = start
        self.end = start + len(blocks)
        self.dtype = dtype
        self.device = device
        self._blocks = tuple(blocks)
        self.graphs_failure = ""
        self._graphs: StepGraphs | None = None
        self._has_decode_kernel = any(block.has_decode_kernel for block in blocks)
        self._tables = [
            RotaryTable(rotary, config.head_size, dtype=dtype, device=device)
            for rotary in config.rotary
        ]

    def record_steps(self, record: Recorder) -> bool:
        """Has decode steps recorded from now on, each when it is run first; see `StepGraphs`.

        A step that cannot be recorded is run as before, and so are all after it; `graphs_failure`
        says why.

        Args:
            record: makes graphs.

        Returns:
            Whether the blocks can be recorded at all.
        """
        if not all(block.is_fixed for block in self._blocks):
            return False
        self._graphs = StepGraphs(self._blocks, record)
        return True

    @property
    def weight_bytes(self) -> int:
        """The memory that the weights take."""
        return sum(block.weight_bytes for block in self._blocks)

    def step(
        self,
        hidden_SD: torch.Tensor,
        segments: Sequence[Segment],
        *,
        start: int | None = None,
        end: int | None = None,
        adapters: Sequence[SpanAdapter] = (),
    ) -> torch.Tensor:
        """Runs new tokens of one or several sequences through blocks, ``[S, D]``.

        The linear parts see all rows at once; attention sees each sequence alone, but on a GPU in a
        decode step all of them.

        Args:
            hidden_SD: the segments' rows, one segment after the other.
            segments: at most one for each sequence.
            start: first block, absolute; the span's by default.
            end: the block after the last one; likewise.
            adapters: of all the sequences, for these blocks; see `write_prefixes`.

        Raises:
            CacheFull: a sequence was promised less.
            OutOfDeviceMemory: the device has no room for the step.
        """
        first, last = self._inside(start, end)
        places: list[Place] = []
        row = 0
        with torch.inference_mode():
            for segment in segments:  # a sequence may be moved by another's growth: grow first
                segment.cache.reserve(segment.cache.length + segment.tokens)
            for segment in segments:
                extent = segment.cache.reserve(segment.cache.length + segment.tokens)
                places.append(Place(row, segment.tokens, extent.offset, segment.cache.length))
                row += segment.tokens
            arena = segments[0].cache.arena
            try:
                hidden_SD = self._step(hidden_SD, places, arena, (first, last), adapters)
            except torch.OutOfMemoryError as error:
                raise OutOfDeviceMemory(
                    f"{self.device} has no memory for a step of {row} tokens; "
                    "set cache_tokens or max_step_tokens lower"
                ) from error
        for segment in segments:
            segment.cache.length += segment.tokens
        return hidden_SD

    def _step(
        self,
        hidden_SD: torch.Tensor,
        places: Sequence[Place],
        arena: CacheArena,
        blocks: tuple[int, int],
        adapters: Sequence[SpanAdapter],
    ) -> torch.Tensor:
        positions = self._positions(places)
        if self._graphs is not None and not adapters and self._graphs.takes(places, blocks):
            try:
                return self._graphs.run(hidden_SD, positions, places, arena, blocks)
            # Among them is all that CUDA refuses; for a graph's own memory there may be no room.
            except kernel_failures() as error:
                self._graphs, self.graphs_failure = None, str(error) or type(error).__name__
        # For one sequence torch's own attention is started in less time.
        if not (self._has_decode_kernel and 1 < len(places) == hidden_SD.shape[0]):
            return self._run(hidden_SD, positions, places, arena, blocks, adapters, None)
        try:
            places_2S = place_rows(places, self.device)
            return self._run(hidden_SD, positions, places, arena, blocks, adapters, places_2S)
        except torch.OutOfMemoryError:  # which has nothing to do with the kernel
            raise
        except kernel_failures() as error:
            output_SD = self._run(hidden_SD, positions, places, arena, blocks, adapters, None)
            self._has_decode_kernel = False  # it was the kernel, since all goes well without it
            tell_failure(error)
            return output_SD

    def _run(
        self,
        hidden_SD: torch.Tensor,
        positions: Positions,
        places: Sequence[Place],
        arena: CacheArena,
        blocks: tuple[int, int],
        adapters: Sequence[SpanAdapter],
        places_2S: torch.Tensor | None,
    ) -> torch.Tensor:
        """Launches a step's kernels one by one, attention to all sequences where there are places.

        What the cache has of these tokens is written anew where it is done a second time.
        """
        for index in range(*blocks):
            cache_KTH = arena.keys_KTH[index], arena.values_KTH[index]
            in_block = [adapter.in_block(self.start + index) for adapter in adapters]
            hidden_SD = self._blocks[index].step(
                hidden_SD, positions, places, cache_KTH, in_block, places_2S
            )
        return hidden_SD

    def forward(
        self,
        hidden_BSD: torch.Tensor,
        *,
        start: int | None = None,
        end: int | None = None,
        mask_BS: torch.Tensor | None = None,
        adapters: Sequence[SpanAdapter] = (),
    ) -> torch.Tensor:
        """Runs whole sequences through blocks, without a cache, ``[B, S, D]``.

        Differentiable with respect to the input and to the adapters' numbers; the weights are
        constants. `kernels.span_pass` does the same in parts, within bounded memory.

        Args:
            hidden_BSD: in the span's dtype.
            start: as for `step`.
            end: likewise.
            mask_BS: true for real tokens, false for padding; none where all are real.
            adapters: of all the sequences, for these blocks.
        """
        first, last = self._inside(start, end)
        prefix = sum(adapter.prefix_tokens for adapter in adapters)
        positions = self.positions(hidden_BSD.shape[1], offset=prefix)
        mask_BT = add_prefix_to_mask(mask_BS, prefix)
        for number in range(self.start + first, self.start + last):
            in_block = [adapter.in_block(number) for adapter in adapters]
            hidden_BSD = self.block(number).forward(hidden_BSD, positions, mask_BT, in_block)
        return hidden_BSD

    def shed(self, start: int, end: int) -> None:
        """Gives up its blocks outside of some others; it can run no more, but be loaded beside."""
        first, last = max(start, self.start), min(end, self.end)
        kept = self._blocks[first - self.start : last - self.start] if first < last else ()
        self._blocks = kept
        self._graphs = None
        self.start = first if kept else self.start
        self.end = self.start + len(kept)

    def block(self, number: int) -> DecoderBlock:
        """One of its blocks, by its absolute number."""
        return self._blocks[number - self.start]

    def positions(self, tokens: int, *, offset: int = 0) -> Positions:
        """Cosines and sines of a sequence's tokens, ``[tokens, 1, H]`` each.

        Args:
            tokens: how many.
            offset: position of the first one.
        """
        return tuple(table.at(offset, tokens) for table in self._tables)

    def write_prefixes(self, cache: SequenceCache, adapters: Sequence[SpanAdapter]) -> None:
        """Makes the adapters' prefixes the first tokens of an empty cache.

        Args:
            cache: of a sequence that has no tokens yet.
            adapters: each for at least the blocks that the sequence runs through.

        Raises:
            CacheFull: the sequence was promised less room.
        """
        length = 0
        with torch.inference_mode():
            for adapter in adapters:
                if not adapter.prefix_tokens:
                    continue
                cache.extend(length + adapter.prefix_tokens)
                first, last = max(adapter.start, self.start), min(adapter.end, self.end)
                for number in range(first, last):
                    prefix = adapter.in_block(number).prefix
                    assert prefix is not None
                    keys_KTH, values_KTH = (part_PKH.transpose(0, 1) for part_PKH in prefix)
                    cache.write(number - self.start, length, keys_KTH, values_KTH)
                length += adapter.prefix_tokens

    def _inside(self, start: int | None, end: int | None) -> tuple[int, int]:
        first = self.start if start is None else start
        last = self.end if end is None else end
        if not self.start <= first < last <= self.end:
            raise ValueError(f"blocks {first}:{last} are not within {self.start}:{self.end}")
        return first - self.start, last - self.start

    def _positions(self, places: Sequence[Place]) -> Positions:
        if len(places) == 1:
            return self.positions(places[0].tokens, offset=places[0].length)
        return tuple(table.at_places(places) for table in self._tables)


def add_prefix_to_mask(mask_BS: torch.Tensor | None, prefix_tokens: int) -> torch.Tensor | None:
    """A mask of sequences that some tokens stand before, which everyone attends to."""
    if mask_BS is None or not prefix_tokens:
        return mask_BS
    is_before = mask_BS.new_ones(mask_BS.shape[0], prefix_tokens)
    return torch.cat((is_before, mask_BS), dim=1)


def load_span(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quant: str = UNQUANTISED,
    beside: Span | None = None,
    on_block: Callable[[int], None] | None = None,
) -> Span:
    """Reads the tensors of some blocks, and no others.

    Args:
        checkpoint: of the model.
        start: first block.
        end: the block after the last one.
        dtype: in which steps are computed, and weights are held that are not quantised.
        device: where.
        quant: a name of `kernels.quant.formats.WEIGHT_FORMATS`, for the linear layers' weights.
            Without one they are in ``dtype``, or quantised as the checkpoint has them.
        beside: a span of the same model, loaded in the same way: its blocks are shared, not read.
        on_block: called with the number of each block that was read; what it raises ends loading.

    Raises:
        CorruptCheckpoint: a tensor is missing or not as it must be.
        OutOfDeviceMemory: the device cannot hold them.
        UnknownWeightFormat: there is no such format, or not on this device.
    """
    config = checkpoint.config
    if not 0 <= start < end <= config.num_blocks:
        raise CorruptCheckpoint(
            f"blocks {start}:{end} were asked for; the model has 0:{config.num_blocks}"
        )
    blocks = []
    for number in range(start, end):
        if beside is not None and beside.start <= number < beside.end:
            blocks.append(beside.block(number))
            continue
        try:
            with checkpoint.open() as reader:
                loader = LayerLoader(
                    reader,
                    block_shapes(config, number),
                    quant=quant,
                    stored=checkpoint.stored,
                    dtype=dtype,
                    device=device,
                )
                blocks.append(DecoderBlock(config, number, loader, loader.make_linear))
            give_back_free_memory()
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(
                f"{device} has no memory for block {number}; serve fewer blocks"
            ) from error
        if on_block is not None:
            on_block(number)
    return Span(config, start, blocks, dtype=dtype, device=device)

"""The KV-cache arena of a span: keys and values of many sequences, in one allocation.

Each sequence owns one contiguous extent of token positions, the same in every block, so that
attention reads views and never gathers. It begins small and moves to an extent twice as large when
it is full; each token is so moved less than once on average. Room is promised when a sequence is
opened (admission) and, when promised room cannot be had only because free extents are scattered,
the arena is packed anew. One thread owns an arena. Invariant: the extents that the promises round
up to always fit together, so a sequence can always grow to what it was promised.

Shapes: K key and value heads, T token positions of the arena, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.errors import CacheFull
from kernels.extents import Extent, ExtentAllocator
from kernels.model_config import ModelConfig

GRANULE_TOKENS = 64
"""The smallest extent: a chat's first turn rarely fits less, and 64 tokens waste little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaStatistics:
    """What an arena has done and holds.

    Attributes:
        moves: sequences that grew into another extent.
        packings: times that the arena was packed anew.
    """

    sequences: int
    used_tokens: int
    promised_tokens: int
    capacity_tokens: int
    moves: int
    packings: int


class SequenceCache:
    """The cache of one sequence; made by `CacheArena.open`."""

    def __init__(self, arena: CacheArena, max_tokens: int) -> None:
        self.arena = arena
        self.max_tokens = max_tokens
        self.length = 0
        self.extent: Extent | None = None
        self.is_closed = False

    def reserve(self, tokens: int) -> Extent:
        """Makes sure that so many tokens have a place; gives the extent they are in.

        Raises:
            CacheFull: it is more than was promised.
        """
        if self.is_closed:
            raise CacheFull("the sequence's cache is closed")
        if tokens > self.max_tokens:
            raise CacheFull(
                f"{tokens} tokens do not fit; this session was opened for {self.max_tokens}"
            )
        if self.extent is None or self.extent.size < tokens:
            self.arena.grow(self, tokens)
        assert self.extent is not None
        return self.extent

    def extend(self, length: int) -> None:
        """Counts tokens as cached whose keys and values are still to be written.

        Raises:
            CacheFull: it is more than was promised.
        """
        self.reserve(length)
        self.length = length

    def truncate(self, length: int) -> None:
        """Forgets all tokens from a position on; keeps the room."""
        self.length = min(self.length, length)

    @property
    def shape(self) -> tuple[int, int]:
        """Key and value heads, and head size."""
        heads, _, head_size = self.arena.keys_KTH[0].shape
        return heads, head_size

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.arena.keys_KTH[0].dtype

    @property
    def row_bytes(self) -> int:
        """What one token's keys, or its values, take in one block."""
        heads, head_size = self.shape
        return heads * head_size * self.dtype.itemsize

    def read(self, block: int, position: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy, on the CPU, of keys and values in one of the span's blocks, ``[K, T, H]`` each.

        Raises:
            CacheFull: not so many tokens are cached.
        """
        if self.extent is None or position + tokens > self.length:
            raise CacheFull(f"{position + tokens} tokens were asked for; {self.length} are cached")
        rows = slice(self.extent.offset + position, self.extent.offset + position + tokens)
        keys_KTH, values_KTH = self.arena.keys_KTH[block], self.arena.values_KTH[block]
        return keys_KTH[:, rows].clone().cpu(), values_KTH[:, rows].clone().cpu()

    def write(
        self, block: int, position: int, keys_KTH: torch.Tensor, values_KTH: torch.Tensor
    ) -> None:
        """Writes keys and values of tokens that count as cached already; see `extend`.

        Raises:
            CacheFull: not so many tokens are cached.
        """
        end = position + keys_KTH.shape[1]
        if self.extent is None or end > self.length:
            raise CacheFull(f"tokens up to {end} were to be written; {self.length} are cached")
        rows = slice(self.extent.offset + position, self.extent.offset + end)
        self.arena.keys_KTH[block][:, rows] = keys_KTH.to(self.arena.keys_KTH[block].device)
        self.arena.values_KTH[block][:, rows] = values_KTH.to(self.arena.values_KTH[block].device)

    def close(self) -> None:
        """Gives the room back; may be called again."""
        if not self.is_closed:
            self.is_closed = True
            self.arena.close(self)


class CacheArena:
    """Keys and values of a span's sequences.

    Args:
        config: of the model.
        blocks: how many the span has.
        capacity_tokens: size; rounded down to a multiple of `GRANULE_TOKENS`.
        dtype: of keys and values.
        device: where they are.

    Raises:
        CacheFull: the size is less than one granule.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        blocks: int,
        capacity_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._extents = ExtentAllocator(capacity_tokens, granule=GRANULE_TOKENS)
        if self._extents.capacity < GRANULE_TOKENS:
            raise CacheFull(
                f"a cache of {capacity_tokens} tokens is too small; {GRANULE_TOKENS} are the least"
            )
        shape = (config.num_kv_heads, self._extents.capacity, config.head_size)
        # Pages of the arena that were never written to take no memory.
        self.keys_KTH = [torch.empty(shape, dtype=dtype, device=device) for _ in range(blocks)]
        self.values_KTH = [torch.empty(shape, dtype=dtype, device=device) for _ in range(blocks)]
        self._sequences: dict[SequenceCache, int] = {}
        self._moves = 0
        self._packings = 0

    def release(self) -> None:
        """Frees the memory; no sequence is open, and none is to be opened any more."""
        self.keys_KTH, self.values_KTH = [], []

    @staticmethod
    def bytes_per_block(config: ModelConfig, *, capacity_tokens: int, dtype: torch.dtype) -> int:
        """The memory that an arena of that size takes for each block."""
        return 2 * capacity_tokens * config.kv_size * dtype.itemsize

    @property
    def capacity_tokens(self) -> int:
        """Its size."""
        return self._extents.capacity

    @property
    def free_tokens(self) -> int:
        """What is promised to nobody."""
        return self.capacity_tokens - sum(self._sequences.values())

    @property
    def used_tokens(self) -> int:
        """What the sequences have cached."""
        return sum(sequence.length for sequence in self._sequences)

    def statistics(self) -> ArenaStatistics:
        """A snapshot."""
        return ArenaStatistics(
            sequences=len(self._sequences),
            used_tokens=self.used_tokens,
            promised_tokens=sum(self._sequences.values()),
            capacity_tokens=self.capacity_tokens,
            moves=self._moves,
            packings=self._packings,
        )

    def open(self, max_tokens: int) -> SequenceCache:
        """Promises room for a sequence.

        Raises:
            CacheFull: the arena has promised too much already.
        """
        promise = self._extents.round_up(max_tokens)
        if max_tokens < 1 or not self._extents.fits([*self._sequences.values(), promise]):
            raise CacheFull(
                f"no room for a session of {max_tokens} tokens: {self.free_tokens} of "
                f"{self.capacity_tokens} are free"
            )
        sequence = SequenceCache(self, max_tokens)
        self._sequences[sequence] = promise
        return sequence

    def grow(self, sequence: SequenceCache, tokens: int) -> None:
        """Moves a sequence into an extent that holds so many tokens, at most what was promised."""
        size = self._extents.round_up(tokens)
        new = self._extents.allocate(size)
        if new is None:
            self._pack(sequence, size)
            return
        if sequence.extent is not None:
            self._copy(sequence.extent, new, sequence.length)
            self._extents.release(sequence.extent)
            self._moves += 1
        sequence.extent = new

    def close(self, sequence: SequenceCache) -> None:
        """Takes a sequence's room back."""
        if self._sequences.pop(sequence, None) is not None and sequence.extent is not None:
            self._extents.release(sequence.extent)
        sequence.extent = None

    def _copy(self, old: Extent, new: Extent, length: int) -> None:
        for cache_KTH in (*self.keys_KTH, *self.values_KTH):
            cache_KTH[:, new.offset : new.offset + length] = cache_KTH[
                :, old.offset : old.offset + length
            ]

    def _pack(self, growing: SequenceCache, size: int) -> None:
        """Places every sequence anew, one of them with a larger extent.

        The tokens pass through a copy, one block's keys or values at a time; it happens rarely.
        """
        self._packings += 1
        placed = [s for s in self._sequences if s.extent is not None or s is growing]
        sizes = [
            size if s is growing else s.extent.size if s.extent is not None else 0 for s in placed
        ]
        old = [s.extent for s in placed]
        new = self._extents.pack(sizes)
        if new is None:  # cannot be: the promises fit, and no extent is larger than its promise
            raise CacheFull("the arena's promises do not fit; this is a bug in petald")
        for cache_KTH in (*self.keys_KTH, *self.values_KTH):
            kept = [
                None
                if extent is None
                else cache_KTH[:, extent.offset : extent.offset + s.length].clone()
                for s, extent in zip(placed, old, strict=True)
            ]
            for s, extent, tokens_KTH in zip(placed, new, kept, strict=True):
                if tokens_KTH is not None:
                    cache_KTH[:, extent.offset : extent.offset + s.length] = tokens_KTH
        for s, extent in zip(placed, new, strict=True):
            s.extent = extent

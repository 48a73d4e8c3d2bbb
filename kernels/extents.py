"""Contiguous stretches of an arena, as a buddy allocator hands them out.

Pure arithmetic on positions. Sizes are powers of two times a granule, so that a freed extent joins
its buddy again, and so that extents of any such sizes which together fit can always be packed, the
largest first, without a gap. Invariant: extents that are out never overlap, and with the free ones
they make up the whole arena.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extent:
    """A half-open stretch ``[offset, offset + size)``."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        """The position after its last."""
        return self.offset + self.size


class ExtentAllocator:
    """Hands out extents of an arena.

    Args:
        capacity: of the arena; rounded down to a multiple of the granule.
        granule: the smallest extent.
    """

    def __init__(self, capacity: int, *, granule: int) -> None:
        self.granule = granule
        self.capacity = capacity // granule * granule
        self._free: dict[int, set[int]] = {}
        self._roots: list[Extent] = []
        self.clear()

    def clear(self) -> None:
        """Takes every extent back."""
        self._free = {}
        self._roots = []
        offset, left = 0, self.capacity // self.granule
        while left:  # one root for each bit of the capacity, the largest first
            size = (1 << (left.bit_length() - 1)) * self.granule
            self._roots.append(Extent(offset, size))
            self._free.setdefault(size, set()).add(offset)
            offset += size
            left -= size // self.granule

    def round_up(self, tokens: int) -> int:
        """The size of the extent that holds so many."""
        granules = -(-max(tokens, 1) // self.granule)
        return (1 << (granules - 1).bit_length()) * self.granule

    def allocate(self, size: int) -> Extent | None:
        """Gives an extent of exactly that (rounded) size; none if no free one is long enough."""
        fitting = [free for free, offsets in self._free.items() if free >= size and offsets]
        if not fitting:
            return None
        found = min(fitting)
        offset = min(self._free[found])
        self._free[found].remove(offset)
        while found > size:
            found //= 2
            self._free.setdefault(found, set()).add(offset + found)
        return Extent(offset, size)

    def release(self, extent: Extent) -> None:
        """Takes an extent back, and joins it with its free buddies."""
        root = next(root for root in self._roots if root.offset <= extent.offset < root.end)
        offset, size = extent.offset, extent.size
        while size < root.size:
            buddy = root.offset + ((offset - root.offset) ^ size)
            if buddy not in self._free.get(size, ()):
                break
            self._free[size].remove(buddy)
            offset = min(offset, buddy)
            size *= 2
        self._free.setdefault(size, set()).add(offset)

    def pack(self, sizes: Sequence[int]) -> list[Extent] | None:
        """Places extents of these sizes anew, as after `clear`; none if they do not fit.

        The placement is in the order of the sizes given; the allocator holds them all afterwards.
        """
        self.clear()
        placed: dict[int, Extent] = {}
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            extent = self.allocate(sizes[index])
            if extent is None:
                return None
            placed[index] = extent
        return [placed[index] for index in range(len(sizes))]

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether extents of these sizes could all be out at once, after packing."""
        return ExtentAllocator(self.capacity, granule=self.granule).pack(sizes) is not None

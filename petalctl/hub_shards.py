"""Which weight files hold which blocks, from a safetensors index."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels.errors import KernelError
from kernels.model_fingerprint import INDEX_NAME, read_json_object, weight_file_names
from petalctl.errors import CommandError

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,5})\.")


@dataclass(frozen=True, kw_only=True)
class ShardMap:
    """What each weight file holds: blocks, and perhaps what is before and after all blocks."""

    blocks: Mapping[str, frozenset[int]]
    with_ends: frozenset[str]

    @property
    def names(self) -> frozenset[str]:
        """All weight files."""
        return frozenset(self.blocks)

    @property
    def block_count(self) -> int | None:
        """The number of blocks; None where there is no index to tell."""
        return max((max(held, default=-1) for held in self.blocks.values()), default=-1) + 1 or None


def block_of_tensor(name: str) -> int | None:
    """The block that a tensor belongs to, by its name; None for embedding, norm and head."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def read_shard_map(folder: Path, names: Sequence[str]) -> ShardMap:
    """The map by the folder's index; without an index every file may hold anything.

    Raises:
        CorruptCheckpoint: The index cannot be read.
    """
    if not (folder / INDEX_NAME).exists():
        return ShardMap(blocks={name: frozenset() for name in names}, with_ends=frozenset(names))
    held: dict[str, set[int]] = {name: set() for name in names}
    with_ends = set()
    for tensor, name in read_json_object(folder / INDEX_NAME)["weight_map"].items():
        block = block_of_tensor(tensor)
        if block is None:
            with_ends.add(name)
        else:
            held[name].add(block)
    return ShardMap(
        blocks={name: frozenset(numbers) for name, numbers in held.items()},
        with_ends=frozenset(with_ends),
    )


def wanted_names(
    shards: ShardMap, blocks: tuple[int, int] | None, is_blocks_only: bool
) -> frozenset[str]:
    """The files to have for these blocks.

    Raises:
        CommandError: The model has no such blocks.
    """
    if blocks is None or shards.block_count is None:
        return shards.names
    start, end = blocks
    if not 0 <= start < end <= shards.block_count:
        raise CommandError(
            f"--blocks {start}:{end} does not fit this model, which has blocks 0:"
            f"{shards.block_count}",
            code="bad_blocks",
        )
    span = frozenset(range(start, end))
    holding = frozenset(name for name, held in shards.blocks.items() if held & span)
    return holding if is_blocks_only else holding | shards.with_ends


def is_in_store(folder: Path, blocks: tuple[int, int] | None, is_blocks_only: bool) -> bool:
    """Whether all wanted files are in a model's folder, going by its own index."""
    try:
        shards = read_shard_map(folder, weight_file_names(folder))
    except KernelError:
        return False
    wanted = wanted_names(shards, blocks, is_blocks_only)
    return all((folder / name).exists() for name in wanted)

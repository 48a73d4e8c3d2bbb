"""A hosted span that computes with integers, in modelled time: for swarms under a virtual clock.

Each row carries one number of 60 bits in four floats. A block's output depends on the digest of all
its inputs so far, as in `tests.helpers.session_rows`, so that a lost or misplaced row shows for
good. Steps wait for each other as on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import trio

from kernels.errors import CacheFull
from petald.executor import Timed
from tests.helpers.session_rows import mix

HIDDEN = 4
PART_BITS = 15
MASK = (1 << (HIDDEN * PART_BITS)) - 1


def to_rows(values: list[int]) -> torch.Tensor:
    """Numbers as rows, ``[S, 4]``."""
    part = (1 << PART_BITS) - 1
    rows = [[float(value >> (PART_BITS * i) & part) for i in range(HIDDEN)] for value in values]
    return torch.tensor(rows).reshape(-1, HIDDEN)


def to_values(rows_SD: torch.Tensor) -> list[int]:
    """Rows as numbers again."""
    return [
        sum(int(part) << (PART_BITS * i) for i, part in enumerate(row)) for row in rows_SD.tolist()
    ]


class FakeCache:
    """A session's digests."""

    dtype = torch.float32
    shape = (1, HIDDEN)
    row_bytes = 4 * HIDDEN

    def __init__(self, max_tokens: int, blocks: int) -> None:
        self.max_tokens = max_tokens
        self.digests: list[list[int]] = [[] for _ in range(blocks)]

    @property
    def length(self) -> int:
        return min(map(len, self.digests))


class FakeArena:
    """How much room there is."""

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.free_tokens = capacity_tokens


class FakeHostedSpan:
    """As `petald.hosted_span.HostedSpan`.

    Args:
        start: first block.
        end: the block after the last one.
        num_blocks: of the model.
        block_s: time of a decode step in one block.
    """

    def __init__(
        self, start: int, end: int, *, num_blocks: int, block_s: float, capacity: int = 4096
    ) -> None:
        self.span: Any = SimpleNamespace(
            start=start,
            end=end,
            config=SimpleNamespace(hidden_size=HIDDEN, num_blocks=num_blocks),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.arena = FakeArena(capacity)
        self.block_s = block_s
        self.most_waiting = 0
        self.mean_queue_s = 0.0
        self._device = trio.Lock()

    @property
    def step_s(self) -> float | None:
        return None

    @property
    def token_s(self) -> float | None:
        return None

    @property
    def queued_tokens(self) -> int:
        return self._device.statistics().tasks_waiting

    async def open_cache(self, max_tokens: int, adapters: Sequence[Any] = ()) -> FakeCache:
        await trio.lowlevel.checkpoint()
        if max_tokens > self.arena.free_tokens:
            raise CacheFull(f"{self.arena.free_tokens} tokens are free")
        self.arena.free_tokens -= max_tokens
        return FakeCache(max_tokens, self.span.end - self.span.start)

    async def close_cache(self, cache: FakeCache) -> None:
        self.arena.free_tokens += cache.max_tokens
        cache.max_tokens = 0

    async def extend_cache(self, cache: FakeCache, tokens: int) -> None:
        cache.digests = [[0] * tokens for _ in cache.digests]

    async def truncate_cache(self, cache: FakeCache, length: int) -> None:
        for digests in cache.digests:
            del digests[length:]

    async def read_cache(
        self, cache: FakeCache, block: int, position: int, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        await trio.lowlevel.checkpoint()
        digests = cache.digests[block - self.span.start][position : position + tokens]
        rows_KTH = to_rows(digests).unsqueeze(0)
        return rows_KTH, torch.zeros_like(rows_KTH)

    async def write_cache(
        self,
        cache: FakeCache,
        block: int,
        position: int,
        keys_KTH: torch.Tensor,
        values_KTH: torch.Tensor,
    ) -> None:
        values = to_values(keys_KTH[0])
        cache.digests[block - self.span.start][position : position + len(values)] = values

    async def run_step(
        self,
        cache: FakeCache,
        hidden_SD: torch.Tensor,
        *,
        position: int,
        start: int,
        end: int,
        peer: str = "",
    ) -> Timed:
        tokens = hidden_SD.shape[0]
        self.most_waiting = max(self.most_waiting, self._device.statistics().tasks_waiting + 1)
        seconds = self.block_s * (end - start) * (1 + tokens / 32)
        queued_at = trio.current_time()
        async with self._device:
            queue_s = trio.current_time() - queued_at
            self.mean_queue_s += (queue_s - self.mean_queue_s) / 8
            await trio.sleep(seconds)
        outputs = []
        first = start - self.span.start
        for digests in cache.digests[first : first + end - start]:
            del digests[position:]
        for value in to_values(hidden_SD):
            for block in range(start, end):
                digests = cache.digests[block - self.span.start]
                digest = mix(digests[-1] if digests else 7, value) & MASK
                digests.append(digest)
                value = mix(digest, block) & MASK
            outputs.append(value)
        for digests in (*cache.digests[:first], *cache.digests[first + end - start :]):
            digests[position:] = [0] * tokens  # blocks that the session does not use
        return Timed(to_rows(outputs), 0.0, seconds)


def expected_tokens(num_blocks: int, prompt: list[int], count: int) -> list[int]:
    """What an undisturbed model of one piece makes of a prompt."""
    digests: list[list[int]] = [[] for _ in range(num_blocks)]
    made: list[int] = []
    for value in _growing(prompt, made, count):
        for block, kept in enumerate(digests):
            kept.append(mix(kept[-1] if kept else 7, value) & MASK)
            value = mix(kept[-1], block) & MASK
        if len(digests[0]) >= len(prompt):
            made.append(value % 1009)
    return made[:count]


def _growing(prompt: list[int], made: list[int], count: int):  # type: ignore[no-untyped-def]
    """The prompt, and then what was made of it, as it grows."""
    yield from prompt
    for step in range(count - 1):
        yield made[step]

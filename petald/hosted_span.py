"""The span that this daemon hosts: its weights, its KV-cache arena, and the device they are on.

Everything here that touches a tensor runs on the executor's thread, which owns span and arena; the
coroutines hand over and wait. It knows nothing of peers or streams. Invariant: a cache that was
opened is closed once, whatever is cancelled in between.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import trio

from kernels.adapter import SpanAdapter
from kernels.errors import CacheFull
from kernels.kv_cache import CacheArena
from kernels.span import Segment, Span
from petald.executor import Executor, Timed
from petald.hosted_cache import HostedCache, open_hosted_cache
from petald.log import get_logger
from petald.scheduler import Priority

log = get_logger(__name__)

MAX_DECODE_TOKENS = 4
"""A step of so few tokens is bound by reading the weights, like a decode step, and ranks as one."""


STEP_WEIGHT = 0.02
"""Of the newest decode step in their mean time: some fifty, a second or two, show a change."""

PREFILL_WEIGHT = 0.2

MOST_LONE_STEPS = 128
"""Of which the median is taken: the last seconds' ones; a step that stalled is passed over so."""


@dataclass(frozen=True, slots=True)
class _StepWork:
    """One session's rows on their way into a batch, whose sessions have the same adapters."""

    cache: HostedCache
    position: int
    hidden_SD: torch.Tensor
    start: int
    end: int


class HostedSpan:
    """A span that runs steps of many sessions.

    Args:
        span: the blocks, loaded.
        arena: their KV cache.
        executor: the thread of the span's device.
    """

    def __init__(self, span: Span, arena: CacheArena, executor: Executor) -> None:
        self.span = span
        self.arena = arena
        self._executor = executor
        self._block_s: float | None = None
        self._token_s: float | None = None
        self._lone_block_s: deque[float] = deque(maxlen=MOST_LONE_STEPS)
        self.decode_steps = 0
        self.prefill_steps = 0
        self._has_told_failure = False

    @property
    def mean_queue_s(self) -> float:
        """How long decode steps waited lately for the device."""
        return self._executor.mean_queue_s

    @property
    def step_s(self) -> float | None:
        """How long a decode step through the whole span lately took; none before the first."""
        blocks = self.span.end - self.span.start
        return None if self._block_s is None else self._block_s * blocks

    @property
    def token_s(self) -> float | None:
        """How long each token of a prefill through the whole span lately took; likewise."""
        blocks = self.span.end - self.span.start
        return None if self._token_s is None else self._token_s * blocks

    def take_lone_block_s(self) -> float | None:
        """How long a lone decode step took in a block, in the median since this was asked last.

        None where there was none. As when it was first measured: one token, of one session.
        """
        taken, self._lone_block_s = self._lone_block_s, deque(maxlen=MOST_LONE_STEPS)
        return statistics.median(taken) if taken else None

    @property
    def queued_tokens(self) -> int:
        """Rows that wait for the device now."""
        return self._executor.queued_tokens

    async def open_cache(
        self, max_tokens: int, adapters: Sequence[SpanAdapter] = ()
    ) -> HostedCache:
        """Promises room for a session, and for the prefixes of its adapters beside.

        Args:
            max_tokens: the session's own.
            adapters: with which its steps are run; each for at least the session's blocks.

        Raises:
            CacheFull: there is not so much left.

        Cancellation: no room is taken.
        """
        with trio.CancelScope(shield=True):
            return await self._executor.run(
                open_hosted_cache, self.arena, self.span, max_tokens, tuple(adapters)
            )
        raise AssertionError("a shielded block ends by its return")

    async def close_cache(self, cache: HostedCache) -> None:
        """Gives a session's room back; runs to its end even when cancelled."""
        with trio.CancelScope(shield=True):
            await self._executor.run(cache.close)

    async def read_cache(
        self, cache: HostedCache, block: int, position: int, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of keys and values in one block (absolute), ``[K, T, H]`` each.

        Raises:
            CacheFull: not so many tokens are cached.
        """
        index = block - self.span.start
        return await self._executor.run(
            cache.read, index, position, tokens, priority=Priority.PREFILL
        )

    async def extend_cache(self, cache: HostedCache, tokens: int) -> None:
        """Counts tokens as cached that `write_cache` will bring.

        Raises:
            CacheFull: it is more than was promised.
        """
        await self._executor.run(cache.extend, tokens, priority=Priority.PREFILL)

    async def write_cache(
        self,
        cache: HostedCache,
        block: int,
        position: int,
        keys_KTH: torch.Tensor,
        values_KTH: torch.Tensor,
    ) -> None:
        """Writes keys and values in one block (absolute)."""
        index = block - self.span.start
        await self._executor.run(
            cache.write, index, position, keys_KTH, values_KTH, priority=Priority.PREFILL
        )

    async def truncate_cache(self, cache: HostedCache, length: int) -> None:
        """Forgets all tokens from a position on; runs to its end even when cancelled."""
        with trio.CancelScope(shield=True):
            await self._executor.run(cache.truncate, length)

    async def run_step(
        self,
        cache: HostedCache,
        hidden_SD: torch.Tensor,
        *,
        position: int,
        start: int,
        end: int,
        peer: str = "",
    ) -> Timed:
        """Runs a step through the blocks ``[start, end)``; its value is the output, ``[S, D]``.

        Args:
            cache: the session's; cut back to ``position`` first.
            hidden_SD: ``[tokens, hidden]`` in the span's dtype, on its device.
            position: of the first row.
            start: absolute, within the span.
            end: likewise.
            peer: who asked for it; peers share the device equally.

        Raises:
            KernelError: the step was not done; the cache holds ``position`` tokens.

        Cancellation: the step was done, or the cache is as it was.
        """
        tokens = hidden_SD.shape[0]
        is_decode = tokens <= MAX_DECODE_TOKENS
        timed = await self._executor.run_batched(
            self._run_batch,
            _StepWork(cache, position, hidden_SD, start, end),
            priority=Priority.DECODE if is_decode else Priority.PREFILL,
            tokens=tokens,
            batch_key=(start, end, cache.adapters),
            peer=peer,
        )
        if self.span.graphs_failure and not self._has_told_failure:
            self._has_told_failure = True
            log.warning("decode steps are not recorded", reason=self.span.graphs_failure)
        if is_decode:
            self.decode_steps += 1
            block_s = timed.compute_s / (end - start)
            self._block_s = _mean(self._block_s, block_s, STEP_WEIGHT)
            if tokens == 1 and timed.items == 1:
                self._lone_block_s.append(block_s)
        else:
            self.prefill_steps += 1
            block_s = timed.compute_s / (end - start)
            self._token_s = _mean(self._token_s, block_s / tokens, PREFILL_WEIGHT)
        return timed

    def _run_batch(self, works: Sequence[_StepWork]) -> Sequence[torch.Tensor]:
        for work in works:
            if work.cache.length < work.position:  # what it would attend to is not there
                raise CacheFull(
                    f"a step at {work.position} came, and {work.cache.length} tokens are cached"
                )
            work.cache.truncate(work.position)
        segments = [Segment(work.cache.sequence, work.hidden_SD.shape[0]) for work in works]
        first = works[0]
        hidden = [work.hidden_SD for work in works]
        output_SD = self.span.step(
            hidden[0] if len(hidden) == 1 else torch.cat(hidden),
            segments,
            start=first.start,
            end=first.end,
            adapters=first.cache.adapters,
        )
        if output_SD.device.type == "cuda":
            # Here, where it is timed and nobody waits: else whoever sends the output would wait.
            torch.cuda.synchronize(output_SD.device)
        if len(works) == 1:
            return [output_SD]
        return torch.split(output_SD, [segment.tokens for segment in segments])


def _mean(before: float | None, value: float, weight: float) -> float:
    return value if before is None else before + weight * (value - before)

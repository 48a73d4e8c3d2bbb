"""Forward and backward passes on the span that this daemon hosts.

A pass goes block by block and makes way for sessions' steps in between. What it needs of memory is
bounded: a batch is cut up by sequences, and of as many blocks as the bound allows is the graph kept
at once. It knows nothing of peers or streams. Invariant: one pass at a time holds activations.

Shapes: B sequences, S tokens of each, D hidden size, L blocks, E numbers of an adapter's block.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast

import torch
import trio

from kernels.span import Span
from kernels.span_pass import PassGradients, PassWork, graph_bytes, run_backward, run_forward
from petald.errors import raise_alone
from petald.executor import Executor
from petald.scheduler import Priority
from petald.turns import Turns

T = TypeVar("T")

LEAST_PIECE_TOKENS = 256
"""Smaller pieces make matrix products slower than computing blocks twice does: that costs a third,
where it comes to that (``benchmarks/training.py``)."""


@dataclass(frozen=True, slots=True)
class PassTime:
    """What a pass took.

    Attributes:
        queue_s: waiting for the device, at the start and when it made way.
        compute_s: in the kernels.
    """

    queue_s: float
    compute_s: float


class HostedPasses:
    """Runs passes of many clients, one after the other.

    Args:
        span: the blocks.
        executor: the thread of their device.
        pass_bytes: memory for what a backward pass needs of the forward.
    """

    def __init__(self, span: Span, executor: Executor, *, pass_bytes: int) -> None:
        self.span = span
        self._executor = executor
        self._token_blocks = max(1, pass_bytes // graph_bytes(span.config, span.dtype))
        self._turns = Turns()
        self.forward_passes = 0
        self.backward_passes = 0
        self.times_made_way = 0

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence that the memory allows, with the graph of one block alone."""
        return self._token_blocks

    async def run_forward(
        self, read_work: Callable[[], Awaitable[PassWork]], *, peer: str
    ) -> tuple[torch.Tensor, PassTime]:
        """Runs a batch through blocks; gives the output, ``[B, S, D]``.

        Args:
            read_work: makes the work, when its turn has come: the device holds one batch alone.
            peer: who asked for it; peers have turns alike.

        Raises:
            KernelError: it could not be computed.

        Cancellation: ends with the block that is being computed.
        """
        spent = _Spent()
        async with self._turns.take(peer):
            work = await read_work()
            outputs = []
            for piece in _cut(work, self._token_blocks):
                outputs.append(await self._drive(run_forward(self.span, piece), piece, peer, spent))
        self.forward_passes += 1
        output_BSD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output_BSD, spent.total()

    async def run_backward(
        self, read_work: Callable[[], Awaitable[tuple[PassWork, torch.Tensor]]], *, peer: str
    ) -> tuple[PassGradients, PassTime]:
        """Takes a gradient, which comes with the work, back through blocks; as `run_forward`."""
        spent = _Spent()
        gradients: list[PassGradients] = []
        first = 0
        async with self._turns.take(peer):
            work, gradient_BSD = await read_work()
            blocks = work.end - work.start
            most_tokens = max(self._token_blocks // blocks, LEAST_PIECE_TOKENS)
            most_tokens = min(most_tokens, self._token_blocks)
            for piece in _cut(work, most_tokens):
                batch, tokens = piece.hidden_BSD.shape[:2]
                passing = run_backward(
                    self.span,
                    piece,
                    gradient_BSD[first : first + batch],
                    group_blocks=max(1, self._token_blocks // (batch * tokens)),
                )
                gradients.append(await self._drive(passing, piece, peer, spent))
                first += batch
        self.backward_passes += 1
        return _join(gradients), spent.total()

    async def _drive(
        self, passing: Generator[None, None, T], piece: PassWork, peer: str, spent: _Spent
    ) -> T:
        batch, tokens = piece.hidden_BSD.shape[:2]
        rows = batch * tokens
        stop = threading.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_set_when_cancelled, stop)
                while True:
                    advance = partial(self._advance, passing, spent, stop)
                    is_done, value = await self._executor.run(
                        advance, priority=Priority.BACKWARD, tokens=rows, peer=peer
                    )
                    if is_done:
                        nursery.cancel_scope.cancel()
                        break
                    self.times_made_way += 1
                    rows = 1  # its rows are counted once
        except BaseExceptionGroup as group:
            raise_alone(group)
        finally:
            passing.close()
        return cast(T, value)

    def _advance(
        self, passing: Generator[None, None, T], spent: _Spent, stop: threading.Event
    ) -> tuple[bool, T | None]:
        """Goes on with a pass, on the device's thread, to its end or until others wait."""
        with spent.computing():
            while not stop.is_set():
                try:
                    next(passing)
                except StopIteration as end:
                    return True, end.value
                if self._executor.is_wanted_before(Priority.BACKWARD):
                    break
        return False, None


async def _set_when_cancelled(stop: threading.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        stop.set()


class _Spent:
    """Adds up where the time of a pass goes."""

    def __init__(self) -> None:
        self._came_at = time.perf_counter()
        self._compute_s = 0.0

    @contextmanager
    def computing(self) -> Iterator[None]:
        began_at = time.perf_counter()
        try:
            yield
        finally:
            self._compute_s += time.perf_counter() - began_at

    def total(self) -> PassTime:
        whole_s = time.perf_counter() - self._came_at
        return PassTime(max(0.0, whole_s - self._compute_s), self._compute_s)


def _cut(work: PassWork, most_tokens: int) -> list[PassWork]:
    """The batch in pieces of whole sequences, of at most so many tokens where one is not more."""
    batch, tokens = work.hidden_BSD.shape[:2]
    size = max(1, most_tokens // tokens)
    if size >= batch:
        return [work]
    pieces = []
    for first in range(0, batch, size):
        rows = slice(first, first + size)
        mask_BS = None if work.mask_BS is None else work.mask_BS[rows]
        pieces.append(replace(work, hidden_BSD=work.hidden_BSD[rows], mask_BS=mask_BS))
    return pieces


def _join(gradients: list[PassGradients]) -> PassGradients:
    if len(gradients) == 1:
        return gradients[0]
    hidden_BSD = torch.cat([gradient.hidden_BSD for gradient in gradients])
    parts = [gradient.adapter_LE for gradient in gradients if gradient.adapter_LE is not None]
    if not parts:
        return PassGradients(hidden_BSD, None)
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    adapter_LE = parts[0].to(wide, copy=True)
    for part_LE in parts[1:]:
        adapter_LE += part_LE
    return PassGradients(hidden_BSD, adapter_LE)

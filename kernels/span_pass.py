"""Forward and backward passes of a batch through a span, in parts and within bounded memory.

A pass is a generator that yields between blocks, so that whoever drives it can let more urgent work
go first. Backward computes the forward anew from the span's input: of each group of blocks all that
autograd needs is kept while the gradient goes through it; of the groups before, only their input.
Knows neither peers nor the wire. Invariant: at no time is more than one group's graph kept, and
nothing outlives the generator.

Shapes: B sequences, S tokens of each, D hidden size, L blocks of the pass, E numbers of an
adapter's block.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from kernels.adapter import SpanAdapter
from kernels.errors import OutOfDeviceMemory
from kernels.memory import is_short_of_memory
from kernels.model_config import ModelConfig
from kernels.rotary import Positions
from kernels.span import Span, add_prefix_to_mask


@dataclass(frozen=True, kw_only=True, slots=True)
class PassWork:
    """What is to be computed.

    Attributes:
        hidden_BSD: the input, in the span's dtype, on its device.
        start: first block, absolute.
        end: the block after the last one.
        mask_BS: true for real tokens; none where all are.
        adapters: constants, such as a server's own.
        trained: the adapter whose gradient is wanted as well.
    """

    hidden_BSD: torch.Tensor
    start: int
    end: int
    mask_BS: torch.Tensor | None = None
    adapters: Sequence[SpanAdapter] = ()
    trained: SpanAdapter | None = None


@dataclass(frozen=True, slots=True)
class PassGradients:
    """What a backward pass gives.

    Attributes:
        hidden_BSD: of the input.
        adapter_LE: of the numbers of the adapter that is trained; none where there is none.
    """

    hidden_BSD: torch.Tensor
    adapter_LE: torch.Tensor | None


def graph_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What autograd keeps for one token in one block, about: the inputs of each of its products.

    Counted in `kernels.block`, where an adapter has pairs everywhere. Without pairs it is a third
    less. ``tests/kernels/test_span_pass.py`` holds it against what torch keeps.
    """
    hidden, ffn = config.hidden_size, config.ffn_size
    query, kv = config.query_size, config.kv_size
    norms = 4 * hidden  # inputs and outputs of both
    if config.wiring == "post_norms":
        norms += 2 * hidden
    if config.has_plain_scores:
        attention = 4 * query + kv  # query, key, both repeated for the heads, and the output
    else:
        attention = 2 * query + 2 * kv + (query + kv if config.rotary else 0)
    if config.has_query_norm:
        attention += query + 2 * kv
    # The projections' outputs, and what is made of them; with a gate of ours nothing between.
    parts = 2 if not config.is_gated else 3 if config.activation == "silu" else 4
    mlp = parts * ffn
    if config.num_experts:
        mlp = config.experts_per_token * (mlp + 2 * hidden)
    return dtype.itemsize * (norms + attention + mlp)


def run_forward(span: Span, work: PassWork) -> Generator[None, None, torch.Tensor]:
    """Runs a batch through the blocks; returns the output, ``[B, S, D]``.

    Raises:
        OutOfDeviceMemory: the device has no room for it.
    """
    runner = _Runner(span, work)
    hidden_BSD = work.hidden_BSD
    for number in range(work.start, work.end):
        # Not inference_mode: of what it makes, no gradient can be taken in a later pass.
        with torch.no_grad(), _memory_guard(span, work):
            hidden_BSD = runner.run_block(number, hidden_BSD, runner.trained_row(number))
        yield
    return hidden_BSD


def run_backward(
    span: Span, work: PassWork, gradient_BSD: torch.Tensor, *, group_blocks: int
) -> Generator[None, None, PassGradients]:
    """The gradients of a batch's input, and of the adapter that is trained.

    Args:
        span: that has the blocks.
        work: the batch as it went forward.
        gradient_BSD: of the output.
        group_blocks: of so many blocks the graph may be kept at once; with all of them, nothing is
            computed twice but the forward.

    Raises:
        OutOfDeviceMemory: the device has no room for it.
    """
    runner = _Runner(span, work)
    groups = _split(work.start, work.end, group_blocks)
    inputs: list[torch.Tensor] = [work.hidden_BSD]
    for start, end in groups[:-1]:
        hidden_BSD = inputs[-1]
        for number in range(start, end):
            with torch.no_grad(), _memory_guard(span, work):
                hidden_BSD = runner.run_block(number, hidden_BSD, runner.trained_row(number))
            yield
        inputs.append(hidden_BSD)
    rows: dict[int, torch.Tensor] = {}
    for start, end in reversed(groups):
        graphs: list[_BlockGraph] = []
        hidden_BSD = inputs.pop()
        for number in range(start, end):
            with torch.enable_grad(), _memory_guard(span, work):
                graphs.append(runner.trace_block(number, hidden_BSD))
            hidden_BSD = graphs[-1].output_BSD.detach()
            yield
        while graphs:
            graph = graphs.pop()
            with _memory_guard(span, work):
                gradient_BSD, row_E = graph.run_back(gradient_BSD)
            if row_E is not None:
                rows[graph.number] = row_E
            del graph
            yield
    adapter_LE = None
    if work.trained is not None:
        adapter_LE = torch.stack([rows[number] for number in range(work.start, work.end)])
    return PassGradients(gradient_BSD, adapter_LE)


@dataclass(slots=True)
class _BlockGraph:
    """A block's forward, with what its backward needs."""

    number: int
    input_BSD: torch.Tensor
    row_E: torch.Tensor | None
    output_BSD: torch.Tensor

    def run_back(self, gradient_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        leaves = [self.input_BSD] if self.row_E is None else [self.input_BSD, self.row_E]
        gradients = torch.autograd.grad(self.output_BSD, leaves, gradient_BSD)
        return gradients[0], gradients[1] if self.row_E is not None else None


@dataclass(slots=True)
class _Runner:
    """Runs single blocks of a pass."""

    span: Span
    work: PassWork
    _positions: Positions = field(init=False)
    _mask_BT: torch.Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        trained = () if self.work.trained is None else (self.work.trained,)
        prefix = sum(adapter.prefix_tokens for adapter in (*self.work.adapters, *trained))
        self._positions = self.span.positions(self.work.hidden_BSD.shape[1], offset=prefix)
        self._mask_BT = add_prefix_to_mask(self.work.mask_BS, prefix)

    def trained_row(self, number: int) -> torch.Tensor | None:
        return None if self.work.trained is None else self.work.trained.row(number)

    def run_block(
        self, number: int, hidden_BSD: torch.Tensor, row_E: torch.Tensor | None
    ) -> torch.Tensor:
        in_block = [adapter.in_block(number) for adapter in self.work.adapters]
        if self.work.trained is not None and row_E is not None:
            in_block.append(self.work.trained.read_row(row_E))
        block = self.span.block(number)
        return block.forward(hidden_BSD, self._positions, self._mask_BT, in_block)

    def trace_block(self, number: int, hidden_BSD: torch.Tensor) -> _BlockGraph:
        input_BSD = _leaf(hidden_BSD)
        row_E = self.trained_row(number)
        leaf_E = None if row_E is None else _leaf(row_E)
        return _BlockGraph(number, input_BSD, leaf_E, self.run_block(number, input_BSD, leaf_E))


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as a beginning of a graph; a copy only where torch asks for one."""
    detached = tensor.clone() if tensor.is_inference() else tensor.detach()
    return detached.requires_grad_()


def _split(start: int, end: int, group_blocks: int) -> list[tuple[int, int]]:
    """Groups of at most so many blocks; the first is the smaller one where they do not divide."""
    borders = [*range(end, start, -max(1, group_blocks)), start][::-1]
    return list(itertools.pairwise(borders))


@contextmanager
def _memory_guard(span: Span, work: PassWork) -> Iterator[None]:
    """Says what to do where the device has no memory left."""
    try:
        yield
    except RuntimeError as error:
        if not is_short_of_memory(error):
            raise
        batch, tokens = work.hidden_BSD.shape[:2]
        raise OutOfDeviceMemory(
            f"{span.device} has no memory for a pass of {batch} x {tokens} tokens; "
            "set pass_bytes or max_pass_tokens lower"
        ) from error

"""An adapter's numbers, as the blocks of a span use them.

What it consists of, and in which order, is `kernels.adapter_form`'s. Everything here is
differentiable with respect to the numbers.

Shapes: L blocks, E numbers of a block, S rows, I width in, O width out, R LoRA rank, P tokens of a
prefix, K key and value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.adapter_form import DOWN, PREFIX_KEYS, PREFIX_VALUES, UP, AdapterForm, Part, layout
from kernels.errors import BadAdapter
from kernels.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class LowRankPair:
    """Two matrices whose product is added to a linear layer's.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    down_RI: torch.Tensor
    up_OR: torch.Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class BlockAdapter:
    """An adapter in one block.

    Attributes:
        pairs: by the name of the linear layer.
        prefix: keys and values that stand before every sequence, ``[P, K, H]`` each; keys are not
            turned by their positions.
    """

    pairs: Mapping[str, LowRankPair]
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None


class SpanAdapter:
    """An adapter in some consecutive blocks.

    Args:
        config: of the model.
        form: of the adapter.
        start: first block, absolute.
        values_LE: one row for each block, in the span's dtype, on its device.

    Raises:
        BadAdapter: it does not fit the model, or the numbers do not fit the form.
    """

    def __init__(
        self, config: ModelConfig, form: AdapterForm, start: int, values_LE: torch.Tensor
    ) -> None:
        self._parts = layout(config, form)
        self.form = form
        self.start = start
        self.values_LE = values_LE
        elements = sum(part.elements for part in self._parts)
        if values_LE.dim() != 2 or values_LE.shape[1] != elements:
            raise BadAdapter(
                f"the adapter's numbers have the shape {list(values_LE.shape)}; "
                f"[blocks, {elements}] was expected"
            )

    @property
    def end(self) -> int:
        """The block after its last one."""
        return self.start + self.values_LE.shape[0]

    @property
    def prefix_tokens(self) -> int:
        """How many tokens stand before every sequence."""
        return self.form.prefix_tokens

    def row(self, block: int) -> torch.Tensor:
        """The numbers of one block (absolute), ``[E]``; a view."""
        return self.values_LE[block - self.start]

    def in_block(self, block: int) -> BlockAdapter:
        """The adapter in one block (absolute); views of its numbers."""
        return self.read_row(self.row(block))

    def read_row(self, row_E: torch.Tensor) -> BlockAdapter:
        """What a block's numbers say; differentiable with respect to them."""
        tensors = read_parts(self._parts, row_E)
        pairs = {
            name: LowRankPair(tensors[f"{name}.{DOWN}"], tensors[f"{name}.{UP}"], self.form.scaling)
            for name in self.form.targets
        }
        if not self.form.prefix_tokens:
            return BlockAdapter(pairs)
        return BlockAdapter(pairs, (tensors[PREFIX_KEYS], tensors[PREFIX_VALUES]))


def read_parts(parts: Sequence[Part], row_E: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a block's row, by name; views."""
    pieces = torch.split(row_E, [part.elements for part in parts])
    return {part.name: piece.view(part.shape) for part, piece in zip(parts, pieces, strict=True)}


def add_pairs(
    output_SO: torch.Tensor,
    x_SI: torch.Tensor,
    pairs: Sequence[tuple[slice, LowRankPair]],
) -> torch.Tensor:
    """Adds what pairs make of ``x`` to a linear layer's output, in place; gives the output.

    All pairs' first matrices are one product with ``x``, for each on its own is a thin one.

    Args:
        output_SO: of matrices that stand side by side; nobody else's.
        x_SI: the layer's input.
        pairs: each with its columns of the output.
    """
    if not torch.is_grad_enabled():
        _add_pairs(output_SO, x_SI, pairs)
        return output_SO
    matrices = [matrix for _, pair in pairs for matrix in (pair.down_RI, pair.up_OR)]
    if not any(tensor.requires_grad for tensor in (output_SO, x_SI, *matrices)):
        _add_pairs(output_SO, x_SI, pairs)
        return output_SO
    added_SO: torch.Tensor = _AddedPairs.apply(  # type: ignore[no-untyped-call]
        output_SO, x_SI, [(columns, pair.scaling) for columns, pair in pairs], *matrices
    )
    return added_SO


def _add_pairs(
    output_SO: torch.Tensor, x_SI: torch.Tensor, pairs: Sequence[tuple[slice, LowRankPair]]
) -> torch.Tensor:
    """`add_pairs` without a gradient; gives the low-rank rows of all pairs, side by side."""
    downs = [pair.down_RI for _, pair in pairs]
    low_SR = torch.mm(x_SI, (downs[0] if len(downs) == 1 else torch.cat(downs)).t())
    lows = torch.split(low_SR, [down.shape[0] for down in downs], dim=1)
    for (columns, pair), part_SR in zip(pairs, lows, strict=True):
        output_SO[:, columns].addmm_(part_SR, pair.up_OR.t(), alpha=pair.scaling)
    return low_SR


class _AddedPairs(torch.autograd.Function):
    """`add_pairs`; of the input and the low-rank rows, only what gradients need is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        output_SO: torch.Tensor,
        x_SI: torch.Tensor,
        places: Sequence[tuple[slice, float]],
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        pairs = [
            (columns, LowRankPair(matrices[2 * number], matrices[2 * number + 1], scaling))
            for number, (columns, scaling) in enumerate(places)
        ]
        low_SR = _add_pairs(output_SO, x_SI, pairs)
        ctx.mark_dirty(output_SO)
        ctx.places = places
        is_trained = any(ctx.needs_input_grad[3:])
        ctx.save_for_backward(*((x_SI, low_SR) if is_trained else (None, None)), *matrices)
        return output_SO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # A CPU multiplies thin matrices ten times faster in this order than transposed:
        # the long gradient is read along its rows, and the thin one along its columns.
        x_SI, low_SR, *matrices = ctx.saved_tensors
        downs, ups = matrices[::2], matrices[1::2]
        ranks = [down.shape[0] for down in downs]
        of_low_SR = torch.cat(
            [
                torch.mm(gradient_SO[:, columns], up_OR.t().contiguous().t()).mul_(scaling)
                for (columns, scaling), up_OR in zip(ctx.places, ups, strict=True)
            ],
            dim=1,
        )
        of_x_SI = torch.mm(of_low_SR, torch.cat(downs)) if ctx.needs_input_grad[1] else None
        of_matrices: list[torch.Tensor | None] = [None] * len(matrices)
        if x_SI is not None:
            of_matrices[::2] = torch.split(torch.mm(of_low_SR.t(), x_SI), ranks)
            of_matrices[1::2] = [
                torch.mm(part_SR.t(), gradient_SO[:, columns]).mul_(scaling).t()
                for (columns, scaling), part_SR in zip(
                    ctx.places, torch.split(low_SR, ranks, dim=1), strict=True
                )
            ]
        return gradient_SO, of_x_SI, None, *of_matrices

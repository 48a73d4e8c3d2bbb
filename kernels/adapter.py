"""An adapter's numbers, as the blocks of a span use them.

What it consists of, and in which order, is `kernels.adapter_form`'s. Everything here is
differentiable with respect to the numbers.

Shapes: L blocks, E numbers of a block, S rows, I width in, O width out, R LoRA rank, P tokens of a
prefix, K key and value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

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

    def add_to(self, output_SO: torch.Tensor, x_SI: torch.Tensor) -> torch.Tensor:
        """What it makes of ``x``, added to the layer's output; a new tensor."""
        low_SR = F.linear(x_SI, self.down_RI)
        return torch.addmm(output_SO, low_SR, self.up_OR.t(), alpha=self.scaling)


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

"""A matrix product with fixed weights.

`Linear` is what a block needs of one; `DenseLinear` keeps the weights as they are,
`kernels.quant.linear` in fewer bits.

Several of a checkpoint's matrices may stand side by side in one; its parts keep their names, by
which adapters find them.

Shapes: S rows, I width in, O width out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch

from kernels.adapter import BlockAdapter, add_pairs


class Linear(Protocol):
    """``x @ weight + bias``, in whichever weight format."""

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        ...

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it holds, in whichever form."""
        ...

    @property
    def weight_bytes(self) -> int:
        """The memory that they take."""
        ...

    @property
    def is_fixed(self) -> bool:
        """Whether it runs the same kernels whatever the numbers are."""
        ...

    def apply(self, x_SI: torch.Tensor, adapters: Sequence[BlockAdapter] = ()) -> torch.Tensor:
        """The product, ``[S, O]``, with what adapters add to it; a new tensor."""
        ...

    def add_to(
        self, sum_SO: torch.Tensor, x_SI: torch.Tensor, adapters: Sequence[BlockAdapter] = ()
    ) -> torch.Tensor:
        """The product plus a residual, ``[S, O]``; a new tensor."""
        ...


class Columns:
    """Which columns of a layer's output belong to which of its parts.

    Args:
        parts: names and widths of the matrices that stand side by side.
    """

    def __init__(self, parts: Sequence[tuple[str, int]]) -> None:
        ends = itertools.accumulate(width for _, width in parts)
        self._columns = [
            (name, slice(end - width, end)) for (name, width), end in zip(parts, ends, strict=True)
        ]

    def adapt(
        self, output_SO: torch.Tensor, x_SI: torch.Tensor, adapters: Sequence[BlockAdapter]
    ) -> torch.Tensor:
        """Adds what adapters make of ``x`` to the output, in place; gives the output."""
        pairs = [
            (columns, adapter.pairs[name])
            for name, columns in self._columns
            for adapter in adapters
            if name in adapter.pairs
        ]
        return add_pairs(output_SO, x_SI, pairs) if pairs else output_SO


class DenseLinear:
    """``x @ weight + bias`` with the weights as numbers of a dtype.

    In memory, a CPU's float32 weights are ``[in, out]``, the transpose of how checkpoints have
    them: for one row, that is where a decode step's time goes, the product then reads them a
    quarter to a half faster (``benchmarks/decode.py`` measures the whole step). In 16 bits it is
    the other way round, at one row by up to two times, so those stay ``[out, in]``
    (``benchmarks/weights.py``, its table of layouts).

    Args:
        weight_OI: as in checkpoints; kept as it is, or copied into the other order.
        bias_O: or none.
        parts: names and widths of the matrices that stand side by side in it.
    """

    is_fixed = True

    def __init__(
        self,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None = None,
        *,
        parts: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.weight_IO = weight_OI.t()
        if weight_OI.device.type == "cpu" and weight_OI.itemsize > 2:
            self.weight_IO = self.weight_IO.contiguous()
        self.bias_O = bias_O
        self._columns = Columns(parts)

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The weights, and the biases where there are any."""
        return (self.weight_IO,) if self.bias_O is None else (self.weight_IO, self.bias_O)

    @property
    def weight_bytes(self) -> int:
        """The memory that they take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def apply(self, x_SI: torch.Tensor, adapters: Sequence[BlockAdapter] = ()) -> torch.Tensor:
        """See `Linear.apply`."""
        if self.bias_O is None:
            output_SO = torch.mm(x_SI, self.weight_IO)
        else:
            output_SO = torch.addmm(self.bias_O, x_SI, self.weight_IO)
        return self._columns.adapt(output_SO, x_SI, adapters) if adapters else output_SO

    def add_to(
        self, sum_SO: torch.Tensor, x_SI: torch.Tensor, adapters: Sequence[BlockAdapter] = ()
    ) -> torch.Tensor:
        """See `Linear.add_to`; one pass."""
        if self.bias_O is not None:
            sum_SO = sum_SO + self.bias_O
        output_SO = torch.addmm(sum_SO, x_SI, self.weight_IO)
        return self._columns.adapt(output_SO, x_SI, adapters) if adapters else output_SO

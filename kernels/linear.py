"""A matrix product with fixed weights.

The weights are kept as ``[in, out]``, the transpose of how checkpoints have them: for one row on a
CPU, that is where a decode step's time goes, the product then reads them a quarter to a half faster
(``benchmarks/decode.py`` measures the whole step). Quantised weights will be other classes with
the same two methods.

Several of a checkpoint's matrices may stand side by side in one; its parts keep their names, by
which adapters find them.

Shapes: S rows, I width in, O width out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from kernels.adapter import BlockAdapter, add_pairs
from kernels.weight_names import short_name


class Linear:
    """``x @ weight + bias``.

    Args:
        weight_OI: as in checkpoints; copied into the other order.
        bias_O: or none.
        parts: names and widths of the matrices that stand side by side in it.
    """

    def __init__(
        self,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None = None,
        *,
        parts: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.weight_IO = weight_OI.t().contiguous()
        self.bias_O = bias_O
        ends = itertools.accumulate(width for _, width in parts)
        self._columns = [
            (name, slice(end - width, end)) for (name, width), end in zip(parts, ends, strict=True)
        ]

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        return self.weight_IO.numel() + (0 if self.bias_O is None else self.bias_O.numel())

    @property
    def weight_bytes(self) -> int:
        """The memory that they take."""
        return self.num_parameters * self.weight_IO.itemsize

    def apply(self, x_SI: torch.Tensor, adapters: Sequence[BlockAdapter] = ()) -> torch.Tensor:
        """The product, ``[S, O]``, with what adapters add to it."""
        if self.bias_O is None:
            output_SO = torch.mm(x_SI, self.weight_IO)
        else:
            output_SO = torch.addmm(self.bias_O, x_SI, self.weight_IO)
        return self._adapt(output_SO, x_SI, adapters) if adapters else output_SO

    def add_to(
        self, sum_SO: torch.Tensor, x_SI: torch.Tensor, adapters: Sequence[BlockAdapter] = ()
    ) -> torch.Tensor:
        """The product plus a residual, ``[S, O]``, in one pass; a new tensor."""
        if self.bias_O is not None:
            sum_SO = sum_SO + self.bias_O
        output_SO = torch.addmm(sum_SO, x_SI, self.weight_IO)
        return self._adapt(output_SO, x_SI, adapters) if adapters else output_SO

    def _adapt(
        self, output_SO: torch.Tensor, x_SI: torch.Tensor, adapters: Sequence[BlockAdapter]
    ) -> torch.Tensor:
        pairs = [
            (columns, adapter.pairs[name])
            for name, columns in self._columns
            for adapter in adapters
            if name in adapter.pairs
        ]
        return add_pairs(output_SO, x_SI, pairs) if pairs else output_SO


def join_linears(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> Linear:
    """One layer of several that a checkpoint has, side by side.

    Args:
        tensors: weights, and biases where there are any, by their names in the checkpoint.
        names: of the layers, without ``.weight``.
    """
    weights = [tensors[f"{name}.weight"] for name in names]
    biases = [tensors[f"{name}.bias"] for name in names if f"{name}.bias" in tensors]
    parts = [
        (short_name(name), weight.shape[0]) for name, weight in zip(names, weights, strict=True)
    ]
    return Linear(torch.cat(weights), torch.cat(biases) if biases else None, parts=parts)

"""A linear layer over a matrix in few bits.

Biases and adapters are in the dtype of the activations. Nothing of a step is kept for its gradient,
which is that of the product with the dequantised weights: the weights are constants.

Shapes: S rows, I width in, O width out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.adapter import BlockAdapter
from kernels.linear import Columns
from kernels.quant.matrix import QuantisedMatrix, multiply_back


class QuantisedLinear:
    """``x @ weight + bias``; a `kernels.linear.Linear`.

    Args:
        matrix: the weights.
        bias_O: or none.
        parts: names and widths of the matrices that stand side by side in it.
    """

    def __init__(
        self,
        matrix: QuantisedMatrix,
        bias_O: torch.Tensor | None = None,
        *,
        parts: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.matrix = matrix
        self.bias_O = bias_O
        self._columns = Columns(parts)

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        size_out, size_in = self.matrix.shape
        return size_out * size_in + (0 if self.bias_O is None else self.bias_O.numel())

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The weights in their packed form, and the biases where there are any."""
        biases = () if self.bias_O is None else (self.bias_O,)
        return (*self.matrix.tensors, *biases)

    @property
    def is_fixed(self) -> bool:
        """Whether the matrix is."""
        return self.matrix.is_fixed

    @property
    def weight_bytes(self) -> int:
        """The memory that they take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def apply(self, x_SI: torch.Tensor, adapters: Sequence[BlockAdapter] = ()) -> torch.Tensor:
        """See `kernels.linear.Linear.apply`."""
        output_SO = self._multiply(x_SI)
        if self.bias_O is not None:
            output_SO += self.bias_O
        return self._columns.adapt(output_SO, x_SI, adapters) if adapters else output_SO

    def add_to(
        self, sum_SO: torch.Tensor, x_SI: torch.Tensor, adapters: Sequence[BlockAdapter] = ()
    ) -> torch.Tensor:
        """See `kernels.linear.Linear.add_to`."""
        output_SO = self._multiply(x_SI)
        if self.bias_O is not None:
            output_SO += self.bias_O
        output_SO += sum_SO
        return self._columns.adapt(output_SO, x_SI, adapters) if adapters else output_SO

    def _multiply(self, x_SI: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and x_SI.requires_grad):
            return self.matrix.multiply(x_SI)
        output_SO: torch.Tensor = _Product.apply(x_SI, self.matrix)  # type: ignore[no-untyped-call]
        return output_SO


class _Product(torch.autograd.Function):
    """``x @ matrix.t()``, of which nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x_SI: torch.Tensor, matrix: QuantisedMatrix) -> torch.Tensor:
        ctx.matrix = matrix
        output_SO = matrix.multiply(x_SI)
        # What is added in place must be no view, which a library's product may be.
        return output_SO if output_SO._base is None else output_SO.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SO: torch.Tensor) -> tuple[torch.Tensor, None]:
        return multiply_back(ctx.matrix, gradient_SO), None

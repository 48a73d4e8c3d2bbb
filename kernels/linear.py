"""A matrix product with fixed weights.

The weights are kept as ``[in, out]``, the transpose of how checkpoints have them: for one row on a
CPU, that is where a decode step's time goes, the product then reads them a quarter to a half faster
(``benchmarks/decode.py`` measures the whole step). Quantised weights will be other classes with
the same two methods.

Shapes: S rows, I width in, O width out.
"""

from __future__ import annotations

import torch


class Linear:
    """``x @ weight + bias``.

    Args:
        weight_OI: as in checkpoints; copied into the other order.
        bias_O: or none.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> None:
        self.weight_IO = weight_OI.t().contiguous()
        self.bias_O = bias_O

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        return self.weight_IO.numel() + (0 if self.bias_O is None else self.bias_O.numel())

    @property
    def weight_bytes(self) -> int:
        """The memory that they take."""
        return self.num_parameters * self.weight_IO.itemsize

    def apply(self, x_SI: torch.Tensor) -> torch.Tensor:
        """The product, ``[S, O]``."""
        if self.bias_O is None:
            return torch.mm(x_SI, self.weight_IO)
        return torch.addmm(self.bias_O, x_SI, self.weight_IO)

    def add_to(self, sum_SO: torch.Tensor, x_SI: torch.Tensor) -> torch.Tensor:
        """The product plus a residual, ``[S, O]``, in one pass; a new tensor."""
        if self.bias_O is not None:
            sum_SO = sum_SO + self.bias_O
        return torch.addmm(sum_SO, x_SI, self.weight_IO)

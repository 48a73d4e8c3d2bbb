"""What every matrix in few bits is for its users, and the ways of computing that all share.

A product with few rows goes through a kernel that reads the packed weights, where there is one.
With many rows, and for gradients, some rows of the matrix at a time are written out in the dtype of
the activations and multiplied as dense ones: never is more than a tile of it held so.

Invariant: either way gives ``x @ dequantise(matrix).t()`` to the rounding of the dtype, so that a
session that is replayed with other numbers of rows finds the same. Only int8 on a GPU is outside of
it (`kernels.quant.int8_gpu` says why).

Shapes: S rows, I width in, O width out, T rows of the matrix in a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

TILE_ELEMENTS = 1 << 20
"""Of the matrix, so many are written out at once: in bfloat16 2 MiB, which stays in a cache."""


class QuantisedMatrix(Protocol):
    """Weights ``[O, I]`` in few bits."""

    @property
    def shape(self) -> tuple[int, int]:
        """Width out and width in."""
        ...

    @property
    def row_step(self) -> int:
        """Tiles begin at multiples of so many rows."""
        ...

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it holds."""
        ...

    @property
    def is_fixed(self) -> bool:
        """Whether products run the same kernels whatever the numbers are."""
        ...

    def multiply(self, x_SI: torch.Tensor) -> torch.Tensor:
        """``x @ matrix.t()``, ``[S, O]``; a new tensor."""
        ...

    def read_rows(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows as numbers, ``[T, I]``.

        Args:
            start: a multiple of `row_step`.
            end: likewise, or the last one.
            dtype: of the result; rounded to it once.
        """
        ...


def iterate_tiles(
    matrix: QuantisedMatrix, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The matrix as numbers, some rows at a time: which they are, and ``[T, I]``."""
    rows, width = matrix.shape
    step = max(1, TILE_ELEMENTS // (width * matrix.row_step)) * matrix.row_step
    for start in range(0, rows, step):
        end = min(start + step, rows)
        yield slice(start, end), matrix.read_rows(start, end, dtype)


def multiply_by_tiles(matrix: QuantisedMatrix, x_SI: torch.Tensor) -> torch.Tensor:
    """``x @ matrix.t()``, ``[S, O]``, with one tile of it at a time as numbers."""
    output_SO = x_SI.new_empty(x_SI.shape[0], matrix.shape[0])
    for rows, weight_TI in iterate_tiles(matrix, x_SI.dtype):
        torch.mm(x_SI, weight_TI.t(), out=output_SO[:, rows])
    return output_SO


def multiply_back(matrix: QuantisedMatrix, gradient_SO: torch.Tensor) -> torch.Tensor:
    """``gradient @ matrix``, ``[S, I]``: of the input, from that of the output; by tiles.

    The sum over tiles is kept in at least 32 bits, lest it be rounded at each of them.
    """
    dtype = gradient_SO.dtype
    wide = torch.promote_types(dtype, torch.float32)
    sum_SI = gradient_SO.new_zeros(gradient_SO.shape[0], matrix.shape[1], dtype=wide)
    for rows, weight_TI in iterate_tiles(matrix, dtype):
        if dtype == wide:
            sum_SI.addmm_(gradient_SO[:, rows], weight_TI)
        else:
            sum_SI += torch.mm(gradient_SO[:, rows], weight_TI)
    return sum_SI.to(dtype)


def dequantise(matrix: QuantisedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The whole matrix as numbers, ``[O, I]``."""
    return torch.cat([weight_TI for _, weight_TI in iterate_tiles(matrix, dtype)])

"""Eight bits a weight with a scale for each 32 of a row: what GGUF's Q8_0 is.

torch has no product for it, but one for 4 bits in such groups, and a code of 8 bits is two of 4:
``code = 16 * high + low``. So both halves stand in one 4-bit matrix, the high ones' scales 16 times
larger, and the sum of both products is the product, without any loss.

Shapes: O width out, I width in, G groups of 32 in a row, S rows, T rows of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.quant.int4 import GROUP_SIZE, MIDDLE_CODE, Int4Matrix, Int4Weights
from kernels.quant.int4_order import ROW_STEP
from kernels.quant.matrix import QuantisedMatrix, multiply_by_tiles

FEW_ROWS = 48
"""Up to so many, two products in 4 bits are faster than writing tiles out.

``benchmarks/weights.py`` measures it, in its table of crossings."""


@dataclass(frozen=True, slots=True)
class Int8GroupWeights:
    """A matrix in 8 bits by groups, as it is stored; a `kernels.quant.formats.StoredWeights`.

    Attributes:
        codes_OI: int8.
        scales_OG: what a code of one is worth, float32.
    """

    codes_OI: torch.Tensor
    scales_OG: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Width out and width in."""
        return self.codes_OI.shape[0], self.codes_OI.shape[1]

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers, ``[O, I]``."""
        wide = torch.promote_types(dtype, torch.float32)
        groups = self.codes_OI.view(self.shape[0], -1, GROUP_SIZE).to(wide)
        return groups.mul_(self.scales_OG[..., None]).view(self.shape).to(dtype)

    def place(self, dtype: torch.dtype) -> QuantisedMatrix:
        """The matrix that computes in a dtype, on the device where the codes are."""
        return Int8GroupMatrix(self, dtype)


def join_int8_groups(parts: Sequence[Int8GroupWeights]) -> Int8GroupWeights:
    """Matrices of one width in, side by side."""
    return Int8GroupWeights(
        torch.cat([part.codes_OI for part in parts]),
        torch.cat([part.scales_OG for part in parts]),
    )


class Int8GroupMatrix:
    """Weights ``[O, I]`` in 8 bits by groups; a `kernels.quant.matrix.QuantisedMatrix`."""

    row_step = ROW_STEP
    is_fixed = True

    def __init__(self, weights: Int8GroupWeights, dtype: torch.dtype) -> None:
        self.shape = weights.shape
        padding = (0, 0, 0, -self.shape[0] % ROW_STEP)
        scales_OG = F.pad(weights.scales_OG, padding)
        self._padded_rows = scales_OG.shape[0]
        both = Int4Weights(
            torch.cat([F.pad(half, padding) for half in _split_codes(weights.codes_OI)]),
            # The low halves are from -8 to 7 about a centre of none, the high ones make up for it.
            torch.cat((scales_OG * 16, scales_OG)),
            torch.cat((scales_OG * MIDDLE_CODE, torch.zeros_like(scales_OG))),
        )
        self._halves = Int4Matrix(both, dtype)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes, and scales with centres."""
        return self._halves.tensors

    def multiply(self, x_SI: torch.Tensor) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.multiply`."""
        if not self._halves.has_kernel or x_SI.shape[0] > FEW_ROWS:
            return multiply_by_tiles(self, x_SI)
        both_SO = self._halves.multiply(x_SI)
        rows, low_from = self.shape[0], self._padded_rows
        return both_SO[:, :rows] + both_SO[:, low_from : low_from + rows]

    def read_rows(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.read_rows`."""
        wide = torch.promote_types(dtype, torch.float32)
        high_TI = self._halves.read_rows(start, end, wide)
        low_TI = self._halves.read_rows(self._padded_rows + start, self._padded_rows + end, wide)
        return high_TI.add_(low_TI).to(dtype)


def _split_codes(codes_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the high and of the low halves, two in each byte, the first in its high half."""
    raised = codes_OI.view(torch.uint8) ^ 0x80  # from 0 to 255, 128 for none
    first, second = raised[:, ::2], raised[:, 1::2]
    return (first & 0xF0) | (second >> 4), (first << 4) | (second & 0xF)

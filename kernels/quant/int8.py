"""Eight bits a weight: whole numbers, with one scale for each row of the matrix.

Source: the vector-wise quantisation of weights in LLM.int8(), Dettmers et al. 2022,
arXiv:2208.07339, section 3. There the activations are quantised as well, which their rare large
features would break, so these are multiplied apart in 16 bits. Here, on a CPU, activations stay in
16 bits altogether: a decode step waits for the weights, not for arithmetic, and nothing needs to be
taken apart. `kernels.quant.llm_int8` is the paper's whole method in plain torch,
`kernels.quant.int8_gpu` the one that GPUs run.

Shapes: S rows, I width in, O width out, T rows of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.quant.matrix import QuantisedMatrix, multiply_by_tiles

LARGEST_CODE = 127

FEW_ROWS = 12
"""Up to so many, torch's int8 kernel is faster than writing tiles out.

``benchmarks/weights.py`` measures it, in its table of crossings."""

_WIDTH_STEP = 16  # torch's kernel reads so many weights at a time, also past the end of a row
_QUANTISED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Int8Weights:
    """A matrix in 8 bits, as it is stored; a `kernels.quant.formats.StoredWeights`.

    Attributes:
        codes_OI: int8.
        scales_O: what a code of one is worth, float32.
    """

    codes_OI: torch.Tensor
    scales_O: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Width out and width in."""
        return self.codes_OI.shape[0], self.codes_OI.shape[1]

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers, ``[O, I]``."""
        wide = torch.promote_types(dtype, torch.float32)
        return self.codes_OI.to(wide).mul_(self.scales_O[:, None]).to(dtype)

    def place(self, dtype: torch.dtype) -> QuantisedMatrix:
        """The matrix that computes in a dtype, on the device where the codes are."""
        if self.codes_OI.device.type == "cuda":
            from kernels.quant.int8_gpu import Int8GpuMatrix

            return Int8GpuMatrix(self.codes_OI, self.scales_O, dtype)
        return Int8Matrix(self.codes_OI, self.scales_O, dtype)


def join_int8(parts: Sequence[Int8Weights]) -> Int8Weights:
    """Matrices of one width in, side by side."""
    return Int8Weights(
        torch.cat([part.codes_OI for part in parts]), torch.cat([part.scales_O for part in parts])
    )


def quantise_int8(weight_OI: torch.Tensor, dtype: torch.dtype = torch.float32) -> Int8Weights:
    """Rounds weights to 8 bits; a row's largest becomes a code of 127.

    Args:
        weight_OI: in any floating-point dtype; a part of it at a time is widened.
        dtype: of the activations. If it is bfloat16, the scales will be rounded to it; codes are
            made with the rounded ones, so that it costs nothing.
    """
    rows, width = weight_OI.shape
    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    scales_O = torch.empty(rows, device=weight_OI.device)
    step = max(1, _QUANTISED_AT_ONCE // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        weight_TI = weight_OI[part].to(torch.float32, copy=True)
        low_T, high_T = torch.aminmax(weight_TI, dim=1)
        scales_T = torch.maximum(-low_T, high_T).div_(LARGEST_CODE)
        scales_T = torch.where(scales_T > 0, scales_T, 1.0).to(kept).float()
        scales_O[part] = scales_T
        codes_TI = weight_TI.mul_(scales_T.reciprocal()[:, None]).round_()
        codes_OI[part] = codes_TI.clamp_(-LARGEST_CODE, LARGEST_CODE)
    return Int8Weights(codes_OI, scales_O)


class Int8Matrix:
    """Weights ``[O, I]`` in 8 bits, on a CPU; a `kernels.quant.matrix.QuantisedMatrix`.

    Args:
        codes_OI: int8, contiguous.
        scales_O: what a code of one is worth. For activations in bfloat16 they are kept so, as
            torch's kernel wants it; the matrix is then the one with these scales.
        dtype: of the activations.
    """

    row_step = 1
    is_fixed = True

    def __init__(self, codes_OI: torch.Tensor, scales_O: torch.Tensor, dtype: torch.dtype) -> None:
        self.shape = (codes_OI.shape[0], codes_OI.shape[1])
        # Of float32, torch's kernel is ten times slower.
        self._has_kernel = dtype == torch.bfloat16 and self.shape[1] % _WIDTH_STEP == 0
        self._codes_OI = codes_OI
        self._scales_O = scales_O.to(dtype if self._has_kernel else torch.float32)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes and scales."""
        return self._codes_OI, self._scales_O

    def multiply(self, x_SI: torch.Tensor) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.multiply`."""
        if self._has_kernel and x_SI.shape[0] <= FEW_ROWS:
            return torch._weight_int8pack_mm(x_SI.contiguous(), self._codes_OI, self._scales_O)
        return multiply_by_tiles(self, x_SI)

    def read_rows(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.read_rows`."""
        wide = torch.promote_types(dtype, torch.float32)
        scales_T1 = self._scales_O[start:end, None].to(wide)
        return self._codes_OI[start:end].to(wide).mul_(scales_T1).to(dtype)

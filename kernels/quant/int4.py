"""Four bits a weight: whole numbers, with a scale and a centre for each 32 weights of a row.

What torch multiplies with on any CPU, and what GGUF's Q4_0 and Q4_1 are. Where torch has no product
for it, and on GPUs, it goes by tiles, which is right but slow: there nf4 is the format to choose.

Source: the affine scheme of Jacob et al. 2017, arXiv:1712.05877, section 2.1, for each group.

Shapes: O width out, I width in, G groups of 32 in a row, S rows, T rows of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.quant.int4_order import OUR_ORDER, ROW_STEP, find_order
from kernels.quant.matrix import QuantisedMatrix, multiply_by_tiles

GROUP_SIZE = 32
LARGEST_CODE = 15
MIDDLE_CODE = 8

FEW_ROWS = 64
"""Up to so many, torch's product is faster than writing tiles out.

``benchmarks/weights.py`` measures it, in its table of crossings."""

_QUANTISED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Int4Weights:
    """A matrix in 4 bits, as it is stored; a `kernels.quant.formats.StoredWeights`.

    A weight is ``(code - 8) * scale + centre``.

    Attributes:
        codes_OI: uint8, two codes each, the first in the high half: ``[O, I / 2]``.
        scales_OG: float32.
        centres_OG: float32.
    """

    codes_OI: torch.Tensor
    scales_OG: torch.Tensor
    centres_OG: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Width out and width in."""
        return self.codes_OI.shape[0], 2 * self.codes_OI.shape[1]

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers, ``[O, I]``."""
        wide = torch.promote_types(dtype, torch.float32)
        codes = torch.stack((self.codes_OI >> 4, self.codes_OI & 0xF), dim=-1)
        numbers = codes.view(self.shape[0], -1, GROUP_SIZE).to(wide).sub_(MIDDLE_CODE)
        numbers.mul_(self.scales_OG[..., None]).add_(self.centres_OG[..., None])
        return numbers.view(self.shape).to(dtype)

    def place(self, dtype: torch.dtype) -> QuantisedMatrix:
        """The matrix that computes in a dtype, on the device where the codes are."""
        return Int4Matrix(self, dtype)


def takes_int4(width: int) -> bool:
    """Whether groups divide a matrix of this width in."""
    return width % GROUP_SIZE == 0


def join_int4(parts: Sequence[Int4Weights]) -> Int4Weights:
    """Matrices of one width in, side by side."""
    return Int4Weights(
        torch.cat([part.codes_OI for part in parts]),
        torch.cat([part.scales_OG for part in parts]),
        torch.cat([part.centres_OG for part in parts]),
    )


def quantise_int4(weight_OI: torch.Tensor, dtype: torch.dtype = torch.float32) -> Int4Weights:
    """Rounds weights to 4 bits: a group's least becomes a code of 0, its largest of 15.

    Args:
        weight_OI: of a width that `takes_int4`, in any floating-point dtype.
        dtype: of the activations. If it is bfloat16, scales and centres will be rounded to it;
            codes are made with the rounded ones, so that it costs nothing.
    """
    rows, width = weight_OI.shape
    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    device = weight_OI.device
    codes_OI = torch.empty(rows, width // 2, dtype=torch.uint8, device=device)
    scales_OG = torch.empty(rows, width // GROUP_SIZE, device=device)
    centres_OG = torch.empty_like(scales_OG)
    step = max(1, _QUANTISED_AT_ONCE // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        weight = (
            weight_OI[part].to(torch.float32, copy=True).view(-1, width // GROUP_SIZE, GROUP_SIZE)
        )
        low, high = torch.aminmax(weight, dim=2)
        scales = ((high - low) / LARGEST_CODE).to(kept).float()
        centres = (low + MIDDLE_CODE * scales).to(kept).float()
        scales_OG[part], centres_OG[part] = scales, centres
        inverse = torch.where(scales > 0, scales.reciprocal(), 0.0)
        weight.sub_(centres[..., None]).mul_(inverse[..., None]).add_(MIDDLE_CODE).round_()
        codes = weight.clamp_(0, LARGEST_CODE).to(torch.uint8).view(-1, width)
        codes_OI[part] = (codes[:, ::2] << 4) | codes[:, 1::2]
    return Int4Weights(codes_OI, scales_OG, centres_OG)


class Int4Matrix:
    """Weights ``[O, I]`` in 4 bits; a `kernels.quant.matrix.QuantisedMatrix`.

    Args:
        weights: as they are stored. For activations in bfloat16, scales and centres are rounded to
            it, as torch's product wants them; the matrix is then the one with these.
        dtype: of the activations.

    Attributes:
        has_kernel: whether torch multiplies with it as it is.
    """

    row_step = ROW_STEP
    is_fixed = True

    def __init__(self, weights: Int4Weights, dtype: torch.dtype) -> None:
        self.shape = weights.shape
        is_on_cpu = weights.codes_OI.device.type == "cpu"
        self._order = find_order() if is_on_cpu else OUR_ORDER
        self.has_kernel = self._order.is_torchs and dtype in (torch.bfloat16, torch.float32)
        padding = (0, 0, 0, -self.shape[0] % ROW_STEP)
        self._packed = self._order.pack(F.pad(weights.codes_OI, padding))
        both = torch.stack((F.pad(weights.scales_OG, padding), F.pad(weights.centres_OG, padding)))
        kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self._scales_GO2 = both.permute(2, 1, 0).to(kept).contiguous()

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes, and scales with centres."""
        return self._packed, self._scales_GO2

    def multiply(self, x_SI: torch.Tensor) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.multiply`."""
        if not self.has_kernel or x_SI.shape[0] > FEW_ROWS:
            return multiply_by_tiles(self, x_SI)
        output_SO: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_SI.contiguous(), self._packed, GROUP_SIZE, self._scales_GO2
        )
        rows = self.shape[0]
        return output_SO if output_SO.shape[1] == rows else output_SO[:, :rows].contiguous()

    def read_rows(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.read_rows`."""
        wide = torch.promote_types(dtype, torch.float32)
        padded_end = end + -end % ROW_STEP
        scales_TG, centres_TG = (
            self._scales_GO2[:, start:padded_end].permute(2, 1, 0).to(wide).contiguous()
        )
        numbers_TI = self._order.unpack(self._packed[start:padded_end], wide)
        groups = numbers_TI.view(padded_end - start, -1, GROUP_SIZE)
        centres_TG -= MIDDLE_CODE * scales_TG  # few numbers, rather than all of the codes
        groups.mul_(scales_TG[..., None]).add_(centres_TG[..., None])
        return numbers_TI[: end - start].to(dtype)

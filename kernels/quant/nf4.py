"""Four bits a weight: the quantiles of a normal distribution, times a scale for each 64 weights.

Plain torch, for any device: how weights become codes and codes weights, bit for bit as bitsandbytes
stores them. A byte has two codes, the first weight's in its high half. The scales, a block's
largest weight each, are quantised themselves: less their mean, in blocks of 256, to 8-bit numbers
of which more stand near zero. `kernels.quant.nf4_matrix` multiplies with them.

Source: QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3, for 4-bit NormalFloat and double
quantisation; the numbers of `LEVELS` are in its appendix E. The 8-bit numbers: Dettmers 2015,
arXiv:1511.04561, section 2, and Dettmers et al. 2021, arXiv:2110.02861, section 2.

Shapes: O width out, I width in, T rows of a tile, G blocks of 64 in a row, N numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.quant.matrix import QuantisedMatrix

BLOCK_SIZE = 64
SCALE_BLOCK_SIZE = 256

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_LEAST = 1e-38  # for a block of zeros, lest it be divided by
_QUANTISED_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class NestedScales:
    """Scales of blocks that are quantised themselves.

    Attributes:
        codes_N: uint8.
        levels: the 256 numbers that they stand for.
        largest: of each 256 of them, float32.
        offset: added to all, a float32 scalar.
    """

    codes_N: torch.Tensor
    levels: torch.Tensor
    largest: torch.Tensor
    offset: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it holds."""
        return self.codes_N, self.levels, self.largest, self.offset

    def read(self, start: int, end: int) -> torch.Tensor:
        """The scales of some blocks, float32."""
        levels = self.levels.index_select(0, self.codes_N[start:end].int())
        places = torch.arange(start, end, device=levels.device) // SCALE_BLOCK_SIZE
        return levels.mul_(self.largest[places]).add_(self.offset)


@dataclass(frozen=True, slots=True)
class PlainScales:
    """Scales of blocks in 32 bits."""

    scales_N: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it holds."""
        return (self.scales_N,)

    def read(self, start: int, end: int) -> torch.Tensor:
        """The scales of some blocks, float32."""
        return self.scales_N[start:end]


@dataclass(frozen=True, slots=True)
class Nf4Weights:
    """A matrix in 4-bit NormalFloat, as it is stored; a `kernels.quant.formats.StoredWeights`.

    Attributes:
        codes_OI: uint8, two codes each: ``[O, I / 2]``.
        scales: of the blocks, row after row.
    """

    codes_OI: torch.Tensor
    scales: NestedScales | PlainScales

    @property
    def shape(self) -> tuple[int, int]:
        """Width out and width in."""
        return self.codes_OI.shape[0], 2 * self.codes_OI.shape[1]

    @property
    def num_blocks(self) -> int:
        """How many scales there are."""
        return 2 * self.codes_OI.numel() // BLOCK_SIZE

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers, ``[O, I]``."""
        return dequantise_nf4(self.codes_OI, self.scales.read(0, self.num_blocks), dtype)

    def place(self, dtype: torch.dtype) -> QuantisedMatrix:
        """The matrix that computes in a dtype, on the device where the codes are."""
        from kernels.quant.nf4_matrix import place_nf4

        return place_nf4(self, dtype)


def takes_nf4(width: int) -> bool:
    """Whether blocks end where rows do, in a matrix of this width in."""
    return width % BLOCK_SIZE == 0


def quantise_nf4(weight_OI: torch.Tensor, dtype: torch.dtype = torch.float32) -> Nf4Weights:
    """Rounds weights to the nearest level; the scales stay in 32 bits until they are joined.

    Args:
        weight_OI: of a width that `takes_nf4`, in any floating-point dtype.
        dtype: has no part in it.
    """
    rows, width = weight_OI.shape
    levels = torch.tensor(LEVELS)
    borders = ((levels[:-1] + levels[1:]) / 2).tolist()
    codes_OI = torch.empty(rows, width // 2, dtype=torch.uint8, device=weight_OI.device)
    scales_N = torch.empty(rows * width // BLOCK_SIZE, device=weight_OI.device)
    step = max(1, _QUANTISED_AT_ONCE // width)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        weight = weight_OI[start:end].to(torch.float32, copy=True).view(-1, BLOCK_SIZE)
        low, high = torch.aminmax(weight, dim=1)
        largest = torch.maximum(-low, high)
        scales_N[start * width // BLOCK_SIZE : end * width // BLOCK_SIZE] = largest
        weight.mul_(largest.clamp_min(_LEAST).reciprocal_()[:, None]).clamp_(-1, 1)
        # Counting the borders below is more than twice as fast as torch's search among them.
        codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
        for border in borders:
            codes += (weight > border).view(torch.uint8)
        codes_OI[start:end] = ((codes[:, ::2] << 4) | codes[:, 1::2]).view(end - start, -1)
    return Nf4Weights(codes_OI, PlainScales(scales_N))


def join_nf4(parts: Sequence[Nf4Weights]) -> Nf4Weights:
    """Matrices of one width in, side by side.

    Scales that are nested already are left so where the matrix stands alone, and are written out
    otherwise, for nesting them anew would change them.
    """
    if len(parts) == 1:
        return parts[0]
    scales = torch.cat([part.scales.read(0, part.num_blocks) for part in parts])
    return Nf4Weights(torch.cat([part.codes_OI for part in parts]), PlainScales(scales))


def nest_scales(weights: Nf4Weights) -> Nf4Weights:
    """The second quantisation: of the scales."""
    scales_N = weights.scales.read(0, weights.num_blocks)
    levels = make_dynamic_levels().to(scales_N.device)
    offset = scales_N.mean()
    rest_N = scales_N - offset
    blocks = torch.nn.functional.pad(rest_N, (0, -len(rest_N) % SCALE_BLOCK_SIZE))
    blocks = blocks.view(-1, SCALE_BLOCK_SIZE)
    largest = blocks.abs().amax(dim=1)
    scaled = blocks.mul(largest.clamp_min(_LEAST).reciprocal()[:, None]).clamp_(-1, 1)
    borders = (levels[:-1] + levels[1:]) / 2
    codes = torch.bucketize(scaled, borders).to(torch.uint8).flatten()[: len(rest_N)]
    nested = NestedScales(codes.contiguous(), levels, largest, offset)
    return Nf4Weights(weights.codes_OI, nested)


def dequantise_nf4(
    codes_TI: torch.Tensor, scales_N: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The numbers of some rows, ``[T, I]``.

    Args:
        codes_TI: two in each byte.
        scales_N: of their blocks.
        dtype: of the result; rounded to it once.
    """
    pairs = _level_pairs(codes_TI.device)
    numbers = pairs.index_select(0, codes_TI.flatten().int()).view(-1, BLOCK_SIZE)
    wide = torch.promote_types(dtype, torch.float32)
    scaled = numbers.to(wide).mul_(scales_N.to(wide)[:, None])
    return scaled.view(codes_TI.shape[0], -1).to(dtype)


@functools.cache
def make_dynamic_levels() -> torch.Tensor:
    """The 256 numbers that scales of blocks are rounded to, in order.

    A number has a sign, some zeros that count powers of ten, a one, and as many bits of a fraction
    as are left: fractions from 0.1 to 1 are cut evenly, each the middle of its part.
    """
    numbers = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1.0, -1.0):
            numbers += (sign * 10 ** (exponent - 6) * middles).tolist()
    return torch.tensor(sorted(numbers))


@functools.cache
def _level_pairs(device: torch.device) -> torch.Tensor:
    """Both numbers of each byte, ``[256, 2]``."""
    levels = torch.tensor(LEVELS, device=device)
    return torch.cartesian_prod(levels, levels)

"""Products with matrices in 4-bit NormalFloat.

Three ways: on an NVIDIA GPU bitsandbytes' product; on a CPU with instructions for bfloat16
(AVX512-BF16) bitsandbytes' product as well, with the codes in an order of its own; on any other CPU
tiles, which is right but slow. bitsandbytes has that order and the product for it without
promising either, so the first use tries both on a small matrix, and goes without where the result
is not as it must be.

Shapes: S rows, I width in, O width out, T rows of a tile, G blocks of 64 in a row, N numbers.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from kernels.errors import UnknownWeightFormat
from kernels.quant.bnb import import_bitsandbytes
from kernels.quant.matrix import QuantisedMatrix, multiply_by_tiles
from kernels.quant.nf4 import (
    BLOCK_SIZE,
    LEVELS,
    SCALE_BLOCK_SIZE,
    NestedScales,
    Nf4Weights,
    PlainScales,
    dequantise_nf4,
    quantise_nf4,
)

FEW_ROWS = 128
"""Up to so many, bitsandbytes' product is faster on a CPU than writing tiles out.

``benchmarks/weights.py`` measures it, in its table of crossings."""

_GROUP = 32  # so many rows of the matrix stand together in the packed order


def place_nf4(weights: Nf4Weights, dtype: torch.dtype) -> QuantisedMatrix:
    """The matrix that computes in a dtype, in the fastest way there is on its device.

    Raises:
        UnknownWeightFormat: it is on a GPU, and bitsandbytes is missing.
    """
    if weights.codes_OI.device.type == "cuda":
        return Nf4GpuMatrix(weights)
    if dtype == torch.bfloat16 and has_cpu_kernel():
        return Nf4PackedMatrix(weights)
    return Nf4Matrix(weights)


@functools.cache
def has_cpu_kernel() -> bool:
    """Whether a CPU multiplies few rows in the time that reading the weights takes."""
    try:
        if not import_bitsandbytes().functional.has_avx512bf16():
            return False
        generator = torch.Generator().manual_seed(0)
        weights = quantise_nf4(torch.randn(2 * _GROUP, 2 * BLOCK_SIZE, generator=generator))
        x_SI = torch.randn(3, 2 * BLOCK_SIZE, generator=generator)
        expected = torch.mm(x_SI, weights.dequantise(torch.float32).t())
        ours = Nf4PackedMatrix(weights).multiply_packed(x_SI.bfloat16())
    except (UnknownWeightFormat, AttributeError, RuntimeError, TypeError, ValueError, OSError):
        return False
    return bool((ours - expected).norm() < 0.02 * expected.norm())


class Nf4Matrix:
    """Weights ``[O, I]`` as they are stored, on any device.

    A `kernels.quant.matrix.QuantisedMatrix`.
    """

    row_step = 1
    is_fixed = True

    def __init__(self, weights: Nf4Weights) -> None:
        self.shape = weights.shape
        self._codes_OI = weights.codes_OI
        self._scales = weights.scales

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes and scales."""
        return self._codes_OI, *self._scales.tensors

    def multiply(self, x_SI: torch.Tensor) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.multiply`."""
        return multiply_by_tiles(self, x_SI)

    def read_rows(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.read_rows`."""
        blocks = self.shape[1] // BLOCK_SIZE
        scales_N = self._scales.read(start * blocks, end * blocks)
        return _write_out(self._codes_OI[start:end], scales_N, dtype)


class Nf4GpuMatrix(Nf4Matrix):
    """The same on an NVIDIA GPU, with bitsandbytes' product.

    Raises:
        UnknownWeightFormat: bitsandbytes is missing.
    """

    def __init__(self, weights: Nf4Weights) -> None:
        super().__init__(weights)
        self._library = import_bitsandbytes()
        self._state = _make_state(weights)

    def multiply(self, x_SI: torch.Tensor) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.multiply`."""
        if x_SI.dtype == torch.float64:
            return multiply_by_tiles(self, x_SI)
        output_SO: torch.Tensor = self._library.matmul_4bit(
            x_SI.contiguous(), self._codes_OI, self._state
        )
        return output_SO


class Nf4PackedMatrix:
    """Weights ``[O, I]`` in the order that bitsandbytes' product on a CPU reads.

    A `kernels.quant.matrix.QuantisedMatrix`, of activations in bfloat16. The scales are rounded to
    bfloat16, of which the product makes use; the matrix is then the one with these scales.

    In the packed order, 32 rows stand together, and each column of these as 32 bytes: the first 16
    rows' codes are in their low halves, those of the others in the high ones, two columns at once.
    """

    row_step = _GROUP
    is_fixed = True

    def __init__(self, weights: Nf4Weights) -> None:
        self.shape = weights.shape
        rows, width = weights.shape
        codes_OI = F.pad(weights.codes_OI, (0, 0, 0, -rows % _GROUP))
        scales_OG = weights.scales.read(0, weights.num_blocks).view(rows, -1)
        scales_OG = F.pad(scales_OG, (0, 0, 0, -rows % _GROUP))
        self._padded_shape = (codes_OI.shape[0], width)
        self._packed = _pack(codes_OI)
        self._scales_GO = scales_OG.t().to(torch.bfloat16).contiguous()
        self._levels = torch.tensor(LEVELS)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes and scales."""
        return self._packed, self._scales_GO

    def multiply(self, x_SI: torch.Tensor) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.multiply`."""
        if x_SI.shape[0] <= FEW_ROWS:
            return self.multiply_packed(x_SI)
        return multiply_by_tiles(self, x_SI)

    def multiply_packed(self, x_SI: torch.Tensor) -> torch.Tensor:
        """The product as bitsandbytes has it."""
        output_SO: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit(
            x_SI.contiguous(),
            self._packed,
            self._padded_shape,
            self._scales_GO,
            self._levels,
            BLOCK_SIZE,
        )
        rows = self.shape[0]
        return output_SO if output_SO.shape[1] == rows else output_SO[:, :rows].contiguous()

    def read_rows(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.read_rows`."""
        padded_end = end + -end % _GROUP
        codes_TI = _unpack(self._packed[start:padded_end])[: end - start]
        scales_N = self._scales_GO[:, start:end].t().float().flatten()
        return _write_out(codes_TI, scales_N, dtype)


def _write_out(codes_TI: torch.Tensor, scales_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`dequantise_nf4`, by bitsandbytes where it can: that is twenty times faster on a CPU."""
    if dtype == torch.float64 or not _has_library():
        return dequantise_nf4(codes_TI, scales_N, dtype)
    shape = (codes_TI.shape[0], 2 * codes_TI.shape[1])
    numbers_TI: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes_TI, scales_N, BLOCK_SIZE, "nf4", shape, dtype
    )
    return numbers_TI


@functools.cache
def _has_library() -> bool:
    try:
        import_bitsandbytes()
    except UnknownWeightFormat:
        return False
    return True


def _make_state(weights: Nf4Weights) -> object:
    """What bitsandbytes wants to know of a matrix besides its codes."""
    quant_state = import_bitsandbytes().functional.QuantState
    levels = torch.tensor(LEVELS, device=weights.codes_OI.device)
    shape = torch.Size(weights.shape)
    if isinstance(weights.scales, PlainScales):
        return quant_state(
            absmax=weights.scales.scales_N,
            shape=shape,
            code=levels,
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
            dtype=torch.float32,
        )
    scales: NestedScales = weights.scales
    nested = quant_state(
        absmax=scales.largest, code=scales.levels, blocksize=SCALE_BLOCK_SIZE, dtype=torch.float32
    )
    return quant_state(
        absmax=scales.codes_N,
        shape=shape,
        code=levels,
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        dtype=torch.float32,
        offset=scales.offset,
        state2=nested,
    )


def _pack(codes_OI: torch.Tensor) -> torch.Tensor:
    """Codes in the packed order, ``[O, I / 2]``; some rows at a time."""
    packed = torch.empty_like(codes_OI)
    bytes_wide = codes_OI.shape[1]
    for start in range(0, codes_OI.shape[0], _GROUP):
        low, high = codes_OI[start : start + _GROUP].view(2, _GROUP // 2, bytes_wide)
        first = (low >> 4) | (high & 0xF0)  # of the first of two columns, both rows' codes
        second = (low & 0xF) | ((high & 0xF) << 4)
        both = torch.stack((first, second), dim=-1).transpose(0, 1)
        packed[start : start + _GROUP] = both.reshape(_GROUP, bytes_wide)
    return packed


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes in their usual order again, ``[T, I / 2]``; T is a multiple of 32."""
    groups, bytes_wide = packed.shape[0] // _GROUP, packed.shape[1]
    half = _GROUP // 2
    # Two columns of a row are one number of 16 bits, so that they change places as one.
    pairs = packed.view(torch.int16).view(groups, bytes_wide, half).transpose(1, 2).contiguous()
    codes = torch.empty(groups, 2, half, bytes_wide, dtype=torch.uint8)
    codes[:, 0] = ((pairs & 0xF) << 4) | ((pairs >> 8) & 0xF)
    codes[:, 1] = (pairs & 0xF0) | ((pairs >> 12) & 0xF)
    return codes.view(groups * _GROUP, bytes_wide)

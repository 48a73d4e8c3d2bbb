"""Rows as four or five bits a value, after a rotation that spreads outliers, by groups.

Hidden states have a few channels, and a few tokens, with values many times all others': between
blocks of SmolLM2-135M one value of 576 makes a third of a row's squares, four make half, and the
first token's largest is 24,721 where the median row's is 73. In equal steps of four bits they leave
nothing of the others: perplexity rises by 57 %. So, of each row:

1. The `OUTLIERS` largest values of each `BLOCK_VALUES` are kept apart in bfloat16, with their
   places, and zeros stand for them (as in "SpQR", Dettmers et al., 2023, arXiv:2306.03078).
2. Each group of `GROUP_VALUES` is multiplied by a Hadamard matrix, so that its values become about
   normal, of like size (as in "QuaRot", Ashkboos et al., 2024, arXiv:2404.00456). By
   additions alone: a product of matrices rounds otherwise for few rows than for many, and a row's
   bytes must be its own.
3. Each is divided by the group's largest, with its sign, so that the largest is 1; and the nearest
   of 16 or 32 levels is taken, which are the best for what is normal and so divided (as in "BOF4",
   Blumenberg et al., 2025, arXiv:2505.06653; levels by Lloyd's rounds, with 0 and 1 among them, as
   `tests/kernels/test_codecs_hadamard.py` repeats).

Measured on the way there (12 windows of 512 tokens, 5 hops, float32), as the rise of the
perplexity: plain int4 with groups of 32: 57 %; NormalFloat levels: 22 %; plain with 4 outliers of
each row apart: 9.5 %; NormalFloat levels with them: 5.7 %; outliers of blocks, rotation and these
levels: 3.1 % (standard error 0.5); the same with five bits: 0.9 % (0.3). `benchmarks/codecs.py`
repeats the last two. The last link, whose output meets the head, makes nearly half of it; in
generation one row of a whole prefill crosses it.

Shapes: S rows, D hidden size, R bytes of an encoded row, T groups of a row, N values of a group,
B blocks of a row, K outliers of a block.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from kernels.codecs.groups import SCALE_BYTES, SMALLEST_SCALE, count_groups, read_numbers
from kernels.codecs.rows import check_finite, decode_rows, encode_rows, store_values

GROUP_VALUES = 64
BLOCK_GROUPS = 3
BLOCK_VALUES = BLOCK_GROUPS * GROUP_VALUES
"""So that a place takes one byte, and a row of 576 values is three whole blocks."""

OUTLIERS = 4

LEVELS = {
    4: (
        *(-0.8566, -0.6688, -0.5235, -0.4008, -0.2913, -0.1902, -0.0939, 0.0),
        *(0.0892, 0.1803, 0.2754, 0.3770, 0.4895, 0.6196, 0.7795, 1.0),
    ),
    5: (
        *(-0.9308, -0.8202, -0.7275, -0.6473, -0.5754, -0.5099, -0.4491, -0.3920),
        *(-0.3379, -0.2861, -0.2362, -0.1875, -0.1398, -0.0927, -0.0462, 0.0),
        *(0.0450, 0.0902, 0.1359, 0.1824, 0.2297, 0.2782, 0.3282, 0.3802),
        *(0.4346, 0.4923, 0.5544, 0.6219, 0.6968, 0.7813, 0.8800, 1.0),
    ),
}
"""By the bits of a value, ascending."""

FINENESS = 127
"""A value's level is looked up for the nearest whole number of 127ths."""

HALF = GROUP_VALUES // 2
EIGHTH = GROUP_VALUES // 8

PLACE_BITS = 0xFF

ROOM = 64
"""A value times so much must be finite in float32, so that the sum of a group is."""

FEW = 1 << 13
"""Values up to which the time goes to beginning operations, not to doing them: a few rows."""


class HadamardCodec:
    """Four or five bits for each value of rotated groups, and outliers in sixteen.

    A row is its groups' scales and its outliers in bfloat16, block by block; a byte for each
    outlier's place in its block; for each group 32 bytes, of which byte i has the low four bits of
    the values i, and, above them, i + 32; and, of five bits, 8 bytes for each group, of which bit j
    of byte i is the fifth of the value 8 j + i. Groups are whole: the last one is filled up.

    Args:
        bits: of a value, 4 or 5.
    """

    is_lossy = True

    def __init__(self, bits: int) -> None:
        self.name = f"hadamard{bits}"
        self._bits = bits

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """How many bytes each row takes."""
        groups, blocks = _count(hidden_size)
        outlier_bytes = SCALE_BYTES + 1
        return SCALE_BYTES * groups + outlier_bytes * OUTLIERS * blocks + groups * self._group_bytes

    def encode(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Rows as bytes."""
        row_bytes = self.row_bytes(hidden_SD.shape[1], hidden_SD.dtype)
        return encode_rows(hidden_SD, row_bytes, self._encode)

    def decode(self, data_SR: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes as rows."""
        return decode_rows(data_SR, hidden_size, dtype, self._decode)

    @property
    def _group_bytes(self) -> int:
        return GROUP_VALUES * self._bits // 8

    def _encode(self, rows_SD: torch.Tensor, data_SR: torch.Tensor) -> None:
        count, hidden_size = rows_SD.shape
        groups, blocks = _count(hidden_size)
        blocks_SBN = _pad_rows(rows_SD, blocks * BLOCK_VALUES).view(count, blocks, BLOCK_VALUES)
        place_SBK = _find_outliers(blocks_SBN)
        outlier_SBK = blocks_SBN.gather(2, place_SBK)
        check_finite(outlier_SBK.abs().mul_(ROOM), rows_SD.dtype, self.name)
        blocks_SBN.scatter_(2, place_SBK, 0)
        # Turned, so that each step goes over long runs: [N, groups of all rows].
        filled_SD = blocks_SBN.view(count, -1)[:, : groups * GROUP_VALUES]
        turned_NT = filled_SD.reshape(-1, GROUP_VALUES).t().contiguous()
        rotated_NT = _rotate(turned_NT)
        scale_T = _signed_scales(rotated_NT)
        packed = self._pack(self._choose_levels(rotated_NT, scale_T.to(torch.float32)))
        parts = (
            scale_T.view(count, groups).view(torch.uint8),
            outlier_SBK.view(count, -1).to(torch.bfloat16).view(torch.uint8),
            place_SBK.view(count, -1).to(torch.uint8),
            *(part_NT.t().contiguous().view(count, -1) for part_NT in packed),
        )
        torch.cat(parts, dim=1, out=data_SR)

    def _decode(self, data_SR: torch.Tensor, rows_SD: torch.Tensor) -> None:
        count, hidden_size = rows_SD.shape
        groups, blocks = _count(hidden_size)
        numbers_SK = read_numbers(data_SR, 0, groups + blocks * OUTLIERS).to(torch.float32)
        scale_ST, outlier_SK = numbers_SK[:, :groups], numbers_SK[:, groups:]
        at = SCALE_BYTES * numbers_SK.shape[1]
        # Made-up places may be beyond the block: they are brought into it.
        places_SK = data_SR[:, at : at + outlier_SK.shape[1]].to(torch.int64)
        place_SBK = places_SK.clamp_max_(BLOCK_VALUES - 1).view(count, blocks, OUTLIERS)
        values_NT = self._unpack(data_SR[:, at + outlier_SK.shape[1] :], groups)
        values_NT *= scale_ST.reshape(-1).mul_(1 / GROUP_VALUES)
        filled_SD = _rotate(values_NT).t().contiguous().view(count, -1)
        values_SD = _pad_rows(filled_SD, blocks * BLOCK_VALUES)
        blocks_SBN = values_SD.view(count, blocks, BLOCK_VALUES)
        blocks_SBN.scatter_(2, place_SBK, outlier_SK.reshape(count, blocks, OUTLIERS))
        store_values(values_SD[:, :hidden_size], rows_SD)

    def _choose_levels(self, rotated_NT: torch.Tensor, scale_T: torch.Tensor) -> torch.Tensor:
        """Indices of the levels, uint8 ``[N, T]``; changes what it is given."""
        rotated_NT *= scale_T.reciprocal().mul_(FINENESS)
        index_NT = rotated_NT.round_().to(torch.int32).add_(FINENESS)
        table = _nearest_levels(self._bits, rotated_NT.device)
        return table.index_select(0, index_NT.view(-1)).view(GROUP_VALUES, -1)

    def _pack(self, codes_NT: torch.Tensor) -> list[torch.Tensor]:
        """Codes as bytes: ``[32, T]``, and, of five bits, ``[8, T]``."""
        high_NT = codes_NT[HALF:] << 4  # of a fifth bit nothing is left
        if self._bits == 4:
            return [high_NT.bitwise_or_(codes_NT[:HALF])]
        parts = [high_NT.bitwise_or_(codes_NT[:HALF] & 15)]
        fifth_NT = codes_NT.bitwise_right_shift_(4).view(8, EIGHTH, -1)
        while len(fifth_NT) > 1:  # halves: bits 4 apart, then 2, then 1
            half = len(fifth_NT) // 2
            fifth_NT = (fifth_NT[half:] << half).bitwise_or_(fifth_NT[:half])
        return [*parts, fifth_NT[0]]

    def _unpack(self, packed_SR: torch.Tensor, groups: int) -> torch.Tensor:
        """Bytes as the levels that they stand for, float32 ``[N, T]``."""
        middle = groups * HALF
        pairs_NT = packed_SR[:, :middle].reshape(-1, HALF).t().contiguous()
        shape = GROUP_VALUES, pairs_NT.shape[1]
        code_NT = torch.empty(shape, dtype=torch.uint8, device=packed_SR.device)
        torch.bitwise_and(pairs_NT, 15, out=code_NT[:HALF])
        torch.bitwise_right_shift(pairs_NT, 4, out=code_NT[HALF:])
        if self._bits > 4:
            byte_NT = packed_SR[:, middle:].reshape(-1, EIGHTH).t().contiguous()
            shifts = _shifts(packed_SR.device)
            fifth_NT = (byte_NT >> shifts).bitwise_and_(1).bitwise_left_shift_(4)
            code_NT |= fifth_NT.view(shape)
        table = _levels(self._bits, packed_SR.device)
        return table.index_select(0, code_NT.view(-1).to(torch.int32)).view(shape)


def _count(hidden_size: int) -> tuple[int, int]:
    """Groups and blocks of a row."""
    groups = count_groups(hidden_size, GROUP_VALUES)
    return groups, -(-groups // BLOCK_GROUPS)


def _pad_rows(rows_SD: torch.Tensor, width: int) -> torch.Tensor:
    """Float32 rows with zeros up to a width; a copy, to be written to."""
    count, hidden_size = rows_SD.shape
    if hidden_size == width:
        return rows_SD.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    padded_SD = torch.empty((count, width), dtype=torch.float32, device=rows_SD.device)
    padded_SD[:, :hidden_size] = rows_SD
    padded_SD[:, hidden_size:] = 0
    return padded_SD


def _find_outliers(blocks_SBN: torch.Tensor) -> torch.Tensor:
    """Places of the largest absolute values of each block, ``[S, B, K]`` int64.

    Written over the last bits of a value's pattern, the place comes out of the maximum itself; so
    values that agree in the other bits go by their places, whichever way they are found.
    """
    pattern_SBN = blocks_SBN.view(torch.int32) & (0x7FFFFFFF ^ PLACE_BITS)
    pattern_SBN |= _places(blocks_SBN.device)
    if pattern_SBN.numel() <= FEW:
        largest_SBK = pattern_SBN.topk(OUTLIERS, dim=2).values
        return largest_SBK.bitwise_and_(PLACE_BITS).to(torch.int64)
    places = []
    for _ in range(OUTLIERS):  # of many, a fifth of the time that `topk` takes
        place_SB1 = pattern_SBN.amax(dim=2, keepdim=True).bitwise_and_(PLACE_BITS).to(torch.int64)
        pattern_SBN.scatter_(2, place_SB1, -1)
        places.append(place_SB1)
    return torch.cat(places, dim=2)


def _rotate(values_NT: torch.Tensor) -> torch.Tensor:
    """Columns multiplied by the Hadamard matrix of their length, not normalised.

    The fast Walsh-Hadamard transform: sums and differences of values 32 apart, then 16, and so on.
    Changes what it is given.
    """
    if values_NT.device.type == "cpu" and values_NT.numel() <= FEW:
        with np.errstate(all="ignore"):  # of made-up bytes it may be infinity less infinity
            return torch.from_numpy(_rotate_few(values_NT.numpy()))
    count, columns = values_NT.shape
    other_NT = torch.empty_like(values_NT)
    apart = count // 2
    while apart:
        pairs, sums = (t.view(-1, 2, apart * columns) for t in (values_NT, other_NT))
        torch.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
        values_NT, other_NT = other_NT, values_NT
        apart //= 2
    return values_NT


def _rotate_few(values_NT: np.ndarray) -> np.ndarray:
    """The same additions by numpy, which takes a tenth of the time to begin one."""
    apart = len(values_NT) // 2
    while apart:
        pairs = values_NT.reshape(-1, 2, apart * values_NT.shape[1])
        sums = np.empty_like(pairs)
        np.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
        values_NT = sums.reshape(values_NT.shape)
        apart //= 2
    return values_NT


def _signed_scales(rotated_NT: torch.Tensor) -> torch.Tensor:
    """The value of each column that is largest without its sign, bfloat16; none is zero."""
    high_T, low_T = rotated_NT.amax(dim=0), rotated_NT.amin(dim=0)
    scale_T = torch.where(high_T >= -low_T, high_T, low_T)
    scale_T.masked_fill_(scale_T.abs() < SMALLEST_SCALE, SMALLEST_SCALE)
    return scale_T.to(torch.bfloat16)


@functools.cache
def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(BLOCK_VALUES, dtype=torch.int32, device=device)


@functools.cache
def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device).view(8, 1, 1)


@functools.cache
def _levels(bits: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(LEVELS[bits], dtype=torch.float32, device=device)


@functools.cache
def _nearest_levels(bits: int, device: torch.device) -> torch.Tensor:
    """For whole numbers of 127ths, from -127, the index of the nearest level, uint8."""
    levels = torch.tensor(LEVELS[bits], dtype=torch.float64)
    parts = torch.arange(-FINENESS, FINENESS + 1, dtype=torch.float64) / FINENESS
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(parts, middles).to(torch.uint8).to(device)

"""The codecs of groups once more, a row and a group at a time: what the fast ones are tested by.

Shapes: D hidden size, R bytes of an encoded row, N values of a group.
"""

from __future__ import annotations

import struct

import torch

from kernels.codecs import dynamic8, hadamard, int8
from kernels.codecs.groups import SMALLEST_SCALE


def encode_int8(row_D: torch.Tensor) -> bytes:
    """One row as the bytes of `int8.Int8Codec`."""
    scales, codes = b"", b""
    for part_N in _cut(row_D.to(torch.float32), int8.GROUP_VALUES):
        scale = _round(part_N.abs().max().clamp_min(SMALLEST_SCALE))
        scales += _bfloat16(scale)
        codes += bytes(int(code) & 255 for code in (part_N * (scale.reciprocal() * 127)).round())
    return scales + codes


def encode_dynamic8(row_D: torch.Tensor) -> bytes:
    """One row as the bytes of `dynamic8.Dynamic8Codec`."""
    values = dynamic8.dynamic_map()
    middles = (values[1:] + values[:-1]) / 2
    scales, codes = b"", b""
    for part_N in _cut(row_D.to(torch.float32), dynamic8.GROUP_VALUES):
        scale = _round(part_N.abs().max().clamp_min(SMALLEST_SCALE))
        scales += _bfloat16(scale)
        for value in (part_N * scale.reciprocal()).to(torch.float16).to(torch.float32):
            codes += bytes([int((middles < value).sum())])
    return scales + codes


def encode_hadamard(row_D: torch.Tensor, bits: int) -> bytes:
    """One row as the bytes of `hadamard.HadamardCodec`."""
    groups = -(-len(row_D) // hadamard.GROUP_VALUES)
    blocks = -(-groups // hadamard.BLOCK_GROUPS)
    width = blocks * hadamard.BLOCK_VALUES
    padded_D = torch.nn.functional.pad(row_D.to(torch.float32), (0, width - len(row_D)))
    scales, outliers, places, low, fifth = b"", b"", b"", b"", b""
    for block_N in _cut(padded_D, hadamard.BLOCK_VALUES):
        for place in _largest_places(block_N):
            outliers += _bfloat16(_round(block_N[place]))
            places += bytes([place])
            block_N[place] = 0
    for part_N in _cut(padded_D, hadamard.GROUP_VALUES)[:groups]:
        rotated_N = _rotate(part_N)
        high, least = rotated_N.max(), rotated_N.min()
        scale = high if high >= -least else least
        scale = _round(scale if abs(scale) >= SMALLEST_SCALE else torch.tensor(SMALLEST_SCALE))
        scales += _bfloat16(scale)
        whole_N = (rotated_N * (scale.reciprocal() * hadamard.FINENESS)).round()
        levels = torch.tensor(hadamard.LEVELS[bits], dtype=torch.float64)
        away_NL = whole_N.to(torch.float64)[:, None] / hadamard.FINENESS - levels
        codes = away_NL.abs().argmin(dim=1).tolist()
        low += bytes(codes[i] & 15 | (codes[i + 32] & 15) << 4 for i in range(32))
        fifth += bytes(sum((codes[8 * j + i] >> 4) << j for j in range(8)) for i in range(8))
    return scales + outliers + places + low + (fifth if bits > 4 else b"")


def _cut(row_D: torch.Tensor, size: int) -> list[torch.Tensor]:
    return [row_D[start : start + size] for start in range(0, len(row_D), size)]


def _largest_places(block_N: torch.Tensor) -> list[int]:
    patterns = block_N.abs().view(torch.int32).tolist()
    keyed = [(pattern | 255) - 255 + place for place, pattern in enumerate(patterns)]
    return sorted(range(len(keyed)), key=lambda place: -keyed[place])[: hadamard.OUTLIERS]


def _rotate(part_N: torch.Tensor) -> torch.Tensor:
    apart = len(part_N) // 2
    while apart:
        next_N = part_N.clone()
        for i in range(len(part_N)):
            if i & apart:
                next_N[i] = part_N[i - apart] - part_N[i]
            else:
                next_N[i] = part_N[i] + part_N[i + apart]
        part_N, apart = next_N, apart // 2
    return part_N


def _round(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16).to(torch.float32)


def _bfloat16(value: torch.Tensor) -> bytes:
    return struct.pack("<f", value.item())[2:]

"""Rows as floats of eight bits whose exponent is as long as it must be, by groups.

Shapes: S rows, D hidden size, R bytes of an encoded row, G groups of a row, N values of a group.
"""

from __future__ import annotations

import functools

import torch

from kernels.codecs.groups import SCALE_BYTES, count_groups, find_scales, group_rows, read_numbers
from kernels.codecs.rows import check_finite, decode_rows, encode_rows, store_values

GROUP_VALUES = 256
"""Values that share a scale. The map has fine steps over seven powers of ten, so that an outlier
spoils less than in `int8`."""

DECADES = 7
"""Powers of ten that the map reaches over, each with its own number of steps."""


@functools.cache
def dynamic_map() -> torch.Tensor:
    """The 256 values of the signed dynamic map, float32, ascending.

    Sections 1.3 and 2.2 of "8-bit Optimizers via Block-wise Quantization" (Dettmers et al.,
    2021, arXiv:2110.02861): after the sign, a run of zeros is the exponent, a one ends it, and the
    bits that are left cut the decade from 0.1 to 1 into equal parts, of which the middles are
    taken. The more zeros, the fewer bits are left: 64 steps from 0.1 to 1, 32 from 0.01 to 0.1, and
    so on to a single one. To these come 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(DECADES):
        steps = 2 ** (DECADES - 1 - decade)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0**-decade).tolist()
        values += middles + [-middle for middle in middles]
    return torch.tensor(sorted(values), dtype=torch.float32)


class Dynamic8Codec:
    """Eight bits for each value: the nearest of `dynamic_map` times the largest of its group.

    Small values keep their leading digit beside large ones. A row is its groups' scales in
    bfloat16, then a byte for each value, an index of the map; see `kernels.codecs.groups`.
    """

    name = "dynamic8"
    is_lossy = True

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """How many bytes each row takes."""
        return SCALE_BYTES * count_groups(hidden_size, GROUP_VALUES) + hidden_size

    def encode(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Rows as bytes."""
        row_bytes = self.row_bytes(hidden_SD.shape[1], hidden_SD.dtype)
        return encode_rows(hidden_SD, row_bytes, self._encode)

    def decode(self, data_SR: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes as rows."""
        return decode_rows(data_SR, hidden_size, dtype, self._decode)

    def _encode(self, rows_SD: torch.Tensor, data_SR: torch.Tensor) -> None:
        count, hidden_size = rows_SD.shape
        grouped_SGN = group_rows(rows_SD, GROUP_VALUES)
        bfloat16_SG = find_scales(grouped_SGN)
        scale_SG = bfloat16_SG.to(torch.float32)
        check_finite(scale_SG, rows_SD.dtype, self.name)
        scale_bytes = SCALE_BYTES * scale_SG.shape[1]
        data_SR[:, :scale_bytes] = bfloat16_SG.view(torch.uint8)
        # To search among the map's middles takes twenty times as long as to look the code up for
        # each of float16's bit patterns, whose steps near one are a thirtieth of the map's.
        parts_SGN = (grouped_SGN * scale_SG.reciprocal_().unsqueeze_(2)).to(torch.float16)
        patterns = parts_SGN.view(torch.int16).view(-1).to(torch.int32).bitwise_and_(0xFFFF)
        codes = _codes_of_float16(rows_SD.device).index_select(0, patterns)
        data_SR[:, scale_bytes:] = codes.view(count, -1)[:, :hidden_size]

    def _decode(self, data_SR: torch.Tensor, rows_SD: torch.Tensor) -> None:
        count, hidden_size = rows_SD.shape
        groups = count_groups(hidden_size, GROUP_VALUES)
        scale_SG = read_numbers(data_SR, 0, groups).to(torch.float32)
        width = groups * GROUP_VALUES
        index_SD = torch.zeros((count, width), dtype=torch.int32, device=data_SR.device)
        index_SD[:, :hidden_size] = data_SR[:, SCALE_BYTES * groups :]
        values = _map_on(data_SR.device).index_select(0, index_SD.view(-1))
        grouped_SGN = values.view(count, groups, GROUP_VALUES).mul_(scale_SG.unsqueeze_(2))
        store_values(grouped_SGN.view(count, -1)[:, :hidden_size], rows_SD)


@functools.cache
def _map_on(device: torch.device) -> torch.Tensor:
    return dynamic_map().to(device)


@functools.cache
def _codes_of_float16(device: torch.device) -> torch.Tensor:
    """For each bit pattern of float16 the index of the nearest value in the map, uint8."""
    values = dynamic_map()
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    middles = (values[1:] + values[:-1]) / 2
    return torch.bucketize(patterns.to(torch.float32), middles).to(torch.uint8).to(device)

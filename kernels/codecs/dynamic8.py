"""Rows as floats of eight bits whose exponent is as long as it must be, by groups.

Shapes: S rows, D hidden size, R bytes of an encoded row, G groups of a row, N values of a group.
"""

from __future__ import annotations

import functools

import torch

from kernels.codecs.groups import SCALE_BYTES, count_groups, find_scales, group_rows, read_scales
from kernels.codecs.rows import check_finite, row_chunks

GROUP_VALUES = 256
"""Values that share a scale. The map has fine steps over seven powers of ten, so that an outlier
spoils less than in `int8`."""

DECADES = 7
"""Powers of ten that the map reaches over, each with its own number of steps."""


@functools.cache
def dynamic_map() -> torch.Tensor:
    """The 256 values of the signed dynamic map, float32, ascending.

    Section 1.3 and figure 2 of "8-bit Optimizers via Block-wise Quantization" (Dettmers et al.,
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
        rows_SD = hidden_SD.detach()
        count, hidden_size = rows_SD.shape
        shape = count, self.row_bytes(hidden_size, rows_SD.dtype)
        data_SR = torch.empty(shape, dtype=torch.uint8, device=rows_SD.device)
        for chunk in row_chunks(count, hidden_size):
            self._encode_rows(rows_SD[chunk], data_SR[chunk])
        return data_SR.cpu()

    def decode(self, data_SR: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes as rows."""
        shape = len(data_SR), hidden_size
        rows_SD = torch.empty(shape, dtype=dtype, device=data_SR.device)
        for chunk in row_chunks(len(data_SR), hidden_size):
            self._decode_rows(data_SR[chunk], rows_SD[chunk])
        return rows_SD

    def _encode_rows(self, rows_SD: torch.Tensor, data_SR: torch.Tensor) -> None:
        count, hidden_size = rows_SD.shape
        grouped_SGN = group_rows(rows_SD, GROUP_VALUES)
        scale_SG = find_scales(grouped_SGN)
        scale_bytes = SCALE_BYTES * scale_SG.shape[1]
        data_SR[:, :scale_bytes] = scale_SG.view(torch.uint8)
        scale_SG = scale_SG.to(torch.float32)
        if scale_SG.numel():
            check_finite(scale_SG.amax(), rows_SD.dtype, self.name)
        parts_SGN = grouped_SGN * scale_SG.reciprocal_()[:, :, None]
        codes_SGN = torch.bucketize(parts_SGN, _middles().to(parts_SGN.device), out_int32=True)
        data_SR[:, scale_bytes:] = codes_SGN.view(count, -1)[:, :hidden_size]

    def _decode_rows(self, data_SR: torch.Tensor, rows_SD: torch.Tensor) -> None:
        hidden_size = rows_SD.shape[1]
        groups = count_groups(hidden_size, GROUP_VALUES)
        scale_SG, scale_bytes = read_scales(data_SR, groups), SCALE_BYTES * groups
        values = dynamic_map().to(data_SR.device)
        grouped_SGN = group_rows(values[data_SR[:, scale_bytes:].to(torch.int32)], GROUP_VALUES)
        grouped_SGN = grouped_SGN * scale_SG[:, :, None]
        rows_SD.copy_(grouped_SGN.view(len(rows_SD), -1)[:, :hidden_size])


@functools.cache
def _middles() -> torch.Tensor:
    """Between neighbours of the map; above one, the upper neighbour is nearer."""
    values = dynamic_map()
    return (values[1:] + values[:-1]) / 2

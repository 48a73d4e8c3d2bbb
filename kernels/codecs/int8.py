"""Rows as whole numbers of eight bits, by groups.

Shapes: S rows, D hidden size, R bytes of an encoded row, G groups of a row, N values of a group.
"""

from __future__ import annotations

import torch

from kernels.codecs.groups import SCALE_BYTES, count_groups, find_scales, group_rows, read_scales
from kernels.codecs.rows import check_finite, row_chunks

GROUP_VALUES = 64
"""Values that share a scale: a 16-bit scale for 64 values costs 3 % of the bytes, and an outlier
spoils the resolution of its 63 neighbours only."""

LARGEST_CODE = 127

STEP = 1 / LARGEST_CODE
"""Of the codes, as part of the scale."""


class Int8Codec:
    """Eight bits for each value, in equal steps up to the largest of its group.

    A row is its groups' scales in bfloat16, then its values in int8; see `kernels.codecs.groups`.
    """

    name = "int8"
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
        codes_SGN = (grouped_SGN * (LARGEST_CODE / scale_SG)[:, :, None]).round_()
        data_SR[:, scale_bytes:].view(torch.int8).copy_(codes_SGN.view(count, -1)[:, :hidden_size])

    def _decode_rows(self, data_SR: torch.Tensor, rows_SD: torch.Tensor) -> None:
        hidden_size = rows_SD.shape[1]
        groups = count_groups(hidden_size, GROUP_VALUES)
        scale_SG, scale_bytes = read_scales(data_SR, groups), SCALE_BYTES * groups
        codes_SD = data_SR[:, scale_bytes:].view(torch.int8)
        grouped_SGN = group_rows(codes_SD, GROUP_VALUES)
        grouped_SGN *= (scale_SG * STEP)[:, :, None]
        rows_SD.copy_(grouped_SGN.view(len(rows_SD), -1)[:, :hidden_size])

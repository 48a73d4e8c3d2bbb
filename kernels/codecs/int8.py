"""Rows as whole numbers of eight bits, by groups.

Shapes: S rows, D hidden size, R bytes of an encoded row, G groups of a row, N values of a group.
"""

from __future__ import annotations

import torch

from kernels.codecs.groups import SCALE_BYTES, count_groups, find_scales, group_rows, read_numbers
from kernels.codecs.rows import check_finite, decode_rows, encode_rows, store_values

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
        codes_SGN = grouped_SGN * (LARGEST_CODE / scale_SG).unsqueeze_(2)
        codes_SD = codes_SGN.round_().view(count, -1)[:, :hidden_size]
        data_SR[:, scale_bytes:].view(torch.int8).copy_(codes_SD)

    def _decode(self, data_SR: torch.Tensor, rows_SD: torch.Tensor) -> None:
        count, hidden_size = rows_SD.shape
        groups = count_groups(hidden_size, GROUP_VALUES)
        scale_SG = read_numbers(data_SR, 0, groups).to(torch.float32)
        codes_SD = data_SR[:, SCALE_BYTES * groups :].view(torch.int8)
        grouped_SGN = group_rows(codes_SD, GROUP_VALUES)
        grouped_SGN *= scale_SG.mul_(STEP).unsqueeze_(2)
        store_values(grouped_SGN.view(count, -1)[:, :hidden_size], rows_SD)

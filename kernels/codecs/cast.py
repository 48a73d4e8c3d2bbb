"""Rows as floats of sixteen bits.

Shapes: S rows, D hidden size, R bytes of an encoded row.
"""

from __future__ import annotations

import math

import torch

from kernels.codecs.raw import view_as
from kernels.codecs.rows import not_finite, store_values


class CastCodec:
    """Each value rounded to a float of sixteen bits, little-endian.

    What is of that dtype already is written as it is; yet `is_lossy` is said for any dtype.

    Args:
        name: of a dtype of torch.
    """

    is_lossy = True

    def __init__(self, name: str) -> None:
        self.name = name
        self._dtype: torch.dtype = getattr(torch, name)

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """How many bytes each row takes."""
        return hidden_size * self._dtype.itemsize

    def encode(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Rows as bytes."""
        cast_SD = hidden_SD.detach().to(self._dtype).contiguous()
        # The sum of finite numbers is finite, but for huge ones: only those are looked at singly.
        if not math.isfinite(cast_SD.sum(dtype=torch.float32)) and not cast_SD.isfinite().all():
            raise not_finite(hidden_SD.dtype, self.name)
        return cast_SD.cpu().view(torch.uint8)

    def decode(self, data_SR: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes as rows."""
        cast_SD = view_as(data_SR, self._dtype)
        if cast_SD.dtype == dtype:
            return cast_SD
        rows_SD = torch.empty(cast_SD.shape, dtype=dtype, device=cast_SD.device)
        store_values(cast_SD.to(torch.float32), rows_SD)
        return rows_SD

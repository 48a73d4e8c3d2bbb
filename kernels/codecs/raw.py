"""Rows as they are in memory.

Shapes: S rows, D hidden size, R bytes of an encoded row.
"""

from __future__ import annotations

import torch


class RawCodec:
    """Each value as it is in memory, little-endian. Does not look at the values."""

    name = "raw"
    is_lossy = False

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """How many bytes each row takes."""
        return hidden_size * dtype.itemsize

    def encode(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Rows as bytes."""
        return hidden_SD.detach().cpu().contiguous().view(torch.uint8)

    def decode(self, data_SR: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes as rows."""
        return view_as(data_SR, dtype)


def view_as(data_SR: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes seen as numbers; copied only where they do not lie as numbers must."""
    rows, row_bytes = data_SR.shape
    if data_SR.data_ptr() % dtype.itemsize or data_SR.stride() != (row_bytes, 1):
        data_SR = torch.empty((rows, row_bytes), dtype=torch.uint8, device=data_SR.device).copy_(
            data_SR
        )
    return data_SR.view(dtype)

"""What codecs share: rows in pieces that stay in the processor's cache, and the check of numbers.

Shapes: S rows, D hidden size, R bytes of an encoded row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.errors import NotFinite

CHUNK_VALUES = 1 << 18
"""In a piece, 1 MiB of float32: several passes go over it while it stays in the second cache."""

RowsFunction = Callable[[torch.Tensor, torch.Tensor], None]
"""Reads rows from the first tensor and writes them to the second."""


def encode_rows(hidden_SD: torch.Tensor, row_bytes: int, encode: RowsFunction) -> torch.Tensor:
    """Rows as bytes, ``[S, R]`` on the CPU, encoded piece by piece.

    Args:
        hidden_SD: the rows.
        row_bytes: R.
        encode: writes some rows, ``[S, D]``, as bytes, ``[S, R]``.
    """
    rows_SD = hidden_SD.detach()
    data_SR = torch.empty((rows_SD.shape[0], row_bytes), dtype=torch.uint8, device=rows_SD.device)
    _by_pieces(rows_SD, data_SR, rows_SD.shape[1], encode)
    return data_SR.cpu()


def decode_rows(
    data_SR: torch.Tensor, hidden_size: int, dtype: torch.dtype, decode: RowsFunction
) -> torch.Tensor:
    """Bytes as rows, ``[S, D]``, decoded piece by piece.

    Args:
        data_SR: the bytes.
        hidden_size: D.
        dtype: of the rows.
        decode: writes some rows' bytes, ``[S, R]``, as rows, ``[S, D]``.
    """
    rows_SD = torch.empty((data_SR.shape[0], hidden_size), dtype=dtype, device=data_SR.device)
    _by_pieces(data_SR, rows_SD, hidden_size, decode)
    return rows_SD


def store_values(values_SD: torch.Tensor, rows_SD: torch.Tensor) -> None:
    """Writes decoded float32 values into rows of any dtype; may change the values.

    Float16 ends so early that a value near its end may be decoded beyond it: that one becomes the
    last of float16, since nobody encodes what is not finite.
    """
    if rows_SD.dtype == torch.float16:
        end = torch.finfo(torch.float16).max
        values_SD.clamp_(-end, end)
    rows_SD.copy_(values_SD)


def check_finite(largest: torch.Tensor, dtype: torch.dtype, codec: str) -> None:
    """Checks the largest of the absolute values to be encoded.

    Args:
        largest: of any shape, float32; not a number where one among the values is none.
        dtype: of the values, for the error's text.
        codec: likewise.

    Raises:
        NotFinite: it is not finite.
    """
    if largest.numel() and not largest.amax().item() <= torch.finfo(torch.float32).max:
        raise not_finite(dtype, codec)


def not_finite(dtype: torch.dtype, codec: str) -> NotFinite:
    """The error for hidden states that a codec cannot write."""
    return NotFinite(
        f"{dtype} hidden states hold numbers that are not finite, or are too large for the codec "
        f"{codec}"
    )


def _by_pieces(
    read: torch.Tensor, written: torch.Tensor, row_values: int, function: RowsFunction
) -> None:
    count = read.shape[0]
    step = max(1, CHUNK_VALUES // max(1, row_values))
    if 0 < count <= step:
        function(read, written)
        return
    for start in range(0, count, step):
        function(read[start : start + step], written[start : start + step])

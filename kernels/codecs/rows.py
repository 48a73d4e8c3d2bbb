"""What codecs share: rows in pieces that stay in the processor's cache, and the check of numbers.

Shapes: S rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.errors import NotFinite

CHUNK_BYTES = 1 << 20
"""Of a piece's float32 values: what several passes go over while it stays in the second cache."""


def row_chunks(count: int, row_values: int) -> Iterator[slice]:
    """Cuts rows into pieces whose float32 values take about `CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // (4 * max(1, row_values)))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def check_finite(largest: torch.Tensor, dtype: torch.dtype, codec: str) -> None:
    """Checks the largest number that decoding will give.

    Args:
        largest: one number, not negative; not a number where one among them is none.
        dtype: that it must fit.
        codec: for the error's text.

    Raises:
        NotFinite: it does not fit.
    """
    if not largest.item() <= torch.finfo(dtype).max:
        raise not_finite(dtype, codec)


def not_finite(dtype: torch.dtype, codec: str) -> NotFinite:
    """The error for hidden states that a codec cannot write."""
    return NotFinite(
        f"{dtype} hidden states hold numbers that are not finite, or are too large for the codec "
        f"{codec}"
    )

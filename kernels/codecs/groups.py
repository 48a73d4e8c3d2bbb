"""Values in groups that share a scale, the largest absolute value of each.

Section 2.1 of "8-bit Optimizers via Block-wise Quantization" (Dettmers et al., 2021,
arXiv:2110.02861): an outlier spoils the resolution of its own group only. Scales are written in
bfloat16: it has float32's range, so that neither an activation of many thousands nor a gradient of
1e-9 is out of it, and what its coarse steps lose is lost to the size of the code's steps, not to
the values.

Shapes: S rows, D hidden size, G groups of a row, N values of a group, R bytes of an encoded row.
"""

from __future__ import annotations

import torch

SMALLEST_SCALE = 2.0**-119
"""So small that 127 divided by it is still finite in float32."""

SCALE_BYTES = 2


def count_groups(hidden_size: int, group_values: int) -> int:
    """How many groups a row has; the last one may be shorter than the others."""
    return -(-hidden_size // group_values)


def group_rows(rows_SD: torch.Tensor, group_values: int) -> torch.Tensor:
    """Rows as groups, ``[S, G, N]`` float32; the last one is filled up with zeros.

    Shares the rows' memory where it can: not to be written to.
    """
    count, hidden_size = rows_SD.shape
    groups = count_groups(hidden_size, group_values)
    if hidden_size == groups * group_values:
        return rows_SD.to(torch.float32).reshape(count, groups, group_values)
    shape = count, groups * group_values
    padded_SD = torch.empty(shape, dtype=torch.float32, device=rows_SD.device)
    padded_SD[:, :hidden_size] = rows_SD
    padded_SD[:, hidden_size:] = 0
    return padded_SD.view(count, groups, group_values)


def find_scales(grouped_SGN: torch.Tensor) -> torch.Tensor:
    """The largest of each group, ``[S, G]`` bfloat16; one that is next to nothing is made larger.

    What is divided by it may be up to ``1 + 2**-8``, since it may have been rounded down.
    """
    # Two passes that only read are quicker than one that writes absolute values.
    largest_SG = torch.maximum(grouped_SGN.amax(dim=2), grouped_SGN.amin(dim=2).neg_())
    return largest_SG.clamp_min_(SMALLEST_SCALE).to(torch.bfloat16)


def read_numbers(
    data_SR: torch.Tensor, start: int, count: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Numbers that stand in encoded rows, ``[S, count]`` in ``dtype``; always a copy.

    Args:
        data_SR: encoded rows, which may begin at odd addresses.
        start: of the numbers, in bytes.
        count: of them in each row.
        dtype: of them.
    """
    size = count * dtype.itemsize
    bytes_SR = torch.empty((data_SR.shape[0], size), dtype=torch.uint8, device=data_SR.device)
    bytes_SR.copy_(data_SR[:, start : start + size])
    return bytes_SR.view(dtype)

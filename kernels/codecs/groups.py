"""Values in groups that share a scale, the largest absolute value of each.

Section 2.1 of "8-bit Optimizers via Block-wise Quantization" (Dettmers et al., 2021,
arXiv:2110.02861): an outlier spoils the resolution of its own group only. Scales are written in
bfloat16: it has float32's range, so that neither an activation of many thousands nor a gradient of
1e-9 is out of it, and what its coarse steps lose is lost to the size of the code's steps, not to
the values.

Shapes: S rows, D hidden size, G groups of a row, N values of a group.
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
    """Rows as groups, ``[S, G, N]`` float32; the last one is filled up with zeros."""
    count, hidden_size = rows_SD.shape
    groups = count_groups(hidden_size, group_values)
    rows_SD = rows_SD.to(torch.float32)
    padding = groups * group_values - hidden_size
    if padding:
        rows_SD = torch.nn.functional.pad(rows_SD, (0, padding))
    return rows_SD.reshape(count, groups, group_values)


def find_scales(grouped_SGN: torch.Tensor) -> torch.Tensor:
    """The largest of each group, ``[S, G]`` bfloat16; one that is next to nothing is made larger.

    What is divided by it may be up to ``1 + 2**-8``, since it may have been rounded down.
    """
    return grouped_SGN.abs().amax(dim=2).clamp_min_(SMALLEST_SCALE).to(torch.bfloat16)


def read_scales(data_SR: torch.Tensor, groups: int) -> torch.Tensor:
    """The scales at the head of encoded rows, ``[S, G]`` float32."""
    # Copied, since a row may begin at an odd address.
    shape = len(data_SR), SCALE_BYTES * groups
    bytes_SR = torch.empty(shape, dtype=torch.uint8, device=data_SR.device)
    bytes_SR.copy_(data_SR[:, : shape[1]])
    return bytes_SR.view(torch.bfloat16).to(torch.float32)

"""Triton kernels for `kernels.codecs.int8`: cast, largest value, scale and codes in one pass.

PyTorch's own operations read and write a batch six times for that; here it is read once and written
once, in the wire's row layout. The bytes are those of the codec's plain operations, bit for bit
(`tests/kernels/test_triton.py`, in Triton's interpreter): so roundings that a compiler may choose
are done by whole numbers, and multiplications are not fused with additions.

Imported only where Triton is; CUDA builds of PyTorch bring it. Bfloat16 crosses as bit patterns.

Shapes: S rows, D hidden size, R bytes of an encoded row, G groups of a row, N values of a group,
P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of hidden states that are taken."""

GROUPS_AT_ONCE = 16
"""Of a row, for one program: with 64 values each, eight for each thread of four warps."""

INFINITE = 0x7F800000
"""The bit pattern of float32's infinity; of what is not a number, more."""


def encode_int8(
    hidden_SD: torch.Tensor, data_SR: torch.Tensor, group_values: int, smallest_scale: float
) -> bool:
    """Writes rows as scales and codes.

    Args:
        hidden_SD: of one of `DTYPES`, of any strides.
        data_SR: uint8, contiguous, on the same device.
        group_values: N, a power of two.
        smallest_scale: of a group.

    Returns:
        Whether all values are finite; if not, the bytes mean nothing.
    """
    count, hidden_size = hidden_SD.shape
    groups = triton.cdiv(hidden_size, group_values)
    grid = count, triton.cdiv(groups, GROUPS_AT_ONCE)
    largest_P = torch.zeros(grid, dtype=torch.int32, device=hidden_SD.device)
    if not count:
        return True
    is_bfloat16 = hidden_SD.dtype == torch.bfloat16
    rows_SD = hidden_SD.view(torch.int16) if is_bfloat16 else hidden_SD
    # Triton starts kernels on the current device, whichever the tensors are on.
    with torch.cuda.device_of(rows_SD):  # type: ignore[no-untyped-call]
        _encode[grid](
            rows_SD,
            data_SR,
            largest_P,
            rows_SD.stride(0),
            rows_SD.stride(1),
            hidden_size,
            groups,
            smallest_scale,
            is_bfloat16,
            group_values,
            GROUPS_AT_ONCE,
            enable_fp_fusion=False,
        )
    return bool(largest_P.amax().item() < INFINITE)


def decode_int8(data_SR: torch.Tensor, rows_SD: torch.Tensor, group_values: int) -> None:
    """Writes scales and codes as rows.

    Args:
        data_SR: uint8, of any strides.
        rows_SD: contiguous, of one of `DTYPES`, on the same device.
        group_values: N, a power of two.
    """
    count, hidden_size = rows_SD.shape
    groups = triton.cdiv(hidden_size, group_values)
    if not count:
        return
    is_bfloat16 = rows_SD.dtype == torch.bfloat16
    with torch.cuda.device_of(rows_SD):  # type: ignore[no-untyped-call]
        _decode[(count, triton.cdiv(groups, GROUPS_AT_ONCE))](
            data_SR,
            rows_SD.view(torch.int16) if is_bfloat16 else rows_SD,
            data_SR.stride(0),
            data_SR.stride(1),
            hidden_size,
            groups,
            is_bfloat16,
            rows_SD.dtype == torch.float16,
            group_values,
            GROUPS_AT_ONCE,
            enable_fp_fusion=False,
        )


@triton.jit
def _encode(
    rows_SD,
    data_SR,
    largest_P,
    row_stride,
    value_stride,
    hidden_size,
    groups,
    smallest_scale,
    IS_BFLOAT16: tl.constexpr,
    GROUP_VALUES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    group_G = part * GROUPS + tl.arange(0, GROUPS)
    at_GN = group_G[:, None] * GROUP_VALUES + tl.arange(0, GROUP_VALUES)[None, :]
    inside_GN = at_GN < hidden_size
    loaded_GN = tl.load(
        rows_SD + row * row_stride + at_GN.to(tl.int64) * value_stride, mask=inside_GN, other=0
    )
    if IS_BFLOAT16:
        value_GN = (loaded_GN.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value_GN = loaded_GN.to(tl.float32)
    # Patterns of absolute values are in the order of the values, with what is no number at the end.
    pattern_G = tl.max(value_GN.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    tl.store(largest_P + row * tl.num_programs(1) + part, tl.max(pattern_G, axis=0))
    largest_G = pattern_G.to(tl.float32, bitcast=True)
    largest_G = tl.where(largest_G < smallest_scale, smallest_scale, largest_G)
    pattern_G = largest_G.to(tl.int32, bitcast=True)
    half_G = (pattern_G + 0x7FFF + ((pattern_G >> 16) & 1)) >> 16  # to bfloat16, ties to even
    scale_G = (half_G << 16).to(tl.float32, bitcast=True)
    part_GN = value_GN * (tl.div_rn(1.0, scale_G) * 127.0)[:, None]
    # Above 2**23 float32 has no fractions: the addition rounds to whole numbers, ties to even.
    code_GN = ((part_GN + 12582912.0) - 12582912.0).to(tl.int32)
    to_row = data_SR + row * (2 * groups + hidden_size)
    tl.store(to_row + 2 * groups + at_GN, (code_GN & 255).to(tl.uint8), mask=inside_GN)
    tl.store(to_row + 2 * group_G, (half_G & 255).to(tl.uint8), mask=group_G < groups)
    tl.store(to_row + 2 * group_G + 1, (half_G >> 8).to(tl.uint8), mask=group_G < groups)


@triton.jit
def _decode(
    data_SR,
    rows_SD,
    row_stride,
    byte_stride,
    hidden_size,
    groups,
    IS_BFLOAT16: tl.constexpr,
    IS_FLOAT16: tl.constexpr,
    GROUP_VALUES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group_G = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at_GN = group_G[:, None] * GROUP_VALUES + tl.arange(0, GROUP_VALUES)[None, :]
    inside_GN = at_GN < hidden_size
    is_group_G = group_G < groups
    from_row = data_SR + row * row_stride
    low_G = tl.load(from_row + 2 * group_G * byte_stride, mask=is_group_G, other=0)
    high_G = tl.load(from_row + (2 * group_G + 1) * byte_stride, mask=is_group_G, other=0)
    half_G = low_G.to(tl.int32) | (high_G.to(tl.int32) << 8)
    step_G = (half_G << 16).to(tl.float32, bitcast=True) * (1.0 / 127.0)
    byte_GN = tl.load(from_row + (2 * groups + at_GN) * byte_stride, mask=inside_GN, other=0)
    code_GN = (byte_GN.to(tl.int32) << 24) >> 24
    value_GN = code_GN.to(tl.float32) * step_G[:, None]
    to_row = rows_SD + row * hidden_size
    if IS_BFLOAT16:
        pattern_GN = value_GN.to(tl.int32, bitcast=True)
        rounded_GN = (pattern_GN + 0x7FFF + ((pattern_GN >> 16) & 1)) >> 16
        rounded_GN = tl.where(value_GN != value_GN, 0x7FC0, rounded_GN)
        tl.store(to_row + at_GN, rounded_GN.to(tl.int16), mask=inside_GN)
    elif IS_FLOAT16:
        value_GN = tl.where(value_GN > 65504.0, 65504.0, value_GN)
        value_GN = tl.where(value_GN < -65504.0, -65504.0, value_GN)
        tl.store(to_row + at_GN, value_GN.to(tl.float16), mask=inside_GN)
    else:
        tl.store(to_row + at_GN, value_GN, mask=inside_GN)

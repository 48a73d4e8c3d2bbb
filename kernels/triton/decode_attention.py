"""Triton kernels for attention of a decode step: all its sequences' in two launches.

A step has one new token of each sequence. Torch's own attention takes the sequences one after the
other, since each has its extent of the arena and its length; here a grid covers them all, and reads
where each lies from a tensor, so that the same launches, recorded once, serve every step.

How: the cached tokens of each sequence are split in equal parts, so that one long sequence occupies
a GPU too. A program goes through one part for the queries that share a key head, and keeps their
largest score, the sum of the weights relative to that, and the weighted sum of the values
(`_attend`); a second kernel puts the parts together (`_join`). The part that begins the sequence
adds the new token, straight from the step, and writes it into the arena: nobody reads it from there
in the same launch. Programs without tokens end at once, so the grid depends on no length. Nothing
outside a sequence is read, and what is masked becomes zero before any product: elsewhere the arena
may hold what is not a number.

The plain way is `kernels.block.DecoderBlock.attend`. Imported only where Triton is.

Shapes: S rows, one for each sequence, N query heads, K key and value heads, G = N/K, T tokens of
the arena or of a tile, H head size, P parts.

Source: Dao et al., Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of queries, keys and values that are taken."""

MAX_PARTS = 64
"""Of a sequence: the second kernel holds one number of each head for all of them."""

MIN_PARTS = 4
"""Of a sequence, however many there are: the longest may be much longer than the others."""

PROGRAMS = 2048
"""To aim at: several for each of a large GPU's 132 multiprocessors, where only some have tokens."""

_TILE_BYTES = 16384
"""Of keys, and of values, that a program loads at once; two stages of both fit everywhere."""

_MAX_TILE_TOKENS = 64

_LEAST = 16
"""The least of each side of a matrix product."""

_MAX_QUERY_VALUES = 16384
"""Of the queries that share a key head, padded: they and their sums are kept in registers."""


def can_attend(dtype: torch.dtype, heads: int, kv_heads: int, head_size: int) -> bool:
    """Whether there is a kernel for such heads."""
    shared = _pad(heads // kv_heads)
    return dtype in DTYPES and head_size <= 256 and shared * _pad(head_size) <= _MAX_QUERY_VALUES


def attend(
    projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache_KTH: tuple[torch.Tensor, torch.Tensor],
    places_2S: torch.Tensor,
    scale: float | None,
    window: int,
) -> torch.Tensor:
    """The attention of each sequence's new token to it and all before it, ``[S, N*H]``.

    Args:
        projected: its queries, ``[S, N, H]``, keys and values, ``[S, K, H]``, of any strides.
        cache_KTH: the arena's keys and values; the new ones are written behind each length.
        places_2S: int64: where each sequence begins in the arena, and its length before the step.
        scale: what scores are multiplied with; none: one over the root of the head size.
        window: how many tokens each attends to, itself included; 0 for all.
    """
    query_SNH, key_SKH, value_SKH = (
        part if part.stride(-1) == 1 else part.contiguous() for part in projected
    )
    keys_KTH, values_KTH = cache_KTH
    rows, heads, head_size = query_SNH.shape
    kv_heads = key_SKH.shape[1]
    shared = heads // kv_heads
    width = _pad(head_size)
    parts = count_parts(rows, kv_heads)
    new = query_SNH.new_empty
    sums_H = new((rows, kv_heads, parts, shared, head_size), dtype=torch.float32)
    peaks_2 = new((rows, kv_heads, parts, shared, 2), dtype=torch.float32)
    output_SA = new((rows, heads * head_size))
    tokens = min(_MAX_TILE_TOKENS, max(_LEAST, _TILE_BYTES // (width * keys_KTH.itemsize)))
    scale = head_size**-0.5 if scale is None else scale
    # Triton starts kernels on the current device, whichever the tensors are on.
    with torch.cuda.device_of(query_SNH):  # type: ignore[no-untyped-call]
        _attend[(rows, kv_heads, parts)](
            query_SNH,
            key_SKH,
            value_SKH,
            keys_KTH,
            values_KTH,
            places_2S,
            sums_H,
            peaks_2,
            *query_SNH.stride()[:2],
            *key_SKH.stride()[:2],
            *value_SKH.stride()[:2],
            keys_KTH.stride(0),
            scale * math.log2(math.e),
            window,
            shared,
            _pad(shared),
            head_size,
            width,
            tokens,
            num_warps=4 if _pad(shared) * width <= 4096 else 8,
            num_stages=2,
            enable_fp_fusion=True,
        )
        _join[(rows, heads)](
            sums_H,
            peaks_2,
            places_2S,
            output_SA,
            parts,
            window,
            shared,
            head_size,
            width,
            tokens,
            MAX_PARTS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output_SA


def count_parts(rows: int, kv_heads: int) -> int:
    """Into how many parts each of so many sequences is split; a power of two."""
    wanted = max(MIN_PARTS, min(MAX_PARTS, PROGRAMS // (rows * kv_heads)))
    return 1 << (wanted.bit_length() - 1)


def _pad(size: int) -> int:
    return int(max(_LEAST, triton.next_power_of_2(size)))


@triton.jit
def _divide(length, window, parts, TOKENS: tl.constexpr):
    """The first cached token that is attended to, and how many there are in each part."""
    first = tl.where((window > 0) & (length >= window), length - window + 1, 0)
    tiles = tl.cdiv(tl.cdiv(length - first, parts), TOKENS)
    return first, tl.maximum(tiles, 1) * TOKENS


@triton.jit(do_not_specialize=["window"])
def _attend(
    query_SNH,
    key_SKH,
    value_SKH,
    keys_KTH,
    values_KTH,
    places_2S,
    sums_H,
    peaks_2,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    head_stride,
    scale,
    window,
    SHARED: tl.constexpr,
    PADDED_SHARED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    heads = tl.num_programs(1)
    parts = tl.num_programs(2)
    offset = tl.load(places_2S + row)
    length = tl.load(places_2S + tl.num_programs(0) + row).to(tl.int32)
    first, size = _divide(length, window, parts, TOKENS)
    begin = first + part * size
    if (part > 0) & (begin >= length):
        return
    end = tl.minimum(begin + size, length)
    at_G = tl.arange(0, PADDED_SHARED)
    at_H = tl.arange(0, WIDTH)
    is_G = at_G < SHARED
    is_H = at_H < HEAD_SIZE
    is_GH = is_G[:, None] & is_H[None, :]
    queries = query_SNH + row * query_row + head * SHARED * query_head
    query_GH = tl.load(queries + at_G[:, None] * query_head + at_H[None, :], mask=is_GH, other=0.0)
    from_key, from_value = row * key_row + head * key_head, row * value_row + head * value_head
    new_key_H = tl.load(key_SKH + from_key + at_H, mask=is_H, other=0.0)
    new_value_H = tl.load(value_SKH + from_value + at_H, mask=is_H, other=0.0)
    to_head = head * head_stride + offset * HEAD_SIZE
    keys_TH = keys_KTH + to_head
    values_TH = values_KTH + to_head
    # The new token is of the first part alone.
    is_new = part == 0
    is_new_H = at_H < tl.where(is_new, HEAD_SIZE, 0)
    at_new_H = length.to(tl.int64) * HEAD_SIZE + at_H
    tl.store(keys_TH + at_new_H, new_key_H, mask=is_new_H)
    tl.store(values_TH + at_new_H, new_value_H, mask=is_new_H)
    score_G = tl.sum(query_GH.to(tl.float32) * new_key_H.to(tl.float32)[None, :], axis=1) * scale
    peak_G = tl.where(is_new, score_G, float("-inf"))
    total_G = tl.where(is_new, tl.full([PADDED_SHARED], 1.0, tl.float32), 0.0)
    sum_GH = tl.where(is_new, new_value_H.to(tl.float32)[None, :], 0.0) + tl.zeros(
        [PADDED_SHARED, WIDTH], tl.float32
    )
    for tile in range(begin, end, TOKENS):
        at_T = tile + tl.arange(0, TOKENS)
        is_T = at_T < end
        at_TH = at_T.to(tl.int64)[:, None] * HEAD_SIZE + at_H[None, :]
        is_TH = is_T[:, None] & is_H[None, :]
        key_TH = tl.load(keys_TH + at_TH, mask=is_TH, other=0.0)
        score_GT = tl.dot(query_GH, tl.trans(key_TH), input_precision="ieee") * scale
        score_GT = tl.where(is_T[None, :], score_GT, float("-inf"))
        # Each tile has a token, so no peak stays infinite.
        new_peak_G = tl.maximum(peak_G, tl.max(score_GT, axis=1))
        shrunk_G = tl.exp2(peak_G - new_peak_G)
        weight_GT = tl.exp2(score_GT - new_peak_G[:, None])
        total_G = total_G * shrunk_G + tl.sum(weight_GT, axis=1)
        value_TH = tl.load(values_TH + at_TH, mask=is_TH, other=0.0)
        sum_GH = sum_GH * shrunk_G[:, None]
        sum_GH += tl.dot(weight_GT.to(value_TH.dtype), value_TH, input_precision="ieee")
        peak_G = new_peak_G
    at = ((row * heads + head) * parts + part) * SHARED
    to_GH = at_G[:, None] * HEAD_SIZE + at_H[None, :]
    tl.store(sums_H + at * HEAD_SIZE + to_GH, sum_GH, mask=is_GH)
    tl.store(peaks_2 + 2 * (at + at_G), peak_G, mask=is_G)
    tl.store(peaks_2 + 2 * (at + at_G) + 1, total_G, mask=is_G)


@triton.jit(do_not_specialize=["parts", "window"])
def _join(
    sums_H,
    peaks_2,
    places_2S,
    output_SA,
    parts,
    window,
    SHARED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    query_head = tl.program_id(1)
    heads = tl.num_programs(1)
    length = tl.load(places_2S + tl.num_programs(0) + row).to(tl.int32)
    first, size = _divide(length, window, parts, TOKENS)
    taken = tl.maximum(tl.cdiv(length - first, size), 1)
    at_P = tl.arange(0, MAX_PARTS)
    at_H = tl.arange(0, WIDTH)
    is_P = at_P < taken
    is_H = at_H < HEAD_SIZE
    key_head = row * (heads // SHARED) + query_head // SHARED
    from_P = (key_head * parts + at_P) * SHARED + query_head % SHARED
    peak_P = tl.load(peaks_2 + 2 * from_P, mask=is_P, other=float("-inf"))
    total_P = tl.load(peaks_2 + 2 * from_P + 1, mask=is_P, other=0.0)
    share_P = tl.exp2(peak_P - tl.max(peak_P, axis=0))
    sum_PH = tl.load(
        sums_H + from_P[:, None] * HEAD_SIZE + at_H[None, :],
        mask=is_P[:, None] & is_H[None, :],
        other=0.0,
    )
    output_H = tl.sum(sum_PH * share_P[:, None], axis=0) / tl.sum(total_P * share_P, axis=0)
    to_head = output_SA + (row * heads + query_head) * HEAD_SIZE
    tl.store(to_head + at_H, output_H.to(output_SA.dtype.element_ty), mask=is_H)

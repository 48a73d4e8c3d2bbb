"""Decode steps of attention: made up, and attended to one sequence after the other.

Shapes: S rows, N query heads, K key and value heads, T tokens of the arena, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.attention import Attention, WindowAttention

Cache = tuple[torch.Tensor, torch.Tensor]
Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """One step; what lies outside of the sequences in its cache is not a number."""

    projected: Projected
    cache_KTH: Cache
    places_2S: torch.Tensor
    scale: float | None
    window: int


def make_case(
    lengths: Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int = 0,
    scale: float | None = None,
    gap: int = 3,
    seed: int = 0,
) -> DecodeCase:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    offsets, end = [], gap
    for length in lengths:
        offsets.append(end)
        end += length + 1 + gap
    caches = []
    for _ in range(2):
        cache_KTH = torch.full((kv_heads, end, head_size), torch.nan, dtype=dtype, device=device)
        for offset, length in zip(offsets, lengths, strict=True):
            cache_KTH[:, offset : offset + length] = draw(kv_heads, length, head_size)
        caches.append(cache_KTH)
    # As the projection gives them: slices of one tensor, but for queries turned apart.
    together = draw(len(lengths), heads + 2 * kv_heads, head_size)
    queries, keys, values = torch.split(together, [heads, kv_heads, kv_heads], dim=1)
    return DecodeCase(
        projected=(2 * queries, keys, values),
        cache_KTH=(caches[0], caches[1]),
        places_2S=torch.tensor([offsets, list(lengths)], device=device),
        scale=scale,
        window=window,
    )


def attend_in_turn(
    projected: Projected,
    cache_KTH: Cache,
    places_2S: torch.Tensor,
    scale: float | None,
    window: int,
) -> torch.Tensor:
    """The plain way, in the form of a `kernels.decode_kernel.DecodeKernel`."""
    attention = WindowAttention(window, scale) if window else Attention(scale)
    query_SNH, *made = projected
    outputs = []
    for row, (offset, length) in enumerate(places_2S.t().tolist()):
        for part_KTH, made_SKH in zip(cache_KTH, made, strict=True):
            part_KTH[:, offset + length] = made_SKH[row]
        seen = slice(offset, offset + length + 1)
        keys_KTH, values_KTH = (part_KTH[:, seen] for part_KTH in cache_KTH)
        outputs.append(attention.one(query_SNH[row : row + 1], keys_KTH, values_KTH))
    return torch.cat(outputs)


def errors_of(kernel: object, case: DecodeCase) -> float:
    """The largest error of any row, as a part of the row's length, against float64.

    Raises:
        AssertionError: what the kernel left in the cache is not what the plain way leaves there.
    """
    assert callable(kernel)
    settings = case.places_2S, case.scale, case.window
    wide = [part.double() for part in (*case.projected, *case.cache_KTH)]
    exact_SA = attend_in_turn(
        (wide[0], wide[1], wide[2]), (wide[3], wide[4]), case.places_2S, case.scale, case.window
    )
    kept = case.cache_KTH[0].clone(), case.cache_KTH[1].clone()
    output_SA = kernel(case.projected, kept, *settings)
    for kept_KTH, wide_KTH in zip(kept, wide[3:], strict=True):
        assert torch.equal(kept_KTH.double().nan_to_num(7e7), wide_KTH.nan_to_num(7e7))
    assert output_SA.dtype == case.projected[0].dtype
    error_S = (output_SA.double() - exact_SA).norm(dim=1) / exact_SA.norm(dim=1)
    assert not error_S.isnan().any()
    return float(error_S.max())

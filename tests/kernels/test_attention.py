"""Attention with windows, biases and caps, against plain tables of all scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kernels.attention
import kernels.scored_attention
from kernels.attention import Attention, WindowAttention
from kernels.scored_attention import ScoredAttention, Scoring, alibi_slopes

HEADS, GROUPS, SIZE = 6, 2, 4
SCALE = 0.3


def made(cap: float | None, slopes: torch.Tensor | None, window: int) -> Attention:
    if cap is None and slopes is None:
        return WindowAttention(window, SCALE) if window else Attention(SCALE)
    return ScoredAttention(Scoring(scale=SCALE, cap=cap, slopes_N=slopes, window=window))


def plain(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    cap: float | None,
    slopes: torch.Tensor | None,
    window: int,
) -> torch.Tensor:
    """The same of ``[B, S, N, H]`` and ``[B, T, K, H]``, with a table of all scores."""
    tokens, total = query.shape[1], keys.shape[1]
    keys, values = (part.repeat_interleave(HEADS // GROUPS, dim=2) for part in (keys, values))
    scores = torch.einsum("bsnh,btnh->bnst", query, keys) * SCALE
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    real = torch.ones(len(query), total) if mask is None else mask.float()
    if slopes is not None:
        scores = scores + slopes.view(1, HEADS, 1, 1) * real.cumsum(-1)[:, None, None]
    seen = torch.ones(tokens, total, dtype=torch.bool).tril(total - tokens)
    if window:
        seen &= ~torch.ones(tokens, total, dtype=torch.bool).tril(total - tokens - window)
    allowed = seen & real.bool()[:, None, None]
    shares = scores.masked_fill(~allowed, -1e9).softmax(-1).masked_fill(~allowed, 0)
    return torch.einsum("bnst,btnh->bsnh", shares, values).flatten(2).flatten(0, 1)


CASES = [
    (cap, has_slopes, window)
    for cap in (None, 0.8)
    for has_slopes in (False, True)
    for window in (0, 1, 5, 100)
]


@pytest.mark.parametrize(("cap", "has_slopes", "window"), CASES)
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_attention_equals_tables_of_all_scores(
    monkeypatch: pytest.MonkeyPatch, cap: float | None, has_slopes: bool, window: int, chunk: int
) -> None:
    monkeypatch.setattr(kernels.attention, "_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(kernels.scored_attention, "_CPU_SCORES", chunk * 2 * HEADS * 23)
    slopes = alibi_slopes(HEADS).double() if has_slopes else None
    attention = made(cap, slopes, window)
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    query, keys, values = some(2, 17, HEADS, SIZE), some(2, 23, GROUPS, SIZE), some(2, 23, 2, SIZE)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, 20:] = False
    mask[1, :9] = False
    mask[1, 14] = False
    of_output = some(2 * 17, HEADS * SIZE).detach()
    for given in (None, mask):
        ours = attention.batch(query, keys, values, given)
        expected = plain(query, keys, values, given, cap, slopes, window)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, (query, keys, values), of_output),
            torch.autograd.grad(expected, (query, keys, values), of_output),
        )
    with torch.no_grad():
        expected = plain(query, keys, values, None, cap, slopes, window).view(2, 17, -1)
        cached = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        torch.testing.assert_close(attention.many(query[0], *cached), expected[0])
        torch.testing.assert_close(attention.one(query[0, -1:], *cached), expected[0, -1:])


@pytest.mark.parametrize("attention", [made(None, None, 8), made(1.0, None, 8)], ids=str)
def test_a_decode_step_reads_its_window_only(attention: Attention) -> None:
    keys = torch.full((GROUPS, 1000, SIZE), torch.nan)
    keys[:, -8:] = 1
    assert torch.isfinite(attention.one(torch.ones(1, HEADS, SIZE), keys, keys)).all()


@pytest.mark.parametrize("attention", [made(1.0, None, 0), made(None, torch.ones(HEADS), 0)])
def test_no_table_of_all_scores_is_kept(attention: Attention) -> None:
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    tokens = 2000
    parts: Any = [torch.randn(1, tokens, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention.batch(parts[0].requires_grad_(), *parts[1:])
    assert max(kept) < tokens * tokens

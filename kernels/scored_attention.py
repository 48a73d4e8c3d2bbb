"""Attention whose scores are changed before the softmax: by ALiBi's biases, or a soft cap.

torch's own attention cannot do that without a table of all scores, so they are made here: for some
rows at a time, in float32, and for a backward pass again instead of being kept. The plain way with
whole tables is Hugging Face's, which the tests compare with.

ALiBi adds to each score the key's position times a slope of the head; only differences between
positions matter, so it needs no position of the query. Padding is not counted as a position.

Shapes: S new tokens, T tokens of the sequence with the new ones, N query heads, K key and value
heads, G = N/K, H head size, B batch.

Source: of ALiBi, Press et al. 2021, arXiv:2108.12409; of the cap, Gemma 2, arXiv:2408.00118.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from kernels.attention import Attention, visible

_CPU_SCORES, _GPU_SCORES = 1 << 20, 1 << 25
"""Scores that are made at once: on a CPU few enough for its caches, on a GPU enough to fill it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """What becomes of a score.

    Attributes:
        scale: what it is multiplied with, first of all.
        cap: what its size stays below, softly; or none.
        slopes_N: of ALiBi, on the device; or none.
        is_rounded: whether slopes, positions and their products are rounded to bfloat16, and then
            multiplied with the scale, as Falcon was trained.
        window: how many tokens each attends to, itself included; 0 for all before it.
    """

    scale: float
    cap: float | None = None
    slopes_N: torch.Tensor | None = None
    is_rounded: bool = False
    window: int = 0


class ScoredAttention(Attention):
    """Causal attention with changed scores.

    Args:
        scoring: how.
    """

    def __init__(self, scoring: Scoring) -> None:
        super().__init__(scoring.scale)
        self._scoring = scoring

    def one(
        self, query_1NH: torch.Tensor, keys_KTH: torch.Tensor, values_KTH: torch.Tensor
    ) -> torch.Tensor:
        """The last token's attention, ``[1, N*H]``."""
        window = self._scoring.window
        if window and keys_KTH.shape[1] > window:
            keys_KTH, values_KTH = keys_KTH[:, -window:], values_KTH[:, -window:]
        return self._attend_rows(query_1NH[None], keys_KTH[None], values_KTH[None], None, None)[0]

    def many(
        self, query_SNH: torch.Tensor, keys_KTH: torch.Tensor, values_KTH: torch.Tensor
    ) -> torch.Tensor:
        """Attention of the last S of T tokens, ``[S, N*H]``."""
        return self._attend_chunks(query_SNH[None], keys_KTH[None], values_KTH[None], None)[0]

    def batch(
        self,
        query_BSNH: torch.Tensor,
        keys_BTKH: torch.Tensor,
        values_BTKH: torch.Tensor,
        mask_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Attention.batch`."""
        output = self._attend_chunks(
            query_BSNH, keys_BTKH.transpose(1, 2), values_BTKH.transpose(1, 2), mask_BT
        )
        return output.flatten(0, 1)

    def _attend_chunks(
        self,
        query_BSNH: torch.Tensor,
        keys_BKTH: torch.Tensor,
        values_BKTH: torch.Tensor,
        mask_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of each sequence's last S of T tokens, ``[B, S, N*H]``."""
        batch, tokens, heads = query_BSNH.shape[:3]
        total, window = keys_BKTH.shape[2], self._scoring.window
        most = _CPU_SCORES if query_BSNH.device.type == "cpu" else _GPU_SCORES
        rows = max(1, most // (batch * heads * total))
        is_traced = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (query_BSNH, keys_BKTH, values_BKTH)
        )
        outputs = []
        for begin in range(0, tokens, rows):
            query = query_BSNH[:, begin : begin + rows]
            size = query.shape[1]
            end = total - tokens + begin + size
            first = max(0, end - size - window + 1) if window else 0
            seen_ST = visible(size, end - first, window, query.device)
            parts = (
                query,
                keys_BKTH[:, :, first:end],
                values_BKTH[:, :, first:end],
                seen_ST,
                None if mask_BT is None else mask_BT[:, first:end],
            )
            if is_traced:
                outputs.append(
                    checkpoint(
                        self._attend_rows, *parts, use_reentrant=False, preserve_rng_state=False
                    )
                )
            else:
                outputs.append(self._attend_rows(*parts))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _attend_rows(
        self,
        query_BSNH: torch.Tensor,
        keys_BKTH: torch.Tensor,
        values_BKTH: torch.Tensor,
        seen_ST: torch.Tensor | None,
        mask_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of some tokens, ``[B, S, N*H]``.

        Args:
            query_BSNH: of these tokens.
            keys_BKTH: of those that any of them attends to.
            values_BKTH: likewise.
            seen_ST: which each attends to; none: all.
            mask_BT: true for real tokens; none: all.
        """
        batch, tokens, heads, head_size = query_BSNH.shape
        groups, total = keys_BKTH.shape[1:3]
        shared = heads // groups
        query_BKRH = query_BSNH.view(batch, tokens, groups, shared, head_size)
        query_BKRH = query_BKRH.permute(0, 2, 3, 1, 4).reshape(batch, groups, -1, head_size)
        if tokens == 1:  # a CPU reads keys several times faster along their rows
            scores = torch.matmul(keys_BKTH, query_BKRH.transpose(2, 3)).transpose(2, 3)
        else:
            scores = torch.matmul(query_BKRH, keys_BKTH.transpose(2, 3))
        wide = torch.promote_types(scores.dtype, torch.float32)
        scores = self._change(scores.to(wide).reshape(batch, heads, tokens, total), mask_BT)
        allowed = seen_ST if mask_BT is None else mask_BT[:, None, None]
        if mask_BT is not None and seen_ST is not None:
            allowed = seen_ST & mask_BT[:, None, None]
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(wide).min)
        shares = scores.softmax(dim=-1)
        if mask_BT is not None and allowed is not None:  # some may attend to none
            shares = shares.masked_fill(~allowed, 0)
        shares = shares.to(values_BKTH.dtype).view(batch, groups, shared * tokens, total)
        output = torch.matmul(shares, values_BKTH).view(batch, heads, tokens, head_size)
        return output.transpose(1, 2).reshape(batch, tokens, heads * head_size)

    def _change(self, scores_BNST: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        scores_BNST = scores_BNST * self._scoring.scale
        if self._scoring.cap is not None:
            scores_BNST = cap_softly(scores_BNST, self._scoring.cap)
        if self._scoring.slopes_N is None:
            return scores_BNST
        return scores_BNST + self._biases(self._scoring.slopes_N, scores_BNST.shape[-1], mask_BT)

    def _biases(
        self, slopes_N: torch.Tensor, total: int, mask_BT: torch.Tensor | None
    ) -> torch.Tensor:
        """ALiBi's, ``[N, 1, T]``, or with a mask ``[B, N, 1, T]``."""
        position = torch.arange(total, device=slopes_N.device)
        if mask_BT is not None:
            position = (mask_BT.cumsum(dim=-1) - 1)[:, None, None]
        slopes_N11 = slopes_N[:, None, None]
        if self._scoring.is_rounded:
            return (slopes_N11.bfloat16() * position.bfloat16()).float() * self._scoring.scale
        return slopes_N11 * (position + 1 - total)  # the smaller, the more exact


def cap_softly(scores: torch.Tensor, cap: float) -> torch.Tensor:
    """Scores whose size stays below a cap: nearly as they were where they are small."""
    return (scores / cap).tanh() * cap


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """ALiBi's slopes, ``[N]``, float32.

    They are a geometric row; where N is no power of two, the heads beyond take every other one of
    the row for twice as many.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-4 * (2 * head + 1) / power) for head in range(num_heads - power)]
    return torch.tensor(slopes)

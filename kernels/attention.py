"""Attention of new tokens to what is cached and to themselves.

Grouped-query attention is computed without repeating keys or values: for one new token, the
queries that share a key head are laid out as if they were tokens of it.

`Attention` is torch's own, of all tokens; for decode steps of several sequences it may have a
kernel that takes them all at once, and writes their keys and values too. `WindowAttention` is that
of each token's last so many tokens: it leaves what is out of sight out of the product, and masks
only where several tokens see different ones (the cache keeps all of them for now). Both are
constants of a block, chosen when it is made, so that nothing is decided at a step.

Shapes: S new tokens, T tokens of the sequence with the new ones, N query heads, K key and value
heads, G = N/K, H head size, B batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.decode_kernel import DecodeKernel

_CHUNK_TOKENS = 256
"""Rows of a long prompt that look through one window each at once: what they look at together is
then not much longer than a window, and the mask stays small."""


class Attention:
    """Causal attention to all tokens.

    Args:
        scale: what scores are multiplied with; none: one over the root of the head size.
        kernel: for decode steps; or none.
    """

    def __init__(self, scale: float | None = None, kernel: DecodeKernel | None = None) -> None:
        self._scale = scale
        self._kernel = kernel
        self._window = 0

    @property
    def has_kernel(self) -> bool:
        """Whether it has one for decode steps."""
        return self._kernel is not None

    def decode(
        self,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        cache_KTH: tuple[torch.Tensor, torch.Tensor],
        places_2S: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of one new token of each sequence, ``[S, N*H]``; it must have a kernel.

        Args:
            projected: the tokens' queries, keys and values, ``[S, N or K, H]``.
            cache_KTH: the arena's keys and values; the new ones are written there.
            places_2S: where each sequence begins there, and its length without the new token.
        """
        assert self._kernel is not None
        return self._kernel(projected, cache_KTH, places_2S, self._scale, self._window)

    def one(
        self, query_1NH: torch.Tensor, keys_KTH: torch.Tensor, values_KTH: torch.Tensor
    ) -> torch.Tensor:
        """The last token's attention to all, ``[1, N*H]``."""
        heads, head_size = query_1NH.shape[1:]
        groups = keys_KTH.shape[0]
        output_1KGH = F.scaled_dot_product_attention(
            query_1NH.view(1, groups, heads // groups, head_size),
            keys_KTH.unsqueeze(0),
            values_KTH.unsqueeze(0),
            scale=self._scale,
        )
        return output_1KGH.reshape(1, heads * head_size)

    def many(
        self, query_SNH: torch.Tensor, keys_KTH: torch.Tensor, values_KTH: torch.Tensor
    ) -> torch.Tensor:
        """Causal attention of the last S of T tokens, ``[S, N*H]``."""
        tokens, total = query_SNH.shape[0], keys_KTH.shape[1]
        mask_ST = None
        if tokens != total:
            mask_ST = torch.ones(tokens, total, dtype=torch.bool, device=query_SNH.device).tril(
                total - tokens
            )
        return self._attend(query_SNH, keys_KTH, values_KTH, mask_ST)

    def batch(
        self,
        query_BSNH: torch.Tensor,
        keys_BTKH: torch.Tensor,
        values_BTKH: torch.Tensor,
        mask_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of each sequence's last S of T tokens, without a cache, ``[B*S, N*H]``.

        Differentiable.

        Args:
            query_BSNH: of the last S tokens.
            keys_BTKH: of all tokens.
            values_BTKH: likewise.
            mask_BT: true for the tokens that may be attended to; none: all. A token that may attend
                to none, such as padding on the left, gets zeros, as Hugging Face has it.
        """
        batch, tokens, heads, head_size = query_BSNH.shape
        shared = heads // keys_BTKH.shape[2]
        mask = self._mask(tokens, keys_BTKH.shape[1], mask_BT, query_BSNH.device)
        output_BNSH = F.scaled_dot_product_attention(
            query_BSNH.transpose(1, 2),
            keys_BTKH.transpose(1, 2).repeat_interleave(shared, dim=1),
            values_BTKH.transpose(1, 2).repeat_interleave(shared, dim=1),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
        )
        return output_BNSH.transpose(1, 2).reshape(batch * tokens, heads * head_size)

    def _mask(
        self, tokens: int, total: int, mask_BT: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor | None:
        """Which tokens may be attended to; none where those before, and no others, may."""
        if mask_BT is None and total == tokens:
            return None
        seen = visible(tokens, total, 0, device)
        return seen if mask_BT is None else (seen & mask_BT[:, None, :])[:, None]

    def _attend(
        self,
        query_SNH: torch.Tensor,
        keys_KTH: torch.Tensor,
        values_KTH: torch.Tensor,
        mask_ST: torch.Tensor | None,
    ) -> torch.Tensor:
        tokens, heads, head_size = query_SNH.shape
        groups, total = keys_KTH.shape[:2]
        shared = heads // groups
        query_KGSH = query_SNH.view(tokens, groups, shared, head_size).permute(1, 2, 0, 3)
        expanded = (groups, shared, total, head_size)
        output_KGSH = F.scaled_dot_product_attention(
            query_KGSH,
            keys_KTH.unsqueeze(1).expand(expanded),
            values_KTH.unsqueeze(1).expand(expanded),
            attn_mask=mask_ST,
            is_causal=mask_ST is None,
            scale=self._scale,
        )
        return output_KGSH.permute(2, 0, 1, 3).reshape(tokens, heads * head_size)


class WindowAttention(Attention):
    """Causal attention of each token to the last so many.

    Args:
        window: how many, the token itself included.
        scale: as of `Attention`.
        kernel: likewise.
    """

    def __init__(
        self, window: int, scale: float | None = None, kernel: DecodeKernel | None = None
    ) -> None:
        super().__init__(scale, kernel)
        self._window = window

    def one(
        self, query_1NH: torch.Tensor, keys_KTH: torch.Tensor, values_KTH: torch.Tensor
    ) -> torch.Tensor:
        """The last token's attention, ``[1, N*H]``."""
        first = max(0, keys_KTH.shape[1] - self._window)
        return super().one(query_1NH, keys_KTH[:, first:], values_KTH[:, first:])

    def many(
        self, query_SNH: torch.Tensor, keys_KTH: torch.Tensor, values_KTH: torch.Tensor
    ) -> torch.Tensor:
        """Attention of the last S of T tokens, ``[S, N*H]``."""
        tokens, total = query_SNH.shape[0], keys_KTH.shape[1]
        if total <= self._window:
            return super().many(query_SNH, keys_KTH, values_KTH)
        outputs = []
        for begin in range(0, tokens, _CHUNK_TOKENS):
            rows_SNH = query_SNH[begin : begin + _CHUNK_TOKENS]
            size = rows_SNH.shape[0]
            end = total - tokens + begin + size
            first = max(0, end - size - self._window + 1)
            seen_ST = visible(size, end - first, self._window, query_SNH.device)
            outputs.append(
                self._attend(rows_SNH, keys_KTH[:, first:end], values_KTH[:, first:end], seen_ST)
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _mask(
        self, tokens: int, total: int, mask_BT: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor | None:
        if total <= self._window:
            return super()._mask(tokens, total, mask_BT, device)
        seen = visible(tokens, total, self._window, device)
        return seen if mask_BT is None else (seen & mask_BT[:, None, :])[:, None]


def visible(tokens: int, total: int, window: int, device: torch.device) -> torch.Tensor:
    """Which of T tokens each of the last S attends to, ``[S, T]``.

    Args:
        tokens: how many attend.
        total: how many are there.
        window: how many each sees, itself included; 0 for all before it.
        device: of the result.
    """
    seen_ST = torch.ones(tokens, total, dtype=torch.bool, device=device).tril(total - tokens)
    return seen_ST.triu(total - tokens - window + 1) if window else seen_ST

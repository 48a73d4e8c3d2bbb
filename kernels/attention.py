"""Attention of new tokens to what is cached and to themselves.

Grouped-query attention is computed without repeating keys or values: for one new token, the
queries that share a key head are laid out as if they were tokens of it.

Shapes: S new tokens, T tokens of the sequence with the new ones, N query heads, K key and value
heads, G = N/K, H head size, B batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attend_one(
    query_1NH: torch.Tensor, keys_KTH: torch.Tensor, values_KTH: torch.Tensor
) -> torch.Tensor:
    """The last token's attention to all, ``[1, N*H]``."""
    heads, head_size = query_1NH.shape[1:]
    groups = keys_KTH.shape[0]
    output_1KGH = F.scaled_dot_product_attention(
        query_1NH.view(1, groups, heads // groups, head_size),
        keys_KTH.unsqueeze(0),
        values_KTH.unsqueeze(0),
    )
    return output_1KGH.reshape(1, heads * head_size)


def attend_many(
    query_SNH: torch.Tensor, keys_KTH: torch.Tensor, values_KTH: torch.Tensor
) -> torch.Tensor:
    """Causal attention of the last S of T tokens, ``[S, N*H]``."""
    tokens, heads, head_size = query_SNH.shape
    groups, total = keys_KTH.shape[:2]
    shared = heads // groups
    query_KGSH = query_SNH.view(tokens, groups, shared, head_size).permute(1, 2, 0, 3)
    expanded = (groups, shared, total, head_size)
    mask_ST = None
    if tokens != total:
        mask_ST = torch.ones(tokens, total, dtype=torch.bool, device=query_SNH.device).tril(
            total - tokens
        )
    output_KGSH = F.scaled_dot_product_attention(
        query_KGSH,
        keys_KTH.unsqueeze(1).expand(expanded),
        values_KTH.unsqueeze(1).expand(expanded),
        attn_mask=mask_ST,
        is_causal=mask_ST is None,
    )
    return output_KGSH.permute(2, 0, 1, 3).reshape(tokens, heads * head_size)


def attend_batch(
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
        mask_BT: true for the tokens that may be attended to; none: all. A token that may attend to
            none, such as padding on the left, gets zeros, as Hugging Face has it.
    """
    batch, tokens, heads, head_size = query_BSNH.shape
    total = keys_BTKH.shape[1]
    shared = heads // keys_BTKH.shape[2]
    mask = None
    if mask_BT is not None or total != tokens:
        device = query_BSNH.device
        is_before_ST = torch.ones(tokens, total, dtype=torch.bool, device=device).tril(
            total - tokens
        )
        mask = is_before_ST
        if mask_BT is not None:
            mask = (is_before_ST & mask_BT[:, None, :])[:, None]
    output_BNSH = F.scaled_dot_product_attention(
        query_BSNH.transpose(1, 2),
        keys_BTKH.transpose(1, 2).repeat_interleave(shared, dim=1),
        values_BTKH.transpose(1, 2).repeat_interleave(shared, dim=1),
        attn_mask=mask,
        is_causal=mask is None,
    )
    return output_BNSH.transpose(1, 2).reshape(batch * tokens, heads * head_size)

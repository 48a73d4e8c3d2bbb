"""LLM.int8() in plain torch, and what it is better than: the references, for any device.

Both multiply whole numbers by whole numbers: rows of activations and rows of weights are each
scaled so that their largest becomes 127. A few features of large models' activations are twenty
times larger than all others, always the same ones; one of them leaves the others few codes. So the
paper takes these features out, multiplies them in 16 bits, and adds both products.

Source: Dettmers et al. 2022, arXiv:2208.07339: vector-wise quantisation in section 3.1, the
decomposition in 3.2, and the threshold of 6.0 in 3.2 and 4.

Shapes: S rows, I width in, O width out.
"""

from __future__ import annotations

import torch

from kernels.quant.int8 import LARGEST_CODE, Int8Weights

OUTLIER_THRESHOLD = 6.0
"""A feature is taken out when it is this large in any row."""


def multiply_int8(x_SI: torch.Tensor, weights: Int8Weights) -> torch.Tensor:
    """``x @ weights.t()`` with both in 8 bits, ``[S, O]``: without a decomposition."""
    codes_SI, scales_S = _quantise_rows(x_SI.float())
    # Sums of products of codes need more than float32's 24 bits when they are exact; so float64.
    sums_SO = torch.mm(codes_SI.double(), weights.codes_OI.double().t())
    scales_SO = scales_S[:, None] * weights.scales_O
    return sums_SO.mul_(scales_SO).to(x_SI.dtype)


def multiply_llm_int8(
    x_SI: torch.Tensor, weights: Int8Weights, *, threshold: float = OUTLIER_THRESHOLD
) -> torch.Tensor:
    """``x @ weights.t()`` as LLM.int8() has it, ``[S, O]``.

    What one row gives depends on the others, since one of them is enough to make a feature an
    outlier.

    Args:
        x_SI: in 16 bits, or more.
        weights: in 8 bits.
        threshold: from which on a feature is multiplied in the dtype of ``x``.
    """
    is_outlier_I = (x_SI.abs() >= threshold).any(dim=0)
    regular_SO = multiply_int8(x_SI.masked_fill(is_outlier_I, 0.0), weights)
    columns_OI = weights.codes_OI[:, is_outlier_I].float() * weights.scales_O[:, None]
    outliers_SO = torch.mm(x_SI[:, is_outlier_I], columns_OI.to(x_SI.dtype).t())
    return regular_SO + outliers_SO


def _quantise_rows(x_SI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales_S = x_SI.abs().amax(dim=1).div_(LARGEST_CODE)
    scales_S = torch.where(scales_S > 0, scales_S, 1.0)
    return (x_SI / scales_S[:, None]).round_(), scales_S
